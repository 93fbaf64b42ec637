"""Effects: train a model on labelled images: list, split, fetch and decode once, learn, calibrate, write the model directory.

    python jobs/train.py --input s3://bucket/labelled --output s3://bucket/models/products-v1

Run it again to go on where it was stopped. See --help, and the README for what is written.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.concurrency.monitor import on_tick, tick
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config import sections
from imgbatch.config.training import Training
from imgbatch.errors import BadPath, InputError, NotFound, UsageError
from imgbatch.evaluation import training_images
from imgbatch.evaluation.labelled_inputs import Resolver
from imgbatch.ledger import claims, run_record
from imgbatch.models import loading, taxonomy
from imgbatch.models.model import Model
from imgbatch.models.taxonomy import Taxonomy
from imgbatch.pipeline import budget
from imgbatch.pipeline.preflight import sources_beside, warn_of_local_paths
from imgbatch.sources.base import Source
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute, missing_path
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted
from imgbatch.training import artifacts, inputs, publish, splits
from imgbatch.training import labels as labels_module
from imgbatch.training.inputs import Inputs, Listed
from imgbatch.training.labels import Labelled

if TYPE_CHECKING:
    from imgbatch.training.cache_build import Prepared
    from imgbatch.training.strategies import Trained

log = logging.getLogger("imgbatch")


@dataclass(frozen=True, slots=True)
class Job:
    """A run that may start: its config is sound, its base known, its inputs there, and nothing where the model goes."""

    config: Training
    stores: Stores
    output: Folder
    base: Model
    sources: list[Source]
    taxonomy: bytes | None
    seen_by_base: training_images.TrainingImages | None

    @property
    def run(self) -> Folder:
        """What a run goes on from, below the output until the model is there."""
        return self.output.folder(publish.RUN)

    @property
    def inputs(self) -> Inputs:
        """The labelled images."""
        return Inputs(self.stores, self.sources, self.config.source)


def prepare(chosen: Training) -> Job | None:
    """Check everything that can be checked before any work.

    None: there is nothing to do but for what a killed run of this config had left to clear up behind its model.
    """
    stores = Stores(chosen.storage)
    if not chosen.output:
        raise UsageError("no --output: say where the model directory goes")
    output = Folder(stores, absolute(chosen.output))
    if chosen.source.label_is != "name":
        raise UsageError(
            f"source.label_is={chosen.source.label_is} is for evaluate.py: training numbers its classes itself, by name"
        )
    console.step("loading the base model")
    base = loading.load(sections.ModelConfig(name=chosen.base), stores, replaces_head=True)
    tree = given_tree(chosen, stores)
    try:
        if publish.finished(output, chosen.public(), Training().public()):
            return None
        publish.require_room(output)
    except (NotFound, BadPath) as error:
        raise UsageError(str(error)) from error
    found = sources_beside(output, chosen.input, chosen.source)
    if chosen.train.method == "head" and not chosen.train.pretrained:
        raise UsageError(
            "train.method=head needs a pretrained base: leave train.pretrained=false away, or say train.method=finetune"
        )
    seen_by_base = training_images.of_model(chosen.base, stores) if chosen.train.pretrained else None
    return Job(chosen, stores, output, base, found, tree, seen_by_base)


def given_tree(chosen: Training, stores: Stores) -> bytes | None:
    """Return the content of the taxonomy that was given."""
    if not chosen.taxonomy:
        return None
    try:
        return stores.read(absolute(chosen.taxonomy))[0]
    except (NotFound, BadPath) as error:
        raise UsageError(f"--taxonomy {missing_path(chosen.taxonomy) or error}") from error


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What a training came to."""

    output: str
    """The URI of the model directory."""
    method: str
    """head or finetune; empty: the model had been trained already by the same command."""
    metrics: Mapping[str, Any]
    """Figures on held-out images, as in `metrics.json`."""
    rejected: int
    seconds: float

    def __str__(self) -> str:
        if not self.method:
            return f"trained already: {self.output}"
        end = f"{self.rejected:,} rejected, in {self.seconds:.1f} s: {self.output}"
        if not self.metrics["n"]:
            return f"{self.method} trained, no image held out, {end}"
        low, high = self.metrics["top1_interval"]
        return (
            f"{self.method} trained: {self.metrics['top1']:.1%} of {counted(self.metrics['n'], 'held-out image')} right "
            f"({low:.1%} to {high:.1%}), ECE {self.metrics['ece']:.3f}, {end}"
        )


def train(chosen: Training, stop: StopRequest) -> TrainingSummary:
    """Train a model on the labelled images of the inputs, and write its directory.

    Raises:
        ImgbatchError: the run could not be finished; `exit_code` says who has to act.
    """
    job = prepare(chosen)
    if job is None:
        return TrainingSummary(absolute(chosen.output), "", {}, 0, 0.0)
    with claims.take(job.run) as claim:
        return recorded(job, claim, stop)


def dry_run(chosen: Training) -> str:
    """Return what is understood of the inputs; nothing is written."""
    job = prepare(chosen)
    if job is None:
        return f"trained already: {absolute(chosen.output)}"
    with tempfile.TemporaryDirectory(prefix="imgbatch-") as place:
        listed = inputs.list_images(job.inputs, Folder(job.stores, place))
        lines, labels = inputs.preview(listed)
    if labels is not None:
        tree_of(job, labels)
    return "\n".join([*lines, "nothing was written"])


def recorded(job: Job, claim: claims.Claim, stop: StopRequest) -> TrainingSummary:
    """Run the job between the first and the last version of its record, which the model takes along as `training.json`."""
    record = run_record.Record(
        job.run,
        {"config": job.config.public(), "base": {"name": job.base.name, "digest": job.base.digest}},
        claim.run_id,
        claim,
    )
    record.start()
    log.info("base %s", job.base.summary())
    with stop.on_timeout(record.record_interrupt), on_tick(record.beat), record.recording_failure():
        return work_through(job, record, stop)


def work_through(job: Job, record: run_record.Record, stop: StopRequest) -> TrainingSummary:
    """List, make ready, learn, and write the model."""
    started = time.monotonic()

    console.step("listing")
    listed = inputs.list_images(job.inputs, record.folder.folder("listing"))
    wanted, known = inputs.wanted(listed)
    if known is not None:  # without tars all is known before anything is read
        inputs.say_what_is_empty(job.inputs, listed.table["uri"])
        tree_of(job, known.labels)
    way, made, found, resolver, trained = learn(job, listed, wanted, stop)
    tree, refused = tree_of(job, found.labels), made.rejects
    console.step("writing the model")
    truths = found.classes[trained.held]
    figures = artifacts.metrics(trained.unseen, trained.temperature, truths, tree)
    record.facts |= {
        "status": "succeeded", "exit_code": 0, "way": way, "seed": job.config.train.seed, "temperature": trained.temperature,
        "data": {
            "fingerprint": listed.fingerprint, "rejected": len(refused), **labels_module.summary(found), **resolver.public(),
        },
        "metrics": figures, "curve": trained.curve, "seconds": round(time.monotonic() - started, 1), **trained.facts,
    }  # fmt: skip
    write(job, record, made, found, trained, figures)
    return TrainingSummary(job.output.uri, way, figures, len(refused), time.monotonic() - started)


def learn(
    job: Job, listed: Listed, wanted: Any, stop: StopRequest
) -> tuple[str, Prepared, Labelled, Resolver, Trained]:
    """Have the images made ready on the cluster, split them, and train; return the way, the images and what came of it."""
    from imgbatch.engine import placement, session  # Ray and torch are not needed before all of the input is sound
    from imgbatch.training import network, strategies

    network.of(job.base)
    with stop.reinstall_after_ray(), session.connected(job.config.cluster.call_s):
        tick()  # which takes the signals over in C, too, where Ray has taken SIGTERM
        plan = placement.plan(job.config.cluster, workers=job.config.train.workers)
        warn_of_local_paths(job.output, job.sources, plan.nodes)
        way = job.config.train.method_on(gpus=plan.split)
        with loading.share_weights(job.base, None if plan.one_machine else job.run.folder("base")) as base:
            task = strategies.Task(
                job.config, job.stores, base, listed.pages, listed.table, listed.fingerprint, listed.work_plan, job.run,
                plan,
            )  # fmt: skip
            work, made = strategies.ready_for(task, way, wanted)
            found, resolver, fold = split(job, listed, made)
            if way == "finetune" or not job.config.train.refit:  # no cross-validation: most images are not held out
                fold = splits.one_alone(fold)
            if way == "head" and job.config.train.workers > 1:
                log.warning(
                    "train.workers=%d is not used: train.method=head trains in one process", job.config.train.workers
                )
            log.info("%s", what_is_held_out(fold))
            learned = strategies.by_head if way == "head" else strategies.by_finetuning
            return way, made, found, resolver, learned(task, work, made, found, fold)


def what_is_held_out(fold: npt.NDArray[np.int64]) -> str:
    """Return how the images that are ready are divided.

    >>> what_is_held_out(np.array([0, 1, 2, 0, 1])), what_is_held_out(np.array([splits.ALWAYS, splits.ALWAYS, 0]))
    ('5 images, 3-fold cross-validation', '2 images to learn from, 1 held out to choose on')
    >>> what_is_held_out(np.array([splits.ALWAYS, 0, 1])), what_is_held_out(np.array([splits.ALWAYS, splits.NEVER]))
    ('3 images, 2-fold cross-validation of 2 of them', '1 image to learn from, none held out')
    """
    used, held = int(np.count_nonzero(fold != splits.NEVER)), int(np.count_nonzero(fold >= 0))
    folds = int(fold.max(initial=splits.NEVER)) + 1
    if folds > 1:
        part = "" if held == used else f" of {held:,} of them"
        return f"{counted(used, 'image')}, {folds}-fold cross-validation{part}"
    return f"{counted(used - held, 'image')} to learn from, {f'{held:,} held out to choose on' if held else 'none held out'}"


def split(job: Job, listed: Listed, made: Prepared) -> tuple[Labelled, Resolver, Any]:
    """Return the classes of the images that are ready, and the fold of each; all that training needs has to be sound."""
    rejected = len(made.rejects)
    good = len(made.images) + len(made.torn) - rejected
    if rejected:  # if it ends here, somebody wants to know why
        job.run.put("rejects.parquet", artifacts.parquet(made.rejects))
    budget.judge(
        job.config.rejects, listed=good + rejected, labelled=good, rejected=rejected, at_end=True,
        where=job.run.at("rejects.parquet"),
    )  # fmt: skip
    found, resolver = inputs.read(listed, made)
    if listed.work_plan.tars:
        inputs.say(resolver)
    require_readable(found, made.read, job.run.at("rejects.parquet"))
    tree_of(job, found.labels)  # of what is in tars it could not be known before
    if list(job.base.labels) != list(found.labels):
        log.info(
            "the head of %s for %s is replaced by one for %d",
            job.base.name,
            counted(len(job.base.labels), "class", "classes"),
            len(found.labels),
        )
    fold = splits.assign(found, job.config.train.folds, job.config.train.seed, made.read)
    say_what_is_alone(found, fold)
    return found, resolver, fold


def write(job: Job, record: run_record.Record, made: Prepared, found: Labelled, trained: Trained, figures: Any) -> None:
    """Write the model directory."""
    from imgbatch.training import network, page

    truths, unseen = found.classes[trained.held], trained.unseen / trained.temperature
    uris = made.images["uri"].take(pa.array(trained.held)).combine_chunks()
    files = network.files(trained.net, job.base.preprocess, found.labels)
    files["predictions.parquet"] = artifacts.predictions(uris, found.labels, truths, unseen, trained.final)
    files["metrics.json"] = json.dumps(figures, indent=2).encode()
    files["training.json"] = json.dumps(record.facts, indent=2, default=str).encode()
    files[training_images.FILE] = artifacts.training_images(
        made.images, trained.learned, trained.held, job.seen_by_base
    )
    files["training.html"] = page.page(record.facts, found.labels, truths, trained.unseen, trained.temperature).encode()
    if job.taxonomy:
        files["taxonomy.json" if job.config.taxonomy.lower().endswith(".json") else "taxonomy.csv"] = job.taxonomy
    if len(made.rejects):
        files["rejects.parquet"] = artifacts.parquet(made.rejects)
    publish.publish(job.output, files)


def tree_of(job: Job, labels: Sequence[str]) -> Taxonomy | None:
    """Return the taxonomy that was given, held against the labels."""
    return taxonomy.read(job.taxonomy, job.config.taxonomy, labels) if job.taxonomy else None


def say_what_is_alone(found: Labelled, fold: Any) -> None:
    """Name the classes that nothing can be held out of."""
    counts = np.bincount(found.classes[fold >= splits.ALWAYS], minlength=len(found.labels))
    alone = [found.labels[number] for number in np.flatnonzero(counts == 1).tolist()]
    if alone:
        shown = ", ".join(alone[:5]) + (", …" if len(alone) > 5 else "")
        log.warning(
            "%s with one image, from which little is learned and nothing held out: %s",
            counted(len(alone), "class", "classes"),
            shown,
        )


def require_readable(found: Labelled, read: Any, where: str) -> None:
    """Refuse classes of which no image could be read; `where` says why."""
    labelled_ones = found.classes != labels_module.NO_CLASS
    had, has = (
        np.bincount(found.classes[mask], minlength=len(found.labels)) for mask in (labelled_ones, labelled_ones & read)
    )
    gone = [f"{found.labels[number]!r} ({had[number]})" for number in np.flatnonzero(has == 0).tolist()]
    if gone:
        raise InputError(
            f"no image of {counted(len(gone), 'class', 'classes')} can be read: {', '.join(gone[:5])}; {where} says why: "
            "fix the files, or leave them out"
        )

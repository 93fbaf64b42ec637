"""Effects: one training run: list, split, fetch and decode once, train, calibrate, write the model directory.

    python jobs/train.py --input s3://bucket/labelled --output s3://bucket/models/products-v1

The same command resumes where an earlier run was stopped. docs/training.md describes the files that are written.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from imgbatch.concurrency.monitor import on_tick, tick
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config import sections
from imgbatch.config.training import Training
from imgbatch.errors import BadPath, InputError, NotFound, UsageError
from imgbatch.evaluation import training_images
from imgbatch.evaluation.labelled_inputs import Resolver
from imgbatch.evaluation.scores import Scores
from imgbatch.ledger import claims, run_record
from imgbatch.models import loading, taxonomy
from imgbatch.models.model import Model
from imgbatch.models.taxonomy import Taxonomy
from imgbatch.orchestration import metrics_export, notify
from imgbatch.pipeline.budget import check_budget
from imgbatch.pipeline.preflight import sources_beside, warn_of_local_paths
from imgbatch.sources.base import Source
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute, missing_path
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted
from imgbatch.training import artifacts, inputs, publish, splits
from imgbatch.training.held_out import HeldOut
from imgbatch.training.inputs import Inputs, Listed
from imgbatch.training.labels import NO_CLASS, Labelled, class_counts

if TYPE_CHECKING:
    from imgbatch.training.cache_build import Prepared
    from imgbatch.training.strategies import Trained

log = logging.getLogger("imgbatch")


@dataclass(frozen=True, slots=True)
class Job:
    """A run that passed its checks: the config is valid, base and inputs exist, and the output holds no model yet."""

    config: Training
    stores: Stores
    output: Folder
    base: Model
    sources: list[Source]
    taxonomy: bytes | None
    seen_by_base: training_images.TrainingImages | None

    @property
    def run(self) -> Folder:
        """The folder from which a run resumes; it is below the output until the model is written."""
        return self.output.folder(publish.RUN)

    @property
    def inputs(self) -> Inputs:
        """The labelled images."""
        return Inputs(self.stores, self.sources, self.config.source)


def prepare(config: Training) -> Job | None:
    """Check everything that can be checked before any work.

    Returns:
        The job; None if a run with this config has written its model, and was killed while it removed its folder. The folder
        is removed then.
    """
    stores = Stores(config.storage)
    if not config.output:
        raise UsageError("no --output: set where the model directory is written")
    output = Folder(stores, absolute(config.output))
    if config.source.label_is != "name":
        raise UsageError(
            f"source.label_is={config.source.label_is} is for evaluate.py: training numbers its classes itself, by name"
        )
    console.step("loading the base model")
    base = loading.load(sections.ModelConfig(name=config.base), stores, replaces_head=True)
    tree = taxonomy_file(config, stores)
    try:
        if publish.finished(output, config.public(), Training().public()):
            return None
        publish.require_room(output)
    except (NotFound, BadPath) as error:
        raise UsageError(str(error)) from error
    sources = sources_beside(output, config.input, config.source)
    if config.train.method == "head" and not config.train.pretrained:
        raise UsageError(
            "train.method=head needs a pretrained base: omit train.pretrained=false, or set train.method=finetune"
        )
    seen_by_base = training_images.of_model(config.base, stores) if config.train.pretrained else None
    return Job(config, stores, output, base, sources, tree, seen_by_base)


def taxonomy_file(config: Training, stores: Stores) -> bytes | None:
    """Return the content of `--taxonomy`."""
    if not config.taxonomy:
        return None
    try:
        return stores.read(absolute(config.taxonomy))[0]
    except (NotFound, BadPath) as error:
        raise UsageError(f"--taxonomy {missing_path(config.taxonomy) or error}") from error


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """The result of a training run."""

    output: str
    """The URI of the model directory."""
    method: str
    """head or finetune; empty: the same command has trained the model before."""
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


def train(config: Training, stop: StopRequest) -> TrainingSummary:
    """Train a model on the labelled images of the inputs, and write its directory.

    Raises:
        ImgbatchError: the run could not be finished; `exit_code` gives the cause.
    """
    with notify.at_end(config.notify, "train", config.output):
        job = prepare(config)
        if job is None:
            return TrainingSummary(absolute(config.output), "", {}, 0, 0.0)
        with (
            claims.take(job.run) as claim,
            metrics_export.written(config.metrics, "train", job.output.uri, None, stop),
        ):
            return recorded(job, claim, stop)


def dry_run(config: Training) -> str:
    """Return a summary of the inputs; write nothing."""
    job = prepare(config)
    if job is None:
        return f"trained already: {absolute(config.output)}"
    with tempfile.TemporaryDirectory(prefix="imgbatch-") as place:
        listed = inputs.list_images(job.inputs, Folder(job.stores, place))
        lines, labels = inputs.preview(listed)
    if labels is not None:
        tree_of(job, labels)
    return "\n".join([*lines, "nothing was written"])


def recorded(job: Job, claim: claims.Claim, stop: StopRequest) -> TrainingSummary:
    """Run the job, with its record, which is written to the model directory as `training.json`."""
    record = run_record.Record(
        job.run,
        {"config": job.config.public(), "base": {"name": job.base.name, "digest": job.base.digest}},
        claim.run_id,
        claim,
        output_uri=job.output.uri,
    )
    record.start()
    log.info("base %s", job.base.summary())
    with stop.on_timeout(record.record_interrupt), on_tick(record.beat), record.recording_failure():
        return work_through(job, record, stop)


def work_through(job: Job, record: run_record.Record, stop: StopRequest) -> TrainingSummary:
    """List and prepare the images, train, and write the model."""
    started = time.monotonic()

    record.enter("listing")
    console.step("listing")
    listed = inputs.list_images(job.inputs, record.folder.folder("listing"))
    selected, labelled = inputs.select_entries(listed)
    if labelled is not None:  # without tars all labels are known before any image is read
        inputs.warn_of_empty_folders(job.inputs, listed.table["uri"])
        tree_of(job, labelled.labels)
    record.enter("preparing")
    method, prepared, labelled, resolver, trained = learn(job, record, listed, selected, stop)
    tree, rejects = tree_of(job, labelled.labels), prepared.rejects
    record.enter("writing")
    console.step("writing the model")
    held_out = held_out_of(trained, labelled, tree)
    figures = artifacts.metrics_record(held_out.metrics if held_out is not None else None)
    record.facts |= {
        **run_record.end_facts("succeeded", 0), "finished": datetime.now(UTC).isoformat(timespec="seconds"), "step": None,
        "way": method, "seed": job.config.train.seed,
        "temperature": trained.temperature,
        "data": {
            "fingerprint": listed.fingerprint, "rejected": len(rejects), **class_counts(labelled), **resolver.public(),
        },
        "metrics": figures, "curve": trained.curve, "seconds": round(time.monotonic() - started, 1), **trained.facts,
    }  # fmt: skip
    write(job, record, listed, prepared, labelled, trained, held_out)
    record.call_on_finish()
    return TrainingSummary(job.output.uri, method, figures, len(rejects), time.monotonic() - started)


def learn(
    job: Job, record: run_record.Record, listed: Listed, selected: Any, stop: StopRequest
) -> tuple[str, Prepared, Labelled, Resolver, Trained]:
    """Prepare the images on the cluster, split them, and train; return the method, the images and the result."""
    from imgbatch.engine import placement, session  # Ray and torch are only imported once the input is checked
    from imgbatch.training import network, strategies

    network.of(job.base)
    with (
        stop.reinstall_after_ray(),
        session.connected(job.config.cluster.call_s),
        metrics_export.exported("train", job.output.uri),
    ):
        tick()  # installs the signal handlers again, in C too, since Ray has replaced that of SIGTERM
        plan = placement.wait_for_plan(job.config.cluster, workers=job.config.train.workers)
        warn_of_local_paths(job.output, job.sources, plan.nodes)
        method = job.config.train.method_on(gpus=plan.split)
        with loading.share_weights(job.base, None if plan.one_machine else job.run.folder("base")) as base:
            task = strategies.Task(
                job.config, job.stores, base, listed.pages, listed.table, listed.fingerprint, listed.work_plan, job.run,
                plan,
            )  # fmt: skip
            work, prepared = strategies.prepared_for(task, method, selected)
            labelled, resolver, fold = split(job, listed, prepared)
            if method == "finetune" or not job.config.train.refit:  # without cross-validation one fold is held out
                fold = splits.only_largest(fold)
            if method == "head" and job.config.train.workers > 1:
                log.warning(
                    "train.workers=%d is not used: train.method=head trains in one process", job.config.train.workers
                )
            log.info("%s", splits.describe(fold))
            record.enter("training")
            train_by = strategies.by_head if method == "head" else strategies.by_finetuning
            return method, prepared, labelled, resolver, train_by(task, work, prepared, labelled, fold)


def split(job: Job, listed: Listed, prepared: Prepared) -> tuple[Labelled, Resolver, Any]:
    """Check the prepared images; return their classes, and the fold of each."""
    rejected = len(prepared.rejects)
    good = len(prepared.images) + len(prepared.failed_tars) - rejected
    if rejected:  # written before the checks, whose errors refer to this file
        job.run.put("rejects.parquet", artifacts.parquet(prepared.rejects))
    check_budget(
        job.config.rejects, listed=good + rejected, labelled=good, rejected=rejected, at_end=True,
        where=job.run.at("rejects.parquet"),
    )  # fmt: skip
    labelled, resolver = inputs.labels_of(listed, prepared)
    if listed.work_plan.streams:
        inputs.log_understood(resolver)
    require_readable(labelled, prepared.read, job.run.at("rejects.parquet"))
    tree_of(job, labelled.labels)  # the labels in tars are only known now
    if list(job.base.labels) != list(labelled.labels):
        log.info(
            "the head of %s for %s is replaced by one for %d",
            job.base.name,
            counted(len(job.base.labels), "class", "classes"),
            len(labelled.labels),
        )
    fold = splits.assign(labelled, job.config.train.folds, job.config.train.seed, prepared.read)
    splits.warn_of_single_images(labelled, fold)
    return labelled, resolver, fold


def write(
    job: Job,
    record: run_record.Record,
    listed: Listed,
    prepared: Prepared,
    labelled: Labelled,
    trained: Trained,
    held_out: HeldOut | None,
) -> None:
    """Write the model directory."""
    from imgbatch.training import network, page

    truths, unseen = labelled.classes[trained.held_out], trained.unseen / trained.temperature
    uris = prepared.images["uri"].take(pa.array(trained.held_out)).combine_chunks()
    files = network.files(trained.net, job.base.preprocess, labelled.labels)
    files["predictions.parquet"] = artifacts.predictions(uris, labelled.labels, truths, unseen, trained.final)
    files["metrics.json"] = json.dumps(record.facts["metrics"], indent=2).encode()
    files["training.json"] = json.dumps(record.facts, indent=2, default=str).encode()
    files[training_images.FILE] = artifacts.training_images(
        prepared.images, trained.learned, trained.held_out, job.seen_by_base
    )
    images = page.images_of(job.stores, job.config, listed.pages, prepared.images, trained, held_out)
    files["training.html"] = page.page(record.facts, labelled.labels, held_out, trained, images).encode()
    if job.taxonomy:
        files["taxonomy.json" if job.config.taxonomy.lower().endswith(".json") else "taxonomy.csv"] = job.taxonomy
    if len(prepared.rejects):
        files["rejects.parquet"] = artifacts.parquet(prepared.rejects)
    publish.publish(job.output, files)


def held_out_of(trained: Trained, labelled: Labelled, tree: Taxonomy | None) -> HeldOut | None:
    """Return the figures of the held-out images; None: no image was held out."""
    if not len(trained.held_out):
        return None
    truth = labelled.classes[trained.held_out]
    return HeldOut.of(Scores.from_logits(trained.unseen, trained.temperature, truth, tree))


def tree_of(job: Job, labels: Sequence[str]) -> Taxonomy | None:
    """Return the taxonomy of the run, checked against the labels."""
    return taxonomy.read(job.taxonomy, job.config.taxonomy, labels) if job.taxonomy else None


def require_readable(labelled: Labelled, read: Any, rejects: str) -> None:
    """Refuse classes of which no image could be read.

    Args:
        read: a mask of the images that could be read.
        rejects: where the reasons are.
    """
    has_class = labelled.classes != NO_CLASS
    listed, readable = (
        np.bincount(labelled.classes[mask], minlength=len(labelled.labels)) for mask in (has_class, has_class & read)
    )
    lost = [f"{labelled.labels[number]!r} ({listed[number]})" for number in np.flatnonzero(readable == 0).tolist()]
    if lost:
        raise InputError(
            f"no image of {counted(len(lost), 'class', 'classes')} can be read: {', '.join(lost[:5])}; the reasons are in "
            f"{rejects}: fix the files, or omit them"
        )

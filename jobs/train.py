"""Train a model on labelled images: list, split, fetch and decode once, learn, calibrate, write the model directory.

    python jobs/train.py --input s3://bucket/labelled --output s3://bucket/models/products-v1

Run it again to go on where it was stopped. See --help, and the README for what is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from imgbatch import cli, config, models, rejects, runs, sources, taxonomy
from imgbatch.errors import BadPath, InputError, NotFound, UsageError
from imgbatch.interrupts import StopRequest
from imgbatch.job import candidates, no_image, sources_beside, warn_of_local_paths
from imgbatch.knobs import load_as
from imgbatch.ledger import Ledger
from imgbatch.listing import Found, Listing, Todo, pages
from imgbatch.models import Model
from imgbatch.schema import CARRIED
from imgbatch.sources.labelled import SPLITS, TEST, Agreement, splits_of
from imgbatch.storage import Folder, Stores, absolute
from imgbatch.taxonomy import Taxonomy
from imgbatch.train import labelled, outcome, publish, splits
from imgbatch.train.labelled import Labelled
from imgbatch.train.settings import Training

if TYPE_CHECKING:
    from imgbatch.train.prepare import Prepared
    from imgbatch.train.ways import Trained

log = logging.getLogger("imgbatch")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    parser = cli.parser(
        "Train a model on labelled images and write a model directory that classify.py and timm open.\n"
        "The same command goes on where an earlier run was stopped.",
        f"examples:\n"
        f"  train.py --input photos-by-class --output my-model\n"
        f"  train.py --input list.csv --output s3://bucket/models/v1 --taxonomy tree.csv --set train.way=finetune\n\n"
        f"{cli.EXIT_CODES}\n{cli.config_keys(Training)}",
    )
    parser.add_argument(
        "--input", action="append", metavar="LABELLED",
        help="folder or prefix with a folder a class, or a manifest with uri and label; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="MODEL_DIR", help="where the model directory is written; nothing may be there"
    )
    parser.add_argument(
        "--base", metavar="NAME_OR_URI", help="the model to start from: efficientnet_lite0, or a directory"
    )
    parser.add_argument("--taxonomy", metavar="FILE", help="a label tree, CSV or JSON, that goes with the model")
    flags = cli.arguments(parser, argv)
    return cli.run(lambda: train(flags))


def train(flags: Any) -> int:
    """From flags to an exit code."""
    stop = StopRequest().install()
    chosen = load_as(
        Training, flags.config, flags.settings,
        input=flags.input, output=flags.output, base=flags.base, taxonomy=flags.taxonomy,
    )  # fmt: skip
    job = prepare(chosen, stop.check)
    if job is None:
        print(f"trained already: {absolute(chosen.output)}")
        return 0
    return recorded(job, stop)


@dataclass(frozen=True, slots=True)
class Job:
    """A run that may start: its config is sound, its base known, its inputs there, and nothing where the model goes."""

    config: Training
    stores: Stores
    output: Folder
    base: Model
    sources: list[sources.Source]
    taxonomy: bytes | None

    @property
    def run(self) -> Folder:
        """What a run goes on from, below the output until the model is there."""
        return self.output.folder(publish.RUN)


def prepare(chosen: Training, pulse: Callable[[], None]) -> Job | None:
    """Check everything that can be checked before any work; `pulse` is called while that takes long.

    None: there is nothing to do but for what a killed run of this config had left to clear up behind its model.
    """
    stores = Stores(chosen.storage)
    if not chosen.output:
        raise UsageError("no --output: say where the model directory goes")
    output = Folder(stores, absolute(chosen.output))
    base = models.load(config.ModelConfig(name=chosen.base), stores, pulse)
    tree = None
    try:
        if publish.finished(output, chosen.public()):
            return None
        publish.require_room(output)
        tree = stores.read(absolute(chosen.taxonomy))[0] if chosen.taxonomy else None
    except (NotFound, BadPath) as error:
        raise UsageError(str(error)) from error
    found = sources_beside(output, chosen.input, chosen.source)
    if chosen.train.way == "head" and not chosen.train.pretrained:
        raise UsageError(
            "train.way=head needs a pretrained base: leave train.pretrained=false away, or say train.way=finetune"
        )
    runs.require_free(output.folder(publish.RUN))
    return Job(chosen, stores, output, base, found, tree)


def recorded(job: Job, stop: StopRequest) -> int:
    """Run the job between the first and the last version of its record, which the model takes along as `training.json`."""
    record = runs.Record(
        job.run, {"config": job.config.public(), "base": {"name": job.base.name, "digest": job.base.digest}}
    )
    record.start()
    with record.telling():
        summary = work_through(job, record, stop)
    print(summary)
    return 0


def work_through(job: Job, record: runs.Record, stop: StopRequest) -> str:
    """List, make ready, learn, and write the model; return what it came to, as a sentence."""
    started = time.monotonic()

    def pulse() -> None:
        """Show that the run lives, and end it if that was asked for: called at least once in a few seconds."""
        stop.check()
        record.beat()

    listed = list_images(job, record.folder.folder("listing"), pulse)
    if listed.todo.shards:
        wanted = listed.todo.pending & (splits_of(listed.table, roots_of(job)) != TEST)
    else:  # what can be known before anything is read is said now
        found = labelled.read(listed.table, roots_of(job))
        say_what_is_empty(job, listed.table["uri"])
        tree_of(job, found.labels)
        wanted = (found.classes != labelled.NO_CLASS) & (found.splits != TEST)
    way, made, found, trained = learn(job, listed, wanted, stop, pulse)
    tree, refused = tree_of(job, found.labels), made.rejects
    truths = found.classes[trained.held]
    figures = outcome.metrics(trained.unseen, trained.temperature, truths, tree)
    record.facts |= {
        "status": "succeeded", "exit_code": 0, "way": way, "seed": job.config.train.seed, "temperature": trained.temperature,
        "data": {"fingerprint": listed.fingerprint, "rejected": len(refused), **labelled.summary(found)},
        "metrics": figures, "curve": trained.curve, "seconds": round(time.monotonic() - started, 1), **trained.facts,
    }  # fmt: skip
    write(job, record, made, found, trained, figures)
    return summary(figures, way, len(refused), time.monotonic() - started, job.output)


def learn(
    job: Job, listed: Listed, wanted: Any, stop: StopRequest, pulse: Callable[[], None]
) -> tuple[str, Prepared, Labelled, Trained]:
    """Have the images made ready on the cluster, split them, and train; return the way, the images and what came of it."""
    from imgbatch import cluster, connection  # Ray and torch are not needed before all of the input is sound
    from imgbatch.train import network, ways

    network.of(job.base)
    with stop.beside_ray(), connection.connected(pulse):
        stop.check()
        plan = cluster.plan(job.config.cluster, pulse=pulse)
        warn_of_local_paths(job.output, job.sources, plan.nodes)
        way = job.config.train.way_on(gpus=plan.split)
        with models.shared(job.base, None if plan.one_machine else job.run.folder("base")) as base:
            task = ways.Task(
                job.config, job.stores, base, listed.pages, listed.table, listed.fingerprint, listed.todo, job.run,
                plan, pulse,
            )  # fmt: skip
            work, made = ways.ready_for(task, way, wanted)
            found, fold = split(job, made)
            if way == "finetune" or not job.config.train.refit:  # no cross-validation: most images are not held out
                fold = splits.one_alone(fold)
            counts = (int(np.count_nonzero(mask)) for mask in (fold != splits.NEVER, fold >= 0))
            log.info("%s images to learn from, %s held out to choose on", *(f"{count:,}" for count in counts))
            learned = ways.by_head if way == "head" else ways.by_finetuning
            return way, made, found, learned(task, work, made, found, fold)


def split(job: Job, made: Prepared) -> tuple[Labelled, Any]:
    """Return the classes of the images that are ready, and the fold of each; all that training needs has to be sound."""
    rejected = len(made.rejects)
    good = len(made.images) + len(made.torn) - rejected
    if rejected:  # if it ends here, somebody wants to know why
        job.run.put("rejects.parquet", outcome.parquet(made.rejects))
    rejects.judge(
        job.config.rejects, listed=good + rejected, labelled=good, rejected=rejected, at_end=True,
        where=job.run.at("rejects.parquet"),
    )  # fmt: skip
    found = labelled.read(made.images, roots_of(job))
    require_readable(found, made.read, job.run.at("rejects.parquet"))
    tree_of(job, found.labels)  # of what is in tars it could not be known before
    if list(job.base.labels) != list(found.labels):
        log.info(
            "the head of %s for %d classes is replaced by one for %d",
            job.base.name,
            len(job.base.labels),
            len(found.labels),
        )
    fold = splits.assign(found, job.config.train.folds, job.config.train.seed, made.read)
    say_what_is_alone(found, fold)
    return found, fold


def write(job: Job, record: runs.Record, made: Prepared, found: Labelled, trained: Trained, figures: Any) -> None:
    """Write the model directory."""
    from imgbatch.train import network, page

    truths, unseen = found.classes[trained.held], trained.unseen / trained.temperature
    uris = made.images["uri"].take(pa.array(trained.held)).combine_chunks()
    files = network.files(trained.net, job.base.preprocess, found.labels)
    files["predictions.parquet"] = outcome.predictions(uris, found.labels, truths, unseen, trained.final)
    files["metrics.json"] = json.dumps(figures, indent=2).encode()
    files["training.json"] = json.dumps(record.facts, indent=2, default=str).encode()
    files["training.html"] = page.page(record.facts, found.labels, truths, trained.unseen, trained.temperature).encode()
    if job.taxonomy:
        files["taxonomy.json" if job.config.taxonomy.lower().endswith(".json") else "taxonomy.csv"] = job.taxonomy
    if len(made.rejects):
        files["rejects.parquet"] = outcome.parquet(made.rejects)
    publish.publish(job.output, files)


def summary(figures: dict[str, Any], way: str, rejected: int, seconds: float, output: Folder) -> str:
    """Return the last line."""
    if not figures["n"]:
        return f"{way} trained, no image held out, {rejected:,} rejected, in {seconds:.1f} s: {output.uri}"
    low, high = figures["top1_interval"]
    return (
        f"{way} trained: {figures['top1']:.1%} of {figures['n']:,} held-out images right ({low:.1%} to {high:.1%}), "
        f"ECE {figures['ece']:.3f}, {rejected:,} rejected, in {seconds:.1f} s: {output.uri}"
    )


@dataclass(frozen=True, slots=True)
class Listed:
    """The images of all inputs: their URIs and carried columns, in an order that repeats."""

    table: pa.Table
    pages: Folder
    todo: Todo
    fingerprint: str
    """Tells these images, their versions and their labels from others."""


def list_images(job: Job, folder: Folder, pulse: Callable[[], None]) -> Listed:
    """List the inputs onto numbered pages.

    Raises:
        InputError: there is not one image.
    """
    chosen = job.config.source
    agree = (CARRIED + (chosen.label_column or "label"), CARRIED + (chosen.split_column or "split"))
    listing = Listing(Ledger(job.run, {}).open(), folder, agree=agree)
    agreement, counts = Agreement(job.sources), listing.counts

    def agreeing(batches: Iterable[Found]) -> Iterator[Found]:
        for each in batches:
            agreement.require(each.batch)
            yield each

    with candidates(job.sources, pulse, allow_empty=job.config.source.allow_empty) as batches:
        listing.take(agreeing(batches), pulse)
    if not counts.listed and not counts.tars:
        raise InputError(no_image(counts, job.sources))
    log.info(
        "%s images listed, %s objects ignored, %s duplicates",
        *(f"{number:,}" for number in (counts.listed, counts.ignored, counts.duplicates)),
    )
    digest, kept = hashlib.sha256(), []
    for page in pages(folder):
        pulse()
        digest.update(json.dumps(page.to_pydict(), default=str).encode())
        kept.append(page.drop_columns(["size", "etag", "last_modified"]))
    return Listed(pa.concat_tables(kept), folder, listing.todo(), digest.hexdigest())


def roots_of(job: Job) -> list[str]:
    """Return the inputs below which folders are classes."""
    return [source.uri for source in job.sources if source.kind == "folder"]


def tree_of(job: Job, labels: Sequence[str]) -> Taxonomy | None:
    """Return the taxonomy that was given, held against the labels."""
    return taxonomy.read(job.taxonomy, job.config.taxonomy, labels) if job.taxonomy else None


def say_what_is_empty(job: Job, uris: pa.ChunkedArray) -> None:
    """Name the folders directly below an input, or its splits, that hold no image."""
    for root in roots_of(job):
        folders = Folder(job.stores, root).folders()
        splits_of = [f"{root}/{name}" for name in folders if name.lower() in SPLITS]
        for place in (root, *splits_of):
            for name in labelled.empty_folders(place, Folder(job.stores, place).folders(), uris):
                log.warning("%s/%s holds no image: it is no class", place, name)


def say_what_is_alone(found: Labelled, fold: Any) -> None:
    """Name the classes that nothing can be held out of."""
    counts = np.bincount(found.classes[fold >= splits.ALWAYS], minlength=len(found.labels))
    alone = [found.labels[number] for number in np.flatnonzero(counts == 1).tolist()]
    if alone:
        shown = ", ".join(alone[:5]) + (", …" if len(alone) > 5 else "")
        log.warning(
            "%d classes have one image, from which little is learned and nothing held out: %s", len(alone), shown
        )


def require_readable(found: Labelled, read: Any, where: str) -> None:
    """Refuse classes of which no image could be read; `where` says why."""
    labelled_ones = found.classes != labelled.NO_CLASS
    had, has = (
        np.bincount(found.classes[mask], minlength=len(found.labels)) for mask in (labelled_ones, labelled_ones & read)
    )
    gone = [f"{found.labels[number]!r} ({had[number]})" for number in np.flatnonzero(has == 0).tolist()]
    if gone:
        raise InputError(
            f"no image of {len(gone)} classes can be read: {', '.join(gone[:5])}; {where} says why: mend the files, or leave "
            "them away"
        )


if __name__ == "__main__":
    cli.leave(main())

"""Effects: how good are a model's labels? Classify images whose class is known, and compare.

    python jobs/evaluate.py --input s3://bucket/labelled --model s3://bucket/models/fruit --output s3://bucket/evaluation

Labels are made by the main job into the same output, so that this command too goes on where it was stopped; with --labels
those of an earlier run are taken as they are.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config import reading, sections
from imgbatch.errors import InputError, NotFound, OutputError, UsageError
from imgbatch.evaluation.classes import Classes
from imgbatch.evaluation.evaluation import Evaluation, compared
from imgbatch.evaluation.ground_truth import Truths
from imgbatch.evaluation.labelled_inputs import Relisted, relisted
from imgbatch.evaluation.predictions import PREDICTIONS, READ, Scored, has_hashes, worst
from imgbatch.evaluation.training_images import NOT_KNOWN, TrainingImages, of_model
from imgbatch.ledger import claims
from imgbatch.ledger.commit_log import Log
from imgbatch.models import loading
from imgbatch.models.model import Model
from imgbatch.pipeline import run
from imgbatch.pipeline.preflight import naming_the_output, prepare
from imgbatch.schema import labels_with
from imgbatch.sources import recognise
from imgbatch.sources.labelled import is_tar
from imgbatch.sources.split_words import SPLIT_NAMES
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute, missing_path
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted

log = logging.getLogger("imgbatch")

_SHOWN = 24  # images that the model is most sure and wrong about
_ALL_CLASSES = 1_000
_THUMBNAIL = 240  # pixels
_REFUSED = OutputError.exit_code  # a run that ended so has written none of the rows


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """What an evaluation came to."""

    output: str
    """The URI below which metrics.json, predictions.parquet and evaluation.html lie."""
    metrics: Mapping[str, Any]
    """As in `metrics.json`."""
    text: str

    def __str__(self) -> str:
        return self.text


def evaluate(
    chosen: sections.Config,
    stop: StopRequest,
    *,
    model: str | None = None,
    against: str | None = None,
    split: str | None = None,
    labels: str | None = None,
) -> EvaluationSummary:
    """Label images whose class is known, and compute how good the labels are.

    Args:
        model: the name of the model, if one was given.
        against: a second model, compared on the same images.
        split: train, val or test: the images of this split alone.
        labels: the output of a run whose labels are scored in place of new ones.

    Raises:
        ImgbatchError: the run could not be finished; `exit_code` says who has to act.
    """
    if labels and against:
        raise UsageError("--labels runs no model, so there is none to compare with: omit --against or --labels")
    beside = replace(chosen, model=sections.ModelConfig(name=against or ""))
    # It is asked for its classes before the first one begins to work.
    second = loading.load(beside.model, Stores(chosen.storage)) if against else None
    if labels:
        output, truths, first = from_tables(chosen, labels, model, split)
    else:
        output, truths, first = from_model(chosen, split, stop, second)
    ours, mistakes = score(first, truths, output)
    other = None
    if second is not None:
        place = replace(chosen.output, uri=output.at("against"))
        folder, _, labelled = from_model(replace(beside, output=place), split, stop)
        other, _ = score(labelled, truths, folder)
    return finish(output, chosen, ours, other, mistakes)


Labels = tuple[Model, Folder, float | None, TrainingImages | None]
"""Who has labelled, the output of the main job, the temperature that the model was calibrated with, and what it has seen."""


def from_model(
    chosen: sections.Config, split: str | None, stop: StopRequest, against: Model | None = None
) -> tuple[Folder, Truths, Labels]:
    """Have the main job label the images; return the output, the listed truths and the labels.

    Args:
        against: the second model, which is to know all classes as well.
    """
    stores = Stores(chosen.storage)
    temperature = temperature_of(chosen.model.name, stores)
    training_images = of_model(chosen.model.name, stores)
    # All columns are wanted here, and by the hashes the images that the model was trained on are found.
    chosen = replace(chosen, output=replace(chosen.output, columns=(), content_hash=True))
    if temperature is not None:  # what scores were before it follows from all of them alone
        chosen = replace(chosen, top_k=max(chosen.top_k, _ALL_CLASSES))
    job = prepare(chosen)
    with naming_the_output(job):
        unhashed = written_without_hashes(job.output)
    if unhashed:  # an output of 0.1, or of classify.py, is continued as it is
        chosen = replace(chosen, output=replace(chosen.output, content_hash=False))
        job = prepare(chosen)
    who = [job.model] if against is None else [job.model, against]
    with naming_the_output(job):
        job.output.folders()
        claim = claims.take(job.output, check=job.config.run.check_owner)
    with claim:
        withdraw(job.output)
        listing = (job.stores, job.sources, chosen.source, partial(of_split, split))
        console.step("reading the true classes")
        with relisted(*listing, splits=split is not None) as listed:
            require_classes(listed, who, split, chosen.source.label_is)
            log.info("%s", run.recorded(replace(job, sources=[listed.source]), claim, stop))
            truths = Truths(
                (each.batch for each in listed.source.list_images()), job.model.labels, chosen.source.label_is
            )
    add_members(truths, job.output, listed, split)
    return job.output, truths, (job.model, job.output, temperature, training_images)


def written_without_hashes(output: Folder) -> bool:
    """Return whether an output holds rows that were written without `output.content_hash`."""
    for name in ("labels", "rejects"):
        log = Log(output.folder(name))
        log.scan()
        if log.numbers:
            return not has_hashes(log)
    return False


def from_tables(
    chosen: sections.Config, labels: str, named: str | None, split: str | None
) -> tuple[Folder, Truths, Labels]:
    """Take the labels of an earlier run; the model is only asked for its classes and levels.

    Args:
        labels: the output of that run.
        named: the model, where it lies now; None: where that run found it.
    """
    stores = Stores(chosen.storage)
    if not chosen.output.uri:
        raise UsageError("no --output: say where the figures go")
    if missing := missing_path(labels):
        raise InputError(f"--labels {missing}")
    written = Folder(stores, absolute(labels))
    record = last_run(written)
    if not (named or record):
        raise InputError(f"--labels {written.uri} is no output of classify.py: it has no runs/ with a run.json")
    chosen = replace(chosen, model=model_of(record, chosen.model, named))
    model = loading.load(chosen.model, stores)
    log.info("model %s", model.summary())
    chosen = reading.fill_output_template(chosen, model=model.slug)
    output = Folder(stores, absolute(chosen.output.uri))
    withdraw(output)
    require_columns(written, record.get("config", {}).get("output", {}).get("columns", ()))
    given = recognise.recognise(stores, chosen.input, chosen.source)
    listing = (stores, given, chosen.source, partial(of_split, split))
    console.step("reading the true classes")
    with relisted(*listing, splits=split is not None) as listed:
        require_classes(listed, [model], split, chosen.source.label_is)
        truths = Truths((each.batch for each in listed.source.list_images()), model.labels, chosen.source.label_is)
    add_members(truths, written, listed, split)
    name = chosen.model.name
    return output, truths, (model, written, temperature_of(name, stores), of_model(name, stores))


def add_members(truths: Truths, output: Folder, listed: Relisted, split: str | None) -> None:
    """Add the members of tars, which are known from the tables, and show what is understood then."""
    if listed.resolver.tars:
        truths.add_members(output, listed.resolver, split)
        show(listed)


def show(listed: Relisted) -> None:
    """Log what is understood of the inputs."""
    log.info("what the inputs hold:\n%s", "\n".join(listed.resolver.lines()))


def of_split(split: str | None, rows: pa.Table, splits: Any) -> pa.Array:
    """Return a mask of the images of a split, and of the tars, whose members are of whatever split."""
    if split is None:
        return pa.array(np.ones(len(rows), bool))
    return pc.or_(is_tar(rows), pa.array(splits == SPLIT_NAMES.index(split)))


def require_classes(listed: Relisted, models: Sequence[Model], split: str | None, label_is: str) -> None:
    """Show what is understood of the input, and refuse labels that one of the models does not know.

    Raises:
        InputError: naming the labels, or images that have none.
    """
    # Numbers are those of the first model; the second one is asked for their names.
    asked = models if label_is == "name" else models[:1]
    known, kept = [Classes(model.labels, model.name, label_is=label_is) for model in asked], 0
    for each in listed.source.list_images():
        images = each.batch.filter(pc.invert(is_tar(each.batch)))
        kept += len(each.batch)
        for classes in known:
            if len(images):
                classes.truths(images)
    if not listed.resolver.tars:
        show(listed)
    if not kept:
        log.warning("%s holds no image of the split %s", listed.source.uri, split)
    for classes in known:
        classes.require_known()


def model_of(record: dict[str, Any], chosen: sections.ModelConfig, named: str | None) -> sections.ModelConfig:
    """Return the model that wrote an output as its record has it, with what is asked for otherwise."""
    if named:
        return chosen
    theirs = record["config"].get("model", {})
    if not theirs.get("weights"):  # which would be the name of the model
        theirs = {**theirs, "name": str(record["model"]["name"])}
    known = {field.name: field.default for field in fields(chosen)}
    asked = {name: getattr(chosen, name) for name, default in known.items() if getattr(chosen, name) != default}
    return sections.ModelConfig(**{name: theirs[name] for name in known.keys() & theirs.keys()} | asked)


def withdraw(output: Folder) -> None:
    """Take figures away that are of other images, perhaps, if this run ends before there are new ones."""
    for name in ("metrics.json", "evaluation.html"):
        output.delete(name)


def last_run(output: Folder) -> dict[str, Any]:
    """Return the record of an output's last run; of none, nothing."""
    for name in sorted(output.folders("runs"), reverse=True):
        with suppress(NotFound, ValueError):
            record = json.loads(output.read(f"runs/{name}/run.json"))
            if (
                isinstance(record, dict)
                and {"model", "config"} <= record.keys()
                and record.get("exit_code") != _REFUSED
            ):
                return record
    return {}


def require_columns(output: Folder, columns: Sequence[str]) -> None:
    """Refuse tables that were asked to hold less than what is scored."""
    if lacking := set(READ) - set(labels_with(columns, 1, hashed=True).names):
        raise InputError(
            f"{output.at('labels')} lacks the columns {', '.join(sorted(lacking))}: it was written with output.columns; label "
            "without, or with these among them"
        )


def temperature_of(name: str, stores: Stores) -> float | None:
    """Return the temperature that a trained model directory was calibrated with, None if there is none."""
    if "/" not in name and not name.startswith("."):
        return None
    try:
        found = json.loads(Folder(stores, absolute(name)).read("training.json")).get("temperature")
    except (NotFound, ValueError, AttributeError):
        return None
    return float(found) if isinstance(found, int | float) and found > 0 else None


def score(labels: Labels, truths: Truths, output: Folder) -> tuple[Evaluation, pa.Table]:
    """Hold labels against truths, write `predictions.parquet`, and return the figures and the worst mistakes."""
    model, written, temperature, training_images = labels
    if not len(truths):
        raise InputError("there is not one labelled image in the input")
    console.step("comparing labels and true classes")
    scored, mistakes = Scored(truths, model, temperature, training_images), None
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, PREDICTIONS, compression="zstd") as writer:
        for rows in scored.take(written.folder("labels")):
            tick()
            writer.write_table(rows.select(PREDICTIONS.names).cast(PREDICTIONS))
            mistakes = worst(mistakes, rows, _SHOWN)
    scored.require_all(written)
    output.put("predictions.parquet", sink.getvalue())
    found = Evaluation.of(scored)
    if scored.levels and not found.levels:
        log.warning("%s has no levels of the model's taxonomy: labels alone are scored", written.at("labels"))
    return found, mistakes


def finish(
    output: Folder, chosen: sections.Config, ours: Evaluation, other: Evaluation | None, mistakes: pa.Table
) -> EvaluationSummary:
    """Write the figures and the page, and sum up."""
    from imgbatch.report.evaluation import page

    console.step("computing the figures and the page")
    found, comparison = ours.public(), None
    if other is not None:
        comparison = compared(ours, other)
        found["against"] = {**other.public(), "compared": comparison}
    output.put("evaluation.html", page(ours, other, comparison, pictures(output.stores, chosen, mistakes)).encode())
    output.put("metrics.json", json.dumps(found, indent=1).encode())
    levels = "".join(f", {name} {each.value:.2%}" for name, each in ours.levels.items())
    against = ""
    if other is not None and comparison is not None:
        low, high = comparison["top1"]["interval_95"]
        against = f"; {100 * (ours.top1.value - other.top1.value):+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}) against "
        against += f"{other.scored.model.reference} ({other.seen or NOT_KNOWN})"
    text = (
        f"{counted(found['n'], 'image')} scored: top-1 {ours.top1}{levels}, ECE {ours.calibration.ece.value:.4f}; "
        f"{ours.seen or NOT_KNOWN}{against}: {output.at('evaluation.html')}"
    )
    return EvaluationSummary(output.uri, found, text)


def pictures(stores: Stores, chosen: sections.Config, rows: pa.Table) -> Iterator[tuple[Any, bytes]]:
    """Yield rows with a small JPEG each; they were decoded before, and have not changed since."""
    from PIL import Image

    from imgbatch.decode import Rejected, decode
    from imgbatch.sources.fetch import Fetcher

    for row, fetched in zip(rows.to_pylist(), Fetcher(stores, chosen.fetch, chosen.source)(rows), strict=True):
        sink = io.BytesIO()
        if isinstance(fetched.content, bytes) and fetched.etag == row["etag"]:
            try:
                picture = decode(fetched.content, max_pixels=chosen.decode.max_pixels, short_side=_THUMBNAIL)
                image = Image.fromarray(picture.pixels)
                image.thumbnail((_THUMBNAIL, _THUMBNAIL))
                image.save(sink, "JPEG", quality=80)
            except Rejected:
                pass
        yield row, sink.getvalue()

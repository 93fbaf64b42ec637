"""Effects: one evaluation: label images whose class is known, or read earlier labels; compare, and write the figures.

    python jobs/evaluate.py --input s3://bucket/labelled --model s3://bucket/models/fruit --output s3://bucket/evaluation

The classification job labels the images, into the same output, so that the same command resumes a run that was stopped. With
--labels, the labels of an earlier run are scored.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config import reading, sections
from imgbatch.config.results import GuardConfig
from imgbatch.errors import InputError, UsageError
from imgbatch.evaluation.evaluation import Evaluation, compared
from imgbatch.evaluation.examples import Examples, examples
from imgbatch.evaluation.ground_truth import GroundTruth
from imgbatch.evaluation.inputs import add_members, listed_split, truths_of
from imgbatch.evaluation.label_tables import (
    LabelTables,
    lacks_hashes,
    last_record,
    recorded_model,
    require_columns,
    temperature_of,
)
from imgbatch.evaluation.predictions import PREDICTIONS, LabelReader
from imgbatch.evaluation.training_images import NOT_KNOWN, of_model
from imgbatch.ledger import claims
from imgbatch.models import loading
from imgbatch.models.model import Model
from imgbatch.orchestration import notify
from imgbatch.pipeline import run
from imgbatch.pipeline.preflight import naming_the_output, prepare
from imgbatch.sources import recognise
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute, missing_path
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted

log = logging.getLogger("imgbatch")

_ALL_CLASSES = 1_000


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """The result of an evaluation."""

    output: str
    """The URI of the folder with metrics.json, predictions.parquet and evaluation.html."""
    metrics: Mapping[str, Any]
    """As in `metrics.json`."""
    text: str

    def __str__(self) -> str:
        return self.text


def evaluate(
    config: sections.Config,
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
        split: train, val or test: only the images of this split.
        labels: the output of an earlier run, whose labels are scored; None: a model labels the images.

    Raises:
        ImgbatchError: the run could not be finished; `exit_code` gives the cause.
    """
    with notify.at_end(config.notify, "evaluate", config.output.uri):
        return _evaluate(config, stop, model, against, split, labels)


def _evaluate(
    config: sections.Config,
    stop: StopRequest,
    model: str | None,
    against: str | None,
    split: str | None,
    labels: str | None,
) -> EvaluationSummary:
    """Evaluate as `evaluate` does."""
    if labels and against:
        raise UsageError("--labels runs no model, so there is none to compare with: omit --against or --labels")
    second_config = replace(config, model=sections.ModelConfig(name=against or ""))
    # The labels of the inputs are checked against its classes before the first model starts.
    second = loading.load(second_config.model, Stores(config.storage)) if against else None
    if labels:
        output, truths, tables = existing_labels(config, labels, model, split)
    else:
        truths, tables = new_labels(config, split, stop, second)
        output = tables.output
    ours, reader = score(tables, truths, output)
    chosen = examples(ours.scores, ours.metrics.confusion)
    images = reader.images(tables.output.folder("labels"), chosen.images)
    other = None
    if second is not None:
        below = replace(config.output, uri=output.at("against"))
        _, tables = new_labels(replace(second_config, output=below), split, stop)
        other, _ = score(tables, truths, tables.output)
    return finish(output, config, ours, other, chosen, images, truths.tars)


def new_labels(
    config: sections.Config, split: str | None, stop: StopRequest, against: Model | None = None
) -> tuple[GroundTruth, LabelTables]:
    """Label the images by the classification job; return their true classes and the tables.

    Args:
        against: the second model, which must have all classes too.
    """
    stores, name = Stores(config.storage), config.model.name
    temperature, training_images = temperature_of(name, stores), of_model(name, stores)
    # An evaluation reads all columns. The hashes identify images that the model was trained on.
    config = replace(config, output=replace(config.output, columns=(), content_hash=True))
    config = replace(config, guard=GuardConfig())  # which are for runs over new images
    if temperature is not None:  # the score before temperature scaling can be computed from all probabilities only
        config = replace(config, top_k=max(config.top_k, _ALL_CLASSES))
    job = prepare(config)
    with naming_the_output(job):
        unhashed = lacks_hashes(job.output)
    if unhashed:  # an output of version 0.1, or of classify.py, is continued in its form
        config = replace(config, output=replace(config.output, content_hash=False))
        job = prepare(config)
    models = [job.model] if against is None else [job.model, against]
    with naming_the_output(job):
        job.output.folders()
        claim = claims.take(job.output, check=job.config.run.check_owner)
    with claim:
        withdraw(job.output)
        with listed_split(job.stores, job.sources, config.source, split, models) as listed:
            log.info("%s", run.run_job(replace(job, sources=[listed.source]), claim, stop, "evaluate"))
            truths = truths_of(listed, job.model, config.source.label_is)
    add_members(truths, job.output, listed, split)
    return truths, LabelTables(job.output, job.model, temperature, training_images)


def existing_labels(
    config: sections.Config, labels: str, model_name: str | None, split: str | None
) -> tuple[Folder, GroundTruth, LabelTables]:
    """Read the labels of an earlier run; return the output for the figures, the true classes, and the tables.

    The model does not run: only its classes and levels are read.

    Args:
        labels: the output of that run.
        model_name: the name or URI of the model; None: as that run recorded it.
    """
    stores = Stores(config.storage)
    if not config.output.uri:
        raise UsageError("no --output: set where the figures are written")
    if missing := missing_path(labels):
        raise InputError(f"--labels {missing}")
    scored = Folder(stores, absolute(labels))
    record = last_record(scored)
    if not (model_name or record):
        raise InputError(f"--labels {scored.uri} is no output of classify.py: it has no runs/ with a run.json")
    if not model_name:
        config = replace(config, model=recorded_model(record, config.model))
    model = loading.load(config.model, stores)
    log.info("model %s", model.summary())
    config = reading.fill_output_template(config, model=model.slug)
    output = Folder(stores, absolute(config.output.uri))
    withdraw(output)
    require_columns(scored, record.get("config", {}).get("output", {}).get("columns", ()))
    sources = recognise.recognise(stores, config.input, config.source)
    with listed_split(stores, sources, config.source, split, [model]) as listed:
        truths = truths_of(listed, model, config.source.label_is)
    add_members(truths, scored, listed, split)
    name = config.model.name
    return output, truths, LabelTables(scored, model, temperature_of(name, stores), of_model(name, stores))


def withdraw(output: Folder) -> None:
    """Delete the figures of an earlier evaluation, which would be out of date if this run failed."""
    for name in ("metrics.json", "evaluation.html"):
        output.delete(name)


def score(tables: LabelTables, truths: GroundTruth, output: Folder) -> tuple[Evaluation, LabelReader]:
    """Compare labels with true classes, write `predictions.parquet`, and return the figures and the reader of the labels."""
    if not len(truths):
        raise InputError("the input has no labelled image")
    console.step("comparing labels and true classes")
    reader, content = LabelReader(truths, tables.model, tables.temperature, tables.training_images), io.BytesIO()
    with pq.ParquetWriter(content, PREDICTIONS, compression="zstd") as writer:
        for rows in reader.take(tables.output.folder("labels")):
            tick()
            writer.write_table(rows.cast(PREDICTIONS))
    reader.require_all(tables.output)
    output.put("predictions.parquet", content.getvalue())
    evaluation = Evaluation.of(reader)
    if evaluation.scores.levels and not evaluation.metrics.levels:
        log.warning("%s has no levels of the model's taxonomy: labels alone are scored", tables.output.at("labels"))
    return evaluation, reader


def finish(
    output: Folder,
    config: sections.Config,
    ours: Evaluation,
    other: Evaluation | None,
    chosen: Examples,
    images: pa.Table,
    tars: Collection[str],
) -> EvaluationSummary:
    """Write the figures and the page, and return the summary.

    Args:
        images: the URIs and versions of the chosen images.
        tars: the URIs of the tars among the inputs.
    """
    from imgbatch.report.evaluation import page
    from imgbatch.report.parts import shown
    from imgbatch.report.pictures import of_listing

    console.step("computing the figures and the page")
    figures, comparison = ours.public(), None
    if other is not None:
        comparison = compared(ours, other)
        figures["against"] = {**other.public(), "compared": comparison}
    shown_images = shown(
        chosen.images.tolist(), images["uri"].to_pylist(), of_listing(output.stores, config, images, tars)
    )
    output.put("evaluation.html", page(ours, other, comparison, chosen, shown_images).encode())
    output.put("metrics.json", json.dumps(figures, indent=1).encode())
    return EvaluationSummary(output.uri, figures, summary(output, ours, other, comparison))


def summary(output: Folder, ours: Evaluation, other: Evaluation | None, comparison: Mapping[str, Any] | None) -> str:
    """Return the line that an evaluation ends with."""
    metrics, against = ours.metrics, ""
    levels = "".join(f", {name} {estimate.value:.2%}" for name, estimate in metrics.levels.items())
    if other is not None and comparison is not None:
        low, high = comparison["top1"]["interval_95"]
        points = 100 * (metrics.top1.value - other.metrics.top1.value)
        against = f"; {points:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}) against {other.model.reference} "
        against += f"({other.seen or NOT_KNOWN})"
    return (
        f"{counted(metrics.n, 'image')} scored: top-1 {metrics.top1}{levels}, ECE {metrics.calibration.ece.value:.4f}; "
        f"{ours.seen or NOT_KNOWN}{against}: {output.at('evaluation.html')}"
    )

"""Effects: `verify --sample`: comparison of random rows with the current results of the model for their images."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.config import sections
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import AuditError, InputError, ModelError, Unreachable, UsageError
from imgbatch.evaluation import metrics
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.fingerprint import DEFAULTS, differences
from imgbatch.ledger.part_file import Footer
from imgbatch.models import loading
from imgbatch.models.model import Model
from imgbatch.storage.stores import Folder
from imgbatch.verification.comparison import Row, RowComparison, SampleResult, skip_reason, widened_tolerance
from imgbatch.verification.file_checks import record_of
from imgbatch.verification.relabel import PART, Reservoir, Task, as_listing, relabel

log = logging.getLogger("imgbatch")

_SHOWN = 5
_MAX_RECORDS = 20
"""Number of runs, newest first, whose records are read for their number format."""
_STORE_REASONS = ("unreachable", "timeout", "forbidden")


class Sample:
    """Draws rows while the parts of labels/ are read, and then compares them."""

    def __init__(self, output: Folder, config: sections.Config, model: str | None, size: int, seed: int) -> None:
        """Prepare to draw.

        Args:
            model: the current name or URI of the model of the output; None: as recorded.
            size: number of rows.
        """
        self._output, self._config, self._model_name, self._seed = output, config, model, seed
        self._reservoir = Reservoir(size, seed)

    def add_part(self, log: Log, number: int, file: pq.ParquetFile, footer: Footer) -> None:
        """Draw from the rows of a part."""
        self._reservoir.add_part(log, number, file, footer)

    def compare(self, fingerprint: Mapping[str, Any], record: Mapping[str, Any]) -> str:
        """Label the drawn images again; return the result as a sentence.

        Args:
            fingerprint: of the output.
            record: the run.json of the run that `_SUCCESS` names.

        Raises:
            AuditError: labels are wrong; the message names the first few.
            InputError: no image could be compared.
            UsageError: the output's model cannot be loaded, or its tables lack the columns that are compared.
        """
        rows = self._reservoir.rows()
        if not len(rows):
            return "sample: labels/ has no row to compare"
        if not {"label", "label_id"} & set(rows.column_names):
            raise UsageError(
                f"{self._output.at('labels')} has neither label nor label_id (output.columns), which are compared"
            )
        config = original_config(self._config, self._model_name, fingerprint, record)
        model = load_original_model(self._output, config.model, fingerprint, is_named=bool(self._model_name))
        config, exact = with_recorded_format(config, self._records(rows, record))
        log.info("labelling %s images again with %s", f"{len(rows):,}", model.reference)
        by_format = (record.get("config") or {}).get("source", {}).get("format") == "parquet"
        images = as_listing(rows, parquet=by_format)
        task = Task(
            self._output.stores,
            self._output,
            WorkerConfig.of(config),
            config.model,
            model.digest,
            config.cluster.stall_timeout_s,
        )
        comparison = RowComparison(model.labels, config.answer.min_score)
        result = self._compare(comparison, task, rows.to_pylist(), images, exact=exact)
        return self._summary(result, model)

    def _records(self, rows: pa.Table, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the records of the newest runs that wrote drawn rows; an empty one if runs are omitted."""
        if "run_id" not in rows.column_names:
            return [{}]
        ids = sorted(run_id for run_id in rows["run_id"].unique().to_pylist() if run_id)
        records = [
            record if run_id == record.get("run_id") else record_of(self._output, run_id)
            for run_id in ids[-_MAX_RECORDS:]
        ]
        return records if len(ids) <= _MAX_RECORDS else [{}, *records]

    def _compare(
        self,
        comparison: RowComparison,
        task: Task,
        rows: list[dict[str, Any]],
        images: pa.Table,
        *,
        exact: bool,
    ) -> SampleResult:
        current = relabel(task, images)
        result = SampleResult(drawn=len(rows))
        differences: dict[int, str] = {}
        for at, row in enumerate(rows):
            if at not in current:
                result.skipped["crashed"] += 1
            elif reason := skip_reason(row, current[at]):
                result.skipped[reason] += 1
            else:
                result.compared += 1
                if difference := comparison.difference(row, current[at]):
                    differences[at] = difference
        if differences and not exact:
            doubtful = images.take(pa.array(list(differences)))
            differences = self._recheck(comparison, task, rows, doubtful, current, differences)
        result.differences = [(rows[at], difference) for at, difference in differences.items()]
        return result

    @staticmethod
    def _recheck(
        comparison: RowComparison,
        task: Task,
        rows: list[dict[str, Any]],
        images: pa.Table,
        current: Mapping[int, Row],
        differences: Mapping[int, str],
    ) -> dict[int, str]:
        """Label images again in another number format; return the differences that rounding does not explain.

        Correct rows that were computed in 16 bits may differ from the results of this machine. A row counts as right if it
        agrees with the result in one of the two formats, with a tolerance for this image.
        """
        other_config = replace(task.config, classify=other_format(task.config.classify))
        recomputed = relabel(replace(task, config=other_config), images)
        remaining = {}
        for at, difference in differences.items():
            if at in recomputed and skip_reason(rows[at], recomputed[at]) is None:
                tolerance = widened_tolerance(current[at], recomputed[at])
                if not all(comparison.difference(rows[at], row, tolerance) for row in (current[at], recomputed[at])):
                    continue
            remaining[at] = difference
        return remaining

    def _summary(self, result: SampleResult, model: Model) -> str:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.skipped.items()))
        drawn = (
            f"sample: {result.drawn:,} of {self._reservoir.row_count:,} labels drawn (--seed {self._seed}), "
            f"{result.compared:,} compared"
            f"{f', {result.skipped.total():,} skipped ({skipped})' if skipped else ''}"
        )
        if not result.compared:
            text = f"{drawn}: the labels could not be checked"
            if set(result.skipped) <= set(_STORE_REASONS):
                raise Unreachable(f"{text}; fix the access to the images, then run the same command again")
            raise InputError(f"{text}, since all images have changed or are missing")
        if result.differences:
            raise AuditError(f"{drawn}, {self._describe_differences(result, model)}")
        if result.compared == self._reservoir.row_count:
            return f"{drawn}, none wrong: these are all labels"
        return (
            f"{drawn}, none wrong: if more than {result.max_undetected():.2%} of the labels were wrong, this would have been "
            "found with 95 % probability"
        )

    def _describe_differences(self, result: SampleResult, model: Model) -> str:
        wrong = len(result.differences)
        proportion = metrics.proportion_of(wrong, result.compared)
        shown = "\n- ".join(f"{row['uri']}: {text} ({row[PART]})" for row, text in result.differences[:_SHOWN])
        suffix = f"\n- … and {wrong - _SHOWN:,} more" if wrong > _SHOWN else ""
        parts = Counter(row[PART] for row, _ in result.differences)
        return (
            f"{wrong:,} differ from the current result of {model.reference}, that is {proportion} of the labels with 95 % "
            f"probability:\n- {shown}{suffix}\nThey are in {len(parts):,} parts. Move these away and run the same classify.py "
            "command again, which labels their images again; or label all into an --output of its own"
        )


def original_config(
    config: sections.Config, model: str | None, fingerprint: Mapping[str, Any], record: Mapping[str, Any]
) -> sections.Config:
    """Return the config that labels images as those of the output were labelled.

    Args:
        config: options that the user gave to `verify`.
        model: the current name or URI of the model; None: as recorded.
        fingerprint: of the output.
        record: the run.json of the run that `_SUCCESS` names.

    Raises:
        UsageError: neither the record nor `model` names the model.
    """
    recorded = record.get("config") or {}
    if not (model or (record.get("model") and recorded)):
        raise UsageError("the run.json of the run that _SUCCESS names is missing: name its model with --model")
    model_options = {**recorded.get("model", {})}
    if record.get("model") and not model_options.get("weights"):
        model_options["name"] = str(record["model"]["name"])
    defaults = {option.name: option.default for option in fields(config.model)}
    options = {name: getattr(config.model, name) for name in defaults if getattr(config.model, name) != defaults[name]}
    # Options that were added or removed since are ignored; those that the user gives take precedence.
    merged = {name: model_options[name] for name in defaults.keys() & model_options.keys()}
    merged = {name: value for name, value in merged.items() if value is not None} | options
    merged |= {"name": model} if model else {}
    merged |= {name: tuple(merged[name]) for name in ("mean", "std") if name in merged}
    max_bytes = max(config.fetch.max_bytes, recorded.get("fetch", {}).get("max_bytes", 0))
    max_pixels = max(config.decode.max_pixels, recorded.get("decode", {}).get("max_pixels", 0))
    device = config.cluster.device if config.cluster.device == "cuda" else "cpu"
    image_column = fingerprint.get("source.image_column") or config.source.image_column
    return replace(
        config,
        top_k=max(2, int(_value(fingerprint, "top_k"))),
        model=sections.ModelConfig(**merged),
        answer=sections.AnswerConfig(min_score=float(_value(fingerprint, "answer.min_score"))),
        output=sections.OutputConfig(),
        source=replace(config.source, image_column=image_column),
        fetch=replace(config.fetch, max_bytes=max_bytes),
        decode=replace(config.decode, max_pixels=max_pixels),
        cluster=replace(config.cluster, device=device),
    )


def load_original_model(
    output: Folder, config: sections.ModelConfig, fingerprint: Mapping[str, Any], *, is_named: bool
) -> Model:
    """Return the model that wrote an output.

    Args:
        config: the model's options, see `original_config`.
        fingerprint: of the output.
        is_named: whether the user named the model.

    Raises:
        ModelError: it cannot be loaded, or it is another one.
    """
    try:
        model = loading.load(config, output.stores)
    except ModelError as error:
        hint = "" if is_named else "; if the model has moved, give its current location with --model"
        raise ModelError(f"{error}{hint}") from error
    loaded = model.fingerprint()
    if different := differences({key: fingerprint.get(key) for key in loaded}, loaded):
        shown = "; ".join(
            f"{key}: {output_value} there, {model_value} here" for key, (output_value, model_value) in different.items()
        )
        raise ModelError(
            f"{model.reference} is not the model that wrote the labels of {output.uri} ({shown}): give that model with "
            "--model, and the keys model.* of that run"
        )
    return model


def _value(fingerprint: Mapping[str, Any], key: str) -> Any:
    value = fingerprint.get(key)
    return DEFAULTS[key] if value is None else value


def with_recorded_format(config: sections.Config, records: list[Mapping[str, Any]]) -> tuple[sections.Config, bool]:
    """Return the config with the runtime and number format of the newest of these runs, if it was on CPUs, else float32.

    The second value is whether all probabilities were and are computed in float32, so that they have to be equal within the
    tolerance.
    """
    with_dtype = [record for record in records if record.get("dtype")]
    classify = config.classify
    if classify.dtype == "auto":
        classify = replace(classify, dtype="float32")
        if with_dtype and with_dtype[-1].get("device") == "cpu" and config.cluster.device != "cuda":
            newest = with_dtype[-1]
            runtime = str(newest.get("runtime", "")).partition(" ")[0]
            is_usable = classify.runtime == "auto" and runtime in get_args(sections.RuntimeName)
            recorded: Any = {"dtype": newest["dtype"], "runtime": runtime if is_usable else classify.runtime}
            classify = replace(classify, **recorded)
    used = {classify.dtype, *(str(record.get("dtype")) for record in records)}
    return replace(config, classify=classify), used == {"float32"}


def other_format(classify: sections.ClassifyConfig) -> sections.ClassifyConfig:
    """Return options with another number format: bfloat16 in torch, which every processor supports, or else float32."""
    is_bfloat16_in_torch = (classify.dtype, classify.runtime) == ("bfloat16", "torch")
    return replace(classify, dtype="float32" if is_bfloat16_in_torch else "bfloat16", runtime="torch")

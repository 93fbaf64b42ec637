"""Effects: `verify --sample`: rows drawn at random are compared with what the model returns for their images now."""

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
            model: where the model of the output is now; None: where it was then.
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
            return "sample: labels/ holds no row, so that there is nothing to compare"
        if not {"label", "label_id"} & set(rows.column_names):
            raise UsageError(
                f"{self._output.at('labels')} has neither label nor label_id (output.columns): nothing to compare"
            )
        config = original_config(self._config, self._model_name, fingerprint, record)
        model = self._load_model(config.model, fingerprint)
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

    def _load_model(self, config: sections.ModelConfig, fingerprint: Mapping[str, Any]) -> Model:
        """Return the model of the output.

        Raises:
            ModelError: it cannot be loaded, or it is another one.
        """
        try:
            model = loading.load(config, self._output.stores)
        except ModelError as error:
            hint = "" if self._model_name else "; if the model is elsewhere now, give its place with --model"
            raise ModelError(f"{error}{hint}") from error
        ours = model.fingerprint()
        if different := differences({key: fingerprint.get(key) for key in ours}, ours):
            shown = "; ".join(f"{key}: {theirs} there, {here} here" for key, (theirs, here) in different.items())
            raise ModelError(
                f"{model.reference} is not the model that made the labels of {self._output.uri} ({shown}): give that one with "
                "--model, and the keys model.* that it was used with"
            )
        return model

    def _records(self, rows: pa.Table, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the records of the newest runs that wrote drawn rows; an empty one stands for those that are omitted."""
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
        now = relabel(task, images)
        result = SampleResult(drawn=len(rows))
        differences: dict[int, str] = {}
        for at, row in enumerate(rows):
            if at not in now:
                result.skipped["crashed"] += 1
            elif reason := skip_reason(row, now[at]):
                result.skipped[reason] += 1
            else:
                result.compared += 1
                if difference := comparison.difference(row, now[at]):
                    differences[at] = difference
        if differences and not exact:
            doubtful = images.take(pa.array(list(differences)))
            differences = self._recheck(comparison, task, rows, doubtful, now, differences)
        result.differences = [(rows[at], difference) for at, difference in differences.items()]
        return result

    @staticmethod
    def _recheck(
        comparison: RowComparison,
        task: Task,
        rows: list[dict[str, Any]],
        images: pa.Table,
        now: Mapping[int, Row],
        differences: Mapping[int, str],
    ) -> dict[int, str]:
        """Label images again in another number format; return the differences that rounding does not explain.

        Rows that were computed in 16 bits may differ from what this machine computes although nothing is wrong with them. A
        row counts as right if it agrees with the result in one of the two formats, with a tolerance for this very image.
        """
        other = replace(task.config, classify=other_format(task.config.classify))
        recomputed = relabel(replace(task, config=other), images)
        remaining = {}
        for at, difference in differences.items():
            if at in recomputed and skip_reason(rows[at], recomputed[at]) is None:
                tolerance = widened_tolerance(now[at], recomputed[at])
                if not all(comparison.difference(rows[at], row, tolerance) for row in (now[at], recomputed[at])):
                    continue
            remaining[at] = difference
        return remaining

    def _summary(self, result: SampleResult, model: Model) -> str:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.skipped.items()))
        drawn = (
            f"sample: {result.drawn:,} of {self._reservoir.seen:,} labels drawn (--seed {self._seed}), "
            f"{result.compared:,} compared"
            f"{f', {result.skipped.total():,} skipped ({skipped})' if skipped else ''}"
        )
        if not result.compared:
            text = f"{drawn}: nothing is known of the labels"
            if set(result.skipped) <= set(_STORE_REASONS):
                raise Unreachable(f"{text}; fix the access to the images, then run the same command again")
            raise InputError(f"{text}, since no image is as it was when it was labelled")
        if result.differences:
            raise AuditError(f"{drawn}, {self._describe_differences(result, model)}")
        if result.compared == self._reservoir.seen:
            return f"{drawn}, none wrong: these are all labels"
        return (
            f"{drawn}, none wrong: if more than {result.max_undetected():.2%} of the labels were wrong, this would have been "
            "found with 95 % probability"
        )

    def _describe_differences(self, result: SampleResult, model: Model) -> str:
        wrong = len(result.differences)
        proportion = metrics.proportion_of(wrong, result.compared)
        shown = "\n- ".join(f"{row['uri']}: {text} ({row[PART]})" for row, text in result.differences[:_SHOWN])
        more = f"\n- … and {wrong - _SHOWN:,} more" if wrong > _SHOWN else ""
        parts = Counter(row[PART] for row, _ in result.differences)
        return (
            f"{wrong:,} not what {model.reference} says now, that is {proportion} of the labels with 95 % probability:\n- "
            f"{shown}{more}\nThey are in {len(parts):,} parts. Move these away and run the same classify.py command again, "
            "which labels their images again; or label all into an --output of its own"
        )


def original_config(
    config: sections.Config, model: str | None, fingerprint: Mapping[str, Any], record: Mapping[str, Any]
) -> sections.Config:
    """Return the config with which images are labelled as the output's were.

    Args:
        config: options that the user gave to `verify`.
        model: where the model is now; None: where it was then.
        fingerprint: of the output.
        record: the run.json of the run that `_SUCCESS` names.

    Raises:
        UsageError: neither the record nor `model` names the model.
    """
    recorded = record.get("config") or {}
    if not (model or (record.get("model") and recorded)):
        raise UsageError(
            "the run.json of the run that _SUCCESS names is not there: say with --model which model it was"
        )
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
            same = (
                runtime
                if classify.runtime == "auto" and runtime in get_args(sections.RuntimeName)
                else classify.runtime
            )
            recorded: Any = {"dtype": newest["dtype"], "runtime": same}
            classify = replace(classify, **recorded)
    used = {classify.dtype, *(str(record.get("dtype")) for record in records)}
    return replace(config, classify=classify), used == {"float32"}


def other_format(classify: sections.ClassifyConfig) -> sections.ClassifyConfig:
    """Return the options for bfloat16 in torch, which every processor can do; if these are given, for float32."""
    same = (classify.dtype, classify.runtime) == ("bfloat16", "torch")
    return replace(classify, dtype="float32" if same else "bfloat16", runtime="torch")

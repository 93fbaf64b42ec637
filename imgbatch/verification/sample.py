"""Effects: `verify --sample`: rows drawn at random are held against what the model says of their images now."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.config import sections
from imgbatch.errors import BooksError, InputError, ModelError, Unreachable, UsageError
from imgbatch.evaluation import metrics
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.fingerprint import DEFAULTS, differences
from imgbatch.ledger.part_file import Footer
from imgbatch.models import loading
from imgbatch.models.model import Model
from imgbatch.storage.stores import Folder
from imgbatch.verification.agreement import Judge, Outcome, Row, skipped
from imgbatch.verification.file_checks import record_of
from imgbatch.verification.relabel import PART, Reservoir, Task, label_again, listed

log = logging.getLogger("imgbatch")

_SHOWN = 5
_RECORDS = 20  # of the newest runs among those that made drawn rows, whose number format is looked up
_OF_THE_STORE = ("unreachable", "timeout", "forbidden")


class Sample:
    """Draws while the parts pass by, and compares when all of them have."""

    def __init__(self, output: Folder, chosen: sections.Config, named: str | None, size: int, seed: int) -> None:
        self._output, self._chosen, self._named, self._seed = output, chosen, named, seed
        self._reservoir = Reservoir(size, seed)

    def take(self, log: Log, number: int, file: pq.ParquetFile, footer: Footer) -> None:
        """Let a part pass by."""
        self._reservoir.take(log, number, file, footer)

    def compare(self, fingerprint: Mapping[str, Any], record: Mapping[str, Any]) -> str:
        """Label the drawn images again; return what that came to, as a sentence.

        Raises:
            BooksError: labels are wrong, naming the first few.
            InputError: not one image could be compared.
            UsageError: the output's model is not to be had, or its tables do not hold what is compared.
        """
        rows = self._reservoir.rows()
        if not len(rows):
            return "sample: labels/ holds no row, so that there is nothing to compare"
        if not {"label", "label_id"} & set(rows.column_names):
            raise UsageError(
                f"{self._output.at('labels')} has neither label nor label_id (output.columns): nothing to compare"
            )
        chosen = restored(self._chosen, self._named, fingerprint, record)
        model = self._model(chosen.model, fingerprint)
        chosen, exact = in_the_format_of(chosen, self._records(rows, record))
        log.info("labelling %s images again with %s", f"{len(rows):,}", model.reference)
        by_format = (record.get("config") or {}).get("source", {}).get("format") == "parquet"
        images = listed(rows, parquet=by_format)
        task = Task(self._output.stores, self._output, chosen, model.digest, isolated=False)
        judge = Judge(model.labels, chosen.answer.min_score)
        found = self._judged(judge, task, rows.to_pylist(), images, exact=exact)
        return self._said(found, model)

    def _model(self, chosen: sections.ModelConfig, fingerprint: Mapping[str, Any]) -> Model:
        """Return the model of the output.

        Raises:
            ModelError: it is not to be had, or it is another one.
        """
        try:
            model = loading.load(chosen, self._output.stores)
        except ModelError as error:
            hint = "" if self._named else "; if the model lies elsewhere now, say where with --model"
            raise ModelError(f"{error}{hint}") from error
        ours = model.fingerprint()
        if different := differences({key: fingerprint.get(key) for key in ours}, ours):
            shown = "; ".join(f"{key}: {there} there, {here} here" for key, (there, here) in different.items())
            raise ModelError(
                f"{model.reference} is not the model that made the labels of {self._output.uri} ({shown}): give that one with "
                "--model, and the keys model.* that it was used with"
            )
        return model

    def _records(self, rows: pa.Table, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the records of the newest runs that made drawn rows."""
        if "run_id" not in rows.column_names:
            return [{}]
        ids = sorted(each for each in rows["run_id"].unique().to_pylist() if each)
        records = [
            record if each == record.get("run_id") else record_of(self._output, each) for each in ids[-_RECORDS:]
        ]
        return records if len(ids) <= _RECORDS else [{}, *records]

    def _judged(
        self,
        judge: Judge,
        task: Task,
        rows: list[dict[str, Any]],
        images: pa.Table,
        *,
        exact: bool,
    ) -> Outcome:
        now = label_again(task, images)
        outcome = Outcome(drawn=len(rows))
        doubtful: dict[int, str] = {}
        for at, row in enumerate(rows):
            if at not in now:
                outcome.skipped["crashed"] += 1
            elif reason := skipped(row, now[at]):
                outcome.skipped[reason] += 1
            else:
                outcome.compared += 1
                if fault := judge.fault(row, now[at]):
                    doubtful[at] = fault
        if doubtful and not exact:
            doubtful = self._second_opinion(judge, task, rows, images.take(pa.array(list(doubtful))), now, doubtful)
        outcome.faults = [(rows[at], fault) for at, fault in doubtful.items()]
        return outcome

    @staticmethod
    def _second_opinion(
        judge: Judge,
        task: Task,
        rows: list[dict[str, Any]],
        images: pa.Table,
        now: Mapping[int, Row],
        doubtful: Mapping[int, str],
    ) -> dict[int, str]:
        """Label images whose rows were made in 16 bits, perhaps, in another number format; return the faults that remain."""
        again = label_again(replace(task, config=in_another_format(task.config)), images)
        left = {}
        for at, fault in doubtful.items():
            if at in again and skipped(rows[at], again[at]) is None:
                width = judge.widened(now[at], again[at])
                if not all(judge.fault(rows[at], answer, width) for answer in (now[at], again[at])):
                    continue
            left[at] = fault
        return left

    def _said(self, found: Outcome, model: Model) -> str:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.skipped.items()))
        drawn = (
            f"sample: {found.drawn:,} of {self._reservoir.seen:,} labels drawn (--seed {self._seed}), "
            f"{found.compared:,} compared"
            f"{f', {found.skipped.total():,} skipped ({left_out})' if left_out else ''}"
        )
        if not found.compared:
            text = f"{drawn}: nothing is known of the labels"
            if set(found.skipped) <= set(_OF_THE_STORE):
                raise Unreachable(f"{text}; mend the access to the images, then run the same command again")
            raise InputError(f"{text}, since no image is as it was when it was labelled")
        if found.faults:
            raise BooksError(f"{drawn}, {self._faults(found, model)}")
        if found.compared == self._reservoir.seen:
            return f"{drawn}, none wrong: these are all labels"
        return (
            f"{drawn}, none wrong: if more than {found.bound():.2%} of the labels were wrong, this would have been found "
            "with 95 % probability"
        )

    def _faults(self, found: Outcome, model: Model) -> str:
        wrong = len(found.faults)
        share = metrics.proportion(wrong, found.compared)
        shown = "\n- ".join(f"{row['uri']}: {fault} ({row[PART]})" for row, fault in found.faults[:_SHOWN])
        more = f"\n- … and {wrong - _SHOWN:,} more" if wrong > _SHOWN else ""
        parts = Counter(row[PART] for row, _ in found.faults)
        return (
            f"{wrong:,} not what {model.reference} says now, that is {share} of the labels with 95 % probability:\n- "
            f"{shown}{more}\nThey lie in {len(parts):,} parts. Move these away and run the same classify.py command again, "
            "which labels their images again; or label all into an --output of its own"
        )


def restored(
    chosen: sections.Config, named: str | None, fingerprint: Mapping[str, Any], record: Mapping[str, Any]
) -> sections.Config:
    """Return the config in which images are labelled as the output's were.

    Raises:
        UsageError: no record says which model that was, and --model does not either.
    """
    then = record.get("config") or {}
    if not (named or (record.get("model") and then)):
        raise UsageError(
            "the run.json of the run that _SUCCESS names is not there: say with --model which model it was"
        )
    theirs = {**then.get("model", {})}
    if record.get("model") and not theirs.get("weights"):
        theirs["name"] = str(record["model"]["name"])
    known = {each.name: each.default for each in fields(chosen.model)}
    asked = {name: getattr(chosen.model, name) for name in known if getattr(chosen.model, name) != known[name]}
    merged = {name: theirs[name] for name in known.keys() & theirs.keys() if theirs[name] is not None} | asked
    merged |= {"name": named} if named else {}
    merged |= {name: tuple(merged[name]) for name in ("mean", "std") if name in merged}
    limits = {
        "max_bytes": max(chosen.fetch.max_bytes, then.get("fetch", {}).get("max_bytes", 0)),
        "max_pixels": max(chosen.decode.max_pixels, then.get("decode", {}).get("max_pixels", 0)),
    }
    device = chosen.cluster.device if chosen.cluster.device == "cuda" else "cpu"
    return replace(
        chosen,
        top_k=max(2, int(_value(fingerprint, "top_k"))),
        model=sections.ModelConfig(**merged),
        answer=sections.AnswerConfig(min_score=float(_value(fingerprint, "answer.min_score"))),
        output=sections.OutputConfig(),
        source=replace(
            chosen.source, image_column=fingerprint.get("source.image_column") or chosen.source.image_column
        ),
        fetch=replace(chosen.fetch, max_bytes=limits["max_bytes"]),
        decode=replace(chosen.decode, max_pixels=limits["max_pixels"]),
        cluster=replace(chosen.cluster, device=device),
    )


def _value(fingerprint: Mapping[str, Any], key: str) -> Any:
    value = fingerprint.get(key)
    return DEFAULTS[key] if value is None else value


def in_the_format_of(chosen: sections.Config, records: list[Mapping[str, Any]]) -> tuple[sections.Config, bool]:
    """Return the config with the runtime and number format of the newest of these runs, if that was on CPUs, else in 32 bits.

    And whether probabilities have to be equal within the tolerance, since all of them were computed in 32 bits.
    """
    told = [record for record in records if record.get("dtype")]
    classify = chosen.classify
    if classify.dtype == "auto":
        classify = replace(classify, dtype="float32")
        if told and told[-1].get("device") == "cpu" and chosen.cluster.device != "cuda":
            runtime = str(told[-1].get("runtime", "")).partition(" ")[0]
            same = runtime if classify.runtime == "auto" and runtime in ("torch", "openvino") else classify.runtime
            recorded: Any = {"dtype": told[-1]["dtype"], "runtime": same}
            classify = replace(classify, **recorded)
    used = {classify.dtype, *(str(record.get("dtype")) for record in records)}
    return replace(chosen, classify=classify), used == {"float32"}


def in_another_format(chosen: sections.Config) -> sections.Config:
    """Return the config with bfloat16 in torch, which every processor can do; in place of that itself, with 32 bits."""
    same = (chosen.classify.dtype, chosen.classify.runtime) == ("bfloat16", "torch")
    classify = replace(chosen.classify, dtype="float32" if same else "bfloat16", runtime="torch")
    return replace(chosen, classify=classify)

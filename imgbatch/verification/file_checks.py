"""Effects: the checks of `verify` on the files of an output in addition to the counts: fingerprints, nulls, values, foreign
files, seals.

They cost no request: the audit reads each part completely, and `CheckedLog` inspects these bytes. Memory: a few hundred bytes
per class, and nothing per row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.errors import AuditError, NotFound, OutputError
from imgbatch.ledger import audit
from imgbatch.ledger.audit import AuditResult
from imgbatch.ledger.commit_log import Log, is_hidden
from imgbatch.ledger.fingerprint import differences
from imgbatch.ledger.part_file import Footer
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.schema import CONTENT_HASH, labels_with, single_chunk
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import hash_strings
from imgbatch.verification.findings import Findings, RowProblem

_SHOWN = 3
_NEVER_NULL = {
    LABELS_LOG: ("uri", "label", "label_id", "score", "width", "height", CONTENT_HASH, "run_id", "model"),
    REJECTS_LOG: ("uri", "stage", "reason", "passing", "attempts", "run_id", "model"),
}
_VALUES = re.compile(r"label|label_id|score|model|top_k\..+\.label_id")
"""The Parquet columns of labels/ that are read. Statistics show neither NaN nor which values are in one row."""
_FOOTER_FILES = ("_metadata", "_common_metadata")
"""Files that list row groups. Some readers, such as Dask, read these row groups instead of those in the folder."""
_MAX_CLASSES = 10_000_000
"""A larger id is reported as impossible: an array with one entry per id would take too much memory."""
_NO_HASH = np.uint64(1)
_DIGEST = 12
"""Characters of the digest in `Model.reference`."""

Inspect = Callable[["CheckedLog", int, pq.ParquetFile, Footer], None]


class CheckedLog(Log):
    """A log that inspects its parts as they are read. Foreign files are collected; in a plain `Log` they are an error."""

    def __init__(self, folder: Folder, numbers: Sequence[int], inspect: Inspect) -> None:
        super().__init__(folder, numbers)
        self.name = folder.uri.rpartition("/")[2]
        self.foreign_files: list[str] = []
        self.last: tuple[int, Footer] | None = None
        self._seals: set[str] = set()
        self._inspect = inspect

    def refuse_foreign(self, names: Any) -> None:
        """Collect the names of files that readers of the folder, or of `*.parquet` in it, would read."""
        self.foreign_files = [name for name in names if not is_hidden(name) or _is_read_by_name(name)]

    def inspect(self, number: int, data: bytes, footer: Footer) -> None:
        """Inspect a part.

        Raises:
            OutputError: it is damaged.
        """
        self.last = number, footer
        if footer.seal:
            self._seals.add(footer.run_id)
        try:
            self._inspect(self, number, pq.ParquetFile(pa.BufferReader(data)), footer)
        except (pa.ArrowException, OSError) as error:
            raise OutputError(f"{self.uri(number)} is damaged ({error}): move it away, then run again") from error

    def seal_problem(self, run_id: str | None) -> str | None:
        """Return the problem with the seal of this run, None if there is none. Only seals of later runs may follow it."""
        if self.last is not None and self.last[1].seal and run_id in self._seals:
            return None
        end = f"its last part is {self.uri(self.last[0])}" if self.last is not None else "it has no part"
        return (
            f"{self.folder.uri} is not sealed: _SUCCESS names the seal of run {run_id or 'none'}, and {end}, so that a late "
            "write of a killed run could still add rows; run the same classify.py command again, which seals the tables"
        )

    def foreign_problem(self) -> str | None:
        """Return a message about foreign files, None if there are none."""
        if not self.foreign_files:
            return None
        shown = ", ".join(self.folder.at(name) for name in self.foreign_files[:_SHOWN])
        has_more = len(self.foreign_files) > _SHOWN
        return (
            f"{shown}{f', … ({len(self.foreign_files):,} in all)' if has_more else ''}: not written by imgbatch, and readers "
            f"of {self.folder.uri} or of *.parquet in it would read it as rows of the table; move it away"
        )


def _is_read_by_name(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.lower().endswith(".parquet") or base in _FOOTER_FILES


@dataclass
class OutputCheck:
    """The checks of a finished output, from its files alone."""

    output: Folder
    success: Mapping[str, Any]
    record: Mapping[str, Any]
    """The run.json of the run that `_SUCCESS` names; empty if there is none."""
    on_labels_part: Inspect | None = None
    """Also called with each part of labels/."""
    findings: Findings = field(default_factory=Findings)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """The fingerprint of the record; without one, the most frequent fingerprint of the parts."""
    _logs: list[CheckedLog] = field(default_factory=list)
    _fingerprints: dict[str, tuple[Mapping[str, Any], RowProblem]] = field(default_factory=dict)
    _rows: dict[str, RowProblem] = field(default_factory=dict)
    _hash_of: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """The hash of the label of each label_id, 0 if no row had it yet."""
    _label_of: dict[int, str] = field(default_factory=dict)
    _id_of: dict[str, int] = field(default_factory=dict)

    def run(self) -> AuditResult:
        """Read both tables and the listing, and check them; return the counts.

        Raises:
            ImgbatchError: there are problems; all of them are listed.
        """
        if isinstance(fingerprint := self.record.get("fingerprint"), dict):
            self.fingerprint = fingerprint
        listing = self.output.folder(f"runs/{self.success['run_id']}/listing")
        limited = self.success.get("limit") is not None
        counts = AuditResult()
        try:
            counts = audit.audit(self.output, listing, limited=limited, log_of=self._log)
            self._check_seals()  # only if both tables could be read completely
            counts.require_reconciled()
            self._compare_counts(counts)
        except (OutputError, AuditError) as error:
            self.findings.add(error)
        self._add_findings()
        self.findings.require_none(self.output.uri)
        return counts

    def _log(self, folder: Folder, numbers: Sequence[int]) -> CheckedLog:
        log = CheckedLog(folder, numbers, self._inspect)
        self._logs.append(log)
        return log

    def _compare_counts(self, counts: AuditResult) -> None:
        recorded = self.success["counts"]
        counted = {name: getattr(counts, name) for name in ("listed", "labelled", "rejected", "kept")}
        different = {name: number for name, number in counted.items() if recorded.get(name) != number}
        wrong = [f"{name}: {recorded.get(name)} recorded, {number} counted" for name, number in different.items()]
        if wrong:
            raise AuditError(
                f"{self.output.at('_SUCCESS')} disagrees with the tables: {'; '.join(wrong)}; run the same "
                "classify.py command again"
            )

    def _check_seals(self) -> None:
        problems = [log.seal_problem(self.success.get("seal")) for log in self._logs]
        self.findings.wrong += [problem for problem in problems if problem]

    def _add_findings(self) -> None:
        self.findings.foreign += [problem for log in self._logs if (problem := log.foreign_problem())]
        self.findings.foreign += self._other_fingerprints()
        remedy = "move these parts away and run the same classify.py command again: their images are labelled again"
        self.findings.wrong += [f"{rows}; {remedy}" for rows in self._rows.values()]

    def _other_fingerprints(self) -> list[str]:
        problems = []
        if not self.fingerprint and self._fingerprints:
            self.fingerprint, _ = max(self._fingerprints.values(), key=lambda pair: pair[1].parts)
        for fingerprint, parts in self._fingerprints.values():
            if different := differences(fingerprint, self.fingerprint):
                shown = "; ".join(
                    f"{key}: {part_value} there, {output_value} elsewhere"
                    for key, (part_value, output_value) in different.items()
                )
                named = ", ".join(parts.examples) + (", …" if parts.parts > len(parts.examples) else "")
                problems.append(
                    f"{named}: {parts.parts} of the parts have another fingerprint than the output ({shown}). Labels of two "
                    "fingerprints do not belong in one table: move these parts away, and run the same classify.py command again"
                )
        return problems

    def _inspect(self, log: CheckedLog, number: int, file: pq.ParquetFile, footer: Footer) -> None:
        key = json.dumps(footer.fingerprint, sort_keys=True)
        self._fingerprints.setdefault(key, (footer.fingerprint, RowProblem("")))[1].add(log.uri(number), 0)
        if not file.metadata.num_rows:
            return
        uri = log.uri(number)
        self._check_nulls(log.name, uri, file, footer)
        if log.name == LABELS_LOG:
            paths = [file.metadata.schema.column(at).path for at in range(file.metadata.num_columns)]
            value_paths = [path for path in paths if _VALUES.fullmatch(path)]
            self._check_values(uri, file.read(columns=value_paths, use_threads=False), footer)
            if self.on_labels_part is not None:
                self.on_labels_part(log, number, file, footer)

    def _check_nulls(self, table: str, uri: str, file: pq.ParquetFile, footer: Footer) -> None:
        present = set(file.schema_arrow.names)
        columns = footer.fingerprint.get("output.columns") or ()
        for name in _NEVER_NULL[table]:
            if name in present:
                if nulls := null_count(file, name):
                    self._add_rows(f"without a value of {name}", uri, nulls)
            elif table == REJECTS_LOG or name in labels_with(columns).names:
                self._add_rows(f"without the column {name}", uri, file.metadata.num_rows)

    def _check_values(self, uri: str, table: pa.Table, footer: Footer) -> None:
        if "score" in table.column_names:
            score = single_chunk(table["score"]).drop_null().to_numpy()
            if outside := int(np.count_nonzero(~((score >= 0) & (score <= 1)))):
                self._add_rows("with a score that is no probability", uri, outside)
        if "label_id" in table.column_names:
            self._check_ids(uri, table)
        weights = footer.fingerprint.get("weights")
        if "model" in table.column_names and isinstance(weights, str):
            models = pc.value_counts(table["model"])
            for count in models.to_pylist():
                if count["values"] is not None and not count["values"].endswith(f"@{weights[:_DIGEST]}"):
                    text = "with another model than the footer of the part has"
                    self._add_rows(text, uri, count["counts"], example=count["values"])

    def _check_ids(self, uri: str, table: pa.Table) -> None:
        """Find impossible ids, ids with two labels and labels with two ids, and ids that are not the first of `top_k`."""
        ids = single_chunk(table["label_id"])
        valid = np.asarray(ids.is_valid())
        numbers = ids.fill_null(0).to_numpy()
        if impossible := int(np.count_nonzero((numbers < 0) | (numbers >= _MAX_CLASSES))):
            self._add_rows("with a label_id that no model has", uri, impossible)
        if "top_k" in table.column_names:
            top = _at_least_one(single_chunk(table["top_k"]))
            if top.null_count:
                self._add_rows("without top_k", uri, top.null_count)
            best = pc.struct_field(pc.list_element(top, 0), "label_id")
            differs = valid & ~np.asarray(pc.fill_null(pc.equal(best, ids), True))
            if differs.any():
                self._add_rows("with a label_id that is not the first of top_k", uri, int(differs.sum()))
        if "label" not in table.column_names:
            return
        is_checked = valid & (numbers >= 0) & (numbers < _MAX_CLASSES) & np.asarray(table["label"].is_valid())
        if not is_checked.any():
            return
        at, labels = numbers[is_checked], single_chunk(table["label"].filter(pa.array(is_checked)))
        hashes = hash_strings(labels)
        if at.max() >= len(self._hash_of):
            self._hash_of = np.concatenate([self._hash_of, np.zeros(int(at.max()) + 1 - len(self._hash_of), np.uint64)])
        self._record_labels(at, labels, hashes)
        wrong = np.flatnonzero(self._hash_of[at] != hashes)
        if len(wrong):
            number, label = int(at[wrong[0]]), labels[int(wrong[0])].as_py()
            example = f"{number} is {label!r} here, {self._label_of[number]!r} elsewhere"
            self._add_rows("with a label that does not belong to its label_id", uri, len(wrong), example=example)

    def _record_labels(self, ids: npt.NDArray[np.int32], labels: pa.Array, hashes: npt.NDArray[np.uint64]) -> None:
        """Record the labels of ids that no earlier row had. A label that another id has is recorded as wrong."""
        new_rows = np.flatnonzero(self._hash_of[ids] == 0)
        _, first_rows = np.unique(ids[new_rows], return_index=True)
        for at in new_rows[first_rows].tolist():
            number, label = int(ids[at]), labels[at].as_py()
            first_id = self._id_of.setdefault(label, number)
            self._label_of[number] = label if first_id == number else f"{label} (of {first_id})"
            self._hash_of[number] = hashes[at] if first_id == number else _NO_HASH

    def _add_rows(self, text: str, uri: str, count: int, *, example: str = "") -> None:
        self._rows.setdefault(text, RowProblem(text)).add(uri, count, example)


def null_count(file: pq.ParquetFile, name: str) -> int:
    """Return the number of nulls in a flat column: from the statistics of its row groups, or else from its values."""
    metadata = file.metadata
    leaf = next(at for at in range(metadata.num_columns) if metadata.schema.column(at).path == name)
    if metadata.schema.column(leaf).max_definition_level == 0:  # the column cannot hold nulls
        return 0
    counts = 0
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(leaf).statistics
        if statistics is None or not statistics.has_null_count:
            return int(file.read(columns=[name], use_threads=False)[name].null_count)
        counts += statistics.null_count
    return counts


def _at_least_one(lists: pa.Array) -> pa.Array:
    """Return lists, with null for empty ones."""
    return pc.if_else(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0), None, lists)


def record_of(output: Folder, run_id: str) -> dict[str, Any]:
    """Return the run.json of a run; empty if it is missing or damaged."""
    try:
        record = json.loads(output.read(f"runs/{run_id}/run.json"))
    except (NotFound, ValueError):
        return {}
    return record if isinstance(record, dict) else {}

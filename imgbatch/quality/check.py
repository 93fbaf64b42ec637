"""Effects: the check before `_SUCCESS`: measures what has changed since the last success, and applies the guards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from imgbatch.config.results import GuardConfig
from imgbatch.config.secrets import masked
from imgbatch.errors import GuardError
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.models.model import Model
from imgbatch.quality.guards import RUNS_OF_SPREAD, Drift, Samples, Violation, measure, violations
from imgbatch.quality.read_rows import count_rows
from imgbatch.quality.reference import LastRows, Reference, accepted_by, find_reference
from imgbatch.quality.row_counts import RowCounts, RunRange
from imgbatch.storage.stores import Folder
from imgbatch.terminal.plurals import counted

log = logging.getLogger("imgbatch")

MIN_REFERENCE = 100
"""A run with fewer labelled images is no reference of its own: its rows are added to the reference before it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check."""

    facts: dict[str, Any]
    """`drift` of run.json."""
    violations: tuple[Violation, ...]
    """The guards that hold the run back."""
    before: RowCounts | None = None
    """Of the reference; None: nothing was compared."""
    judged: RowCounts | None = None
    """Of the rows that were compared with it."""

    @property
    def rows(self) -> Mapping[str, Any] | None:
        """The rows that the next run is compared with, for `_SUCCESS`."""
        rows: Mapping[str, Any] | None = self.facts["rows"]
        return rows

    def require_none(self, run_id: str, record: str) -> None:
        """Require that no guard holds the run back.

        Args:
            run_id: of the run.
            record: the URI of its run.json.

        Raises:
            GuardError: with what has changed, and how to accept it.
        """
        if self.violations:
            found = "; ".join(f"{each.guard}={each.limit:g}: {each.text}" for each in self.violations)
            raise GuardError(
                f"held back by {found}. All rows are kept, and _SUCCESS is not written. Look at `drift` in {record}; if the "
                f"labels are right, run the same command with --set guard.accept={run_id}"
            )


@dataclass(frozen=True, slots=True)
class QualityCheck:
    """The check of one run."""

    output: Folder
    run_id: str
    model: Model
    config: GuardConfig
    retry: str
    """`rejects.retry`"""
    fingerprint: Mapping[str, Any]

    def reference(self, last: Mapping[str, Any]) -> Reference:
        """Return the rows that are judged, and those that they are compared with.

        Args:
            last: the content of the last `_SUCCESS`; empty if no run has succeeded yet.

        Raises:
            ConfigError: `guard.accept` or `guard.reference` cannot be used.
        """
        return find_reference(self.output, last, self.config, self.fingerprint)

    def unchanged(self, last: Mapping[str, Any]) -> Verdict:
        """Return the verdict on a run that has found no new row since the last success. Nothing is read.

        Args:
            last: the content of `_SUCCESS`.
        """
        own = LastRows.of_success(last)
        rows = own.public() if own else None
        facts: dict[str, Any] = {"images": 0, "notes": ["no row is newer than the last success"], "rows": rows}
        return self._verdict(facts, violations(None, 0, self.config))

    def judge(self, last: Mapping[str, Any], part_numbers: Mapping[str, Sequence[int]]) -> Verdict:
        """Return the verdict on all rows that are newer than the last success.

        Args:
            last: the content of the last `_SUCCESS`; empty if no run has succeeded yet.
            part_numbers: the numbers of the parts, by table.
        """
        reference = self.reference(last)
        before, judged = self._count(reference, part_numbers)
        of_last = reference.last or LastRows(RunRange(), transient=0, all_rejects=0)
        new_rejects = of_last.new_among(judged.rejected, judged.transient, self.retry)
        drift = None
        if reference.last is not None and before.rows and judged.rows:
            drift = self._measured(reference, before, judged, new_rejects)
        facts = self._facts(reference, before, judged, drift)
        facts["rows"] = self._next_rows(reference, judged, new_rejects).public()
        limits = self.config
        if reference.accepted is not None:  # these rows are the reference now; `min_images` is about them as well
            facts["accepted"] = {"run_id": reference.accepted, "by": accepted_by(self.config)}
            limits = replace(limits, min_images=None)
        for line in _lines(reference, drift):
            log.info("%s", line)
        verdict = self._verdict(facts, violations(drift, judged.rows, limits))
        return verdict if drift is None else replace(verdict, before=before, judged=judged)

    def _verdict(self, facts: dict[str, Any], found: list[Violation]) -> Verdict:
        facts |= {"held_back": [each.public() for each in found]} if found else {}
        return Verdict(facts, tuple(found))

    def _count(self, reference: Reference, part_numbers: Mapping[str, Sequence[int]]) -> tuple[RowCounts, RowCounts]:
        """Return the counts of the reference, and of the rows that are judged."""
        if reference.last is None:
            # Nothing is compared: labels/ is read only to count its rows.
            tables = (REJECTS_LOG,) if self.config.min_images is None else (LABELS_LOG, REJECTS_LOG)
            return RowCounts(), count_rows(self.output, [reference.judged], part_numbers, tables)[0]
        if reference.output is self.output:
            ranges = [reference.last.runs, reference.judged]
            before, judged = count_rows(self.output, ranges, part_numbers)
            return before, judged
        (before,) = count_rows(reference.output, [reference.last.runs])
        (judged,) = count_rows(self.output, [reference.judged], part_numbers)
        return before, judged

    def _measured(self, reference: Reference, before: RowCounts, judged: RowCounts, new_rejects: int) -> Drift:
        assert reference.last is not None
        new_before = reference.last.new_rejects
        return measure(
            Samples(
                before,
                judged,
                before.rejected if new_before is None else new_before,
                new_rejects,
                levels_of(self.model),
                reference.history,
                reference.other_model,
                reference.same_labels,
                frozenset(self.model.labels),
            )
        )

    def _facts(self, reference: Reference, before: RowCounts, judged: RowCounts, drift: Drift | None) -> dict[str, Any]:
        """Return the facts for run.json."""
        facts: dict[str, Any] = {}
        if reference.last is not None:
            runs = {"after": reference.last.runs.after, "through": reference.last.runs.through}
            other = {} if reference.output is self.output else {"output": masked(reference.output.uri)}
            facts["reference"] = {**runs, **other, "labelled": before.labelled, "rejected": before.rejected}
            facts["images"] = judged.rows
        facts |= drift.public() if drift else {}
        history = [*reference.history]
        if drift is not None and drift.smaller >= MIN_REFERENCE:
            history.append(drift.entry(self.run_id))
        facts["history"] = history[-RUNS_OF_SPREAD:]
        if drift is None:
            facts["notes"] = [reference.note or "no row is newer than the last success"]
        return facts

    def _next_rows(self, reference: Reference, judged: RowCounts, new_rejects: int) -> LastRows:
        """Return the rows that the next run is compared with."""
        own, through = reference.own, self.run_id
        if own is not None and not judged.rows:
            return own if reference.accepted is None else replace(own, runs=RunRange(own.runs.after, through))
        if own is not None and judged.labelled < MIN_REFERENCE:
            rejects = None if own.new_rejects is None else own.new_rejects + new_rejects
            return LastRows(RunRange(own.runs.after, through), rejects, judged.transient)
        return LastRows(RunRange(reference.judged.after, through), new_rejects, judged.transient)


def levels_of(model: Model) -> list[tuple[str, dict[str, str]]]:
    """Return name and nodes of each level of a model above its labels, coarse to fine."""
    levels = model.taxonomy.levels[:-1] if model.taxonomy else ()
    return [
        (level.name, {label: level.nodes[at] for label, at in zip(model.labels, level.node_of, strict=True)})
        for level in levels
    ]


def _lines(reference: Reference, drift: Drift | None) -> Iterator[str]:
    """Yield the log lines of a verdict."""
    if reference.accepted is not None:
        yield f"run {reference.accepted} is accepted: newer rows are compared with its rows"
    if drift is None:
        yield f"the labels are not compared with earlier ones: {reference.note or 'no row is new'}"
        return
    assert reference.last is not None
    parts = []
    if drift.labels is not None:
        parts.append(f"label shift {drift.labels.size:.3f} (noise {drift.labels.noise:.3f})")
    if drift.score is not None:
        parts.append(f"mean score {drift.score.before:.3f} before, {drift.score.now:.3f} now")
    if drift.rejects is not None:
        parts.append(f"rejects {drift.rejects.before:.2%} before, {drift.rejects.now:.2%} now")
    where = "" if reference.last is reference.own else f" of {masked(reference.output.uri)}"
    yield f"{counted(drift.images, 'row')} compared with run {reference.last.runs.through}{where}: {', '.join(parts)}"
    yield from drift.notes

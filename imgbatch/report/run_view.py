"""Values: everything that the report of a run shows: run.json, that of the run before, counts, samples and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from imgbatch.quality.guards import Levels
from imgbatch.quality.row_counts import RowCounts
from imgbatch.report.parts import Picture
from imgbatch.report.row_samples import RowSamples, SampledRow

LABELS_MOVED, LABELS_SHOWN, OF_MOVED = 6, 4, 3
"""Labels whose proportion changed most, those whose pictures are shown at once, and the pictures of each."""
_UNCERTAIN, _RANDOM, _REASONS = 18, 24, 8


@dataclass(frozen=True, slots=True)
class Moved:
    """A label whose proportion changed, with some of its images."""

    label: str
    before: float | None
    """None: there is nothing to compare with."""
    now: float
    rows: Sequence[SampledRow]
    earlier: Sequence[SampledRow] = ()
    """Images that had this label in the run before."""

    @property
    def has_fallen(self) -> bool:
        """Whether there are fewer of them."""
        return self.before is not None and self.now < self.before

    def shown(self) -> list[tuple[SampledRow, bool]]:
        """Return the images that are shown, and whether each is of the run before: most of them are if the label fell."""
        earlier = [(row, True) for row in self.earlier[: OF_MOVED - bool(self.rows)]] if self.has_fallen else []
        return [*earlier, *((row, False) for row in self.rows)][:OF_MOVED]


@dataclass(kw_only=True)
class RunView:
    """The facts of a report."""

    output: str
    """The URI of the output, without secrets."""
    facts: Mapping[str, Any]
    """Of run.json."""
    state: str
    """running, succeeded, failed, interrupted or lost."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The run.json of the last success before this run; empty: there is none."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """The plan that was made for this run; empty: there is none."""
    samples: RowSamples = field(default_factory=RowSamples)
    before: RowCounts | None = None
    """Of the rows of the last success; None: nothing was compared."""
    now: RowCounts = field(default_factory=RowCounts)
    """Of the new rows."""
    levels: Levels = ()
    """The levels of the taxonomy above the labels, coarse to fine."""
    earlier: Mapping[str, Sequence[SampledRow]] = field(default_factory=dict)
    """Images of the last success, by the label of which there are fewer now."""
    pictures: Mapping[str, Picture] | None = None
    """By URI; None: pictures are not shown."""

    @property
    def drift(self) -> Mapping[str, Any]:
        """What the comparison with the last success found; empty without one."""
        found = self.facts.get("drift")
        return found if isinstance(found, Mapping) else {}

    @property
    def held_back(self) -> Sequence[Mapping[str, Any]]:
        """The guards that held the run back."""
        found: Sequence[Mapping[str, Any]] = self.drift.get("held_back") or ()
        return found

    @property
    def counts(self) -> Mapping[str, int]:
        """The counts of the output."""
        found: Mapping[str, int] = self.facts.get("counts") or {}
        return found

    @property
    def this_run(self) -> Mapping[str, Any]:
        """The counts of this run alone."""
        found: Mapping[str, Any] = self.facts.get("this_run") or {}
        return found

    @property
    def new_rows(self) -> int:
        """The number of images that this run labelled or rejected."""
        return int(self.this_run.get("labelled", 0)) + int(self.this_run.get("rejected", 0))

    def moved(self) -> list[Moved]:
        """Return the labels whose proportions changed most; without a comparison, the most frequent ones."""
        shift = self.drift.get("labels") or {}
        if not shift:
            total = max(1, sum(self.now.labels.values()))
            frequent = self.now.labels.most_common(LABELS_MOVED)
            return [Moved(label, None, count / total, self._rows_of("", label)) for label, count in frequent]
        return [
            Moved(
                change["label"], change["before"], change["now"], self._rows_of(shift["level"], change["label"]),
                self.earlier.get(change["label"], ()),
            )
            for change in shift.get("changed", ())[:LABELS_MOVED]
        ]  # fmt: skip

    def _rows_of(self, level: str, name: str) -> list[SampledRow]:
        return self.samples.of_level(level, name, self.labels_of(level, name))[:OF_MOVED]

    def labels_of(self, level: str, name: str) -> list[str]:
        """Return the labels of a node of a taxonomy, the most frequent first; of the finest level, the label itself."""
        node_of = dict(self.levels).get(level)
        if node_of is None:
            return [name]
        counts = self.now.labels + (self.before.labels if self.before is not None else self.now.labels)
        return [label for label, _ in counts.most_common() if node_of.get(label) == name]

    def uncertain(self) -> list[SampledRow]:
        """Return the images with the lowest scores."""
        return self.samples.of_low_scores()[:_UNCERTAIN]

    def at_random(self) -> list[SampledRow]:
        """Return images at random."""
        return self.samples.of_all()[:_RANDOM]

    def rejects(self) -> dict[str, list[SampledRow]]:
        """Return some rejects of the most frequent reasons."""
        return dict([*self.samples.by_reason().items()][:_REASONS])

    def wanted(self) -> list[SampledRow]:
        """Return the rows whose pictures are shown, the most important first, without rejects that cannot be decoded."""
        moved = [row for each in self.moved() for row, _ in each.shown()]
        rejects = [
            row for rows in self.rejects().values() for row in rows if row.stage == "fetch" or row.reason == "truncated"
        ]
        return [*moved, *self.uncertain(), *rejects, *self.at_random()]

    def times(self) -> tuple[datetime | None, datetime | None]:
        """Return when the run started, and when it ended or wrote its record last."""
        started, ended = (self.facts.get(name) for name in ("started", "finished"))
        found = [started, ended or self.facts.get("written")]
        return tuple(datetime.fromisoformat(time) if time else None for time in found)  # type: ignore[return-value]

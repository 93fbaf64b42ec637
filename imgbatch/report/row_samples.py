"""Values: samples of result rows, kept while the rows pass: of each class and reject reason, of low scores, and of all.

Their number does not depend on that of the rows. A row's key is a hash of its URI: the rows with the smallest keys are a
uniform sample, which depends neither on the order of the rows nor on how they are cut into blocks.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.quality.row_counts import LABEL, SCORE, RowCounts
from imgbatch.schema import single_chunk
from imgbatch.uri_index import hash_strings

OF_ALL, OF_LOW_SCORES, OF_CLASS, OF_REASON = 24, 24, 4, 6
"""The number of rows in each sample."""
_ROWS_OF_CLASSES, _ROWS_OF_REASONS = 600, 120  # in all
_TEXT = 300  # characters
_SEED = 0x9E3779B97F4A7C15

COLUMNS = (
    "uri", LABEL, SCORE, "top_k", "levels", "stage", "reason", "message", "size", "etag", "last_modified",
    "previous_offset", "resume_offset",
)  # fmt: skip
"""The columns that are used, as far as there are any."""

Indices = npt.NDArray[np.int64]
Keys = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of labels/ or rejects/."""

    uri: str
    label: str = ""
    """Empty: the image is rejected, or the table has no labels."""
    score: float | None = None
    second: str = ""
    """The next best class."""
    second_score: float | None = None
    levels: Mapping[str, str] = field(default_factory=dict)
    """Its label at each level of a taxonomy."""
    stage: str = ""
    reason: str = ""
    message: str = ""
    size: int | None = None
    etag: str | None = None
    last_modified: datetime | None = None
    previous_offset: int | None = None
    """Of a tar's member: the offset of the one before it."""
    resume_offset: int | None = None
    """Of a tar's member: where reading begins."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> SampledRow:
        """Return a row of a table, without what is not used."""
        candidates: Sequence[Mapping[str, Any]] = row.get("top_k") or ()
        second = candidates[1] if len(candidates) > 1 else {}
        rest = {
            name: row.get(name)
            for name in ("score", "size", "etag", "last_modified", "previous_offset", "resume_offset")
        }
        return cls(
            uri=row["uri"],
            label=(row.get(LABEL) or "")[:_TEXT],
            second=(second.get("label") or "")[:_TEXT],
            second_score=second.get("score"),
            levels={level["level"]: (level["label"] or "")[:_TEXT] for level in row.get("levels") or ()},
            stage=row.get("stage") or "",
            reason=row.get("reason") or "",
            message=(row.get("message") or "")[:_TEXT],
            **rest,
        )


Kept = tuple[float, SampledRow]


@dataclass
class _Smallest:
    """The rows with the smallest keys."""

    size: int
    kept: list[Kept] = field(default_factory=list)

    def candidates(self, keys: Keys) -> Indices:
        """Return the rows of a block that may be among them."""
        found = np.argsort(keys, kind="stable")[: self.size]
        return found[keys[found] < self.kept[-1][0]] if len(self.kept) >= self.size else found

    def add(self, rows: Iterable[Kept]) -> None:
        self.kept = sorted([*self.kept, *rows], key=lambda kept: (kept[0], kept[1].uri))[: self.size]


@dataclass
class _Groups:
    """The rows with the smallest keys of each group. If there are too many groups, those with the most rows are kept."""

    depth: int
    capacity: int
    kept: dict[str, list[Kept]] = field(default_factory=dict)

    def candidates(self, groups: pa.Array, keys: Keys) -> Indices:
        """Return the rows of a block that may be among them."""
        encoded = groups.dictionary_encode()
        codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        order = np.lexsort((keys, codes))
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        limits = np.array([self._limit(name) for name in names])
        first = order[rank < self.depth]
        found: Indices = first[keys[first] < limits[codes[first]]]
        return found

    def _limit(self, name: str) -> float:
        kept = self.kept.get(name, [])
        return kept[-1][0] if len(kept) >= self.depth else np.inf

    def add(self, rows: Iterable[tuple[str, Kept]], counts: Counter[str]) -> None:
        for name, row in rows:
            kept = self.kept.setdefault(name, [])
            kept.append(row)
            kept.sort(key=lambda each: (each[0], each[1].uri))
            del kept[self.depth :]
        while self.depth > 1 and sum(map(len, self.kept.values())) > self.capacity:
            self.depth -= 1
            for kept in self.kept.values():
                del kept[self.depth :]
        if len(self.kept) > self.capacity:
            frequent = heapq.nlargest(self.capacity, self.kept, key=lambda name: counts[name])
            self.kept = {name: self.kept[name] for name in frequent}

    def rows(self, name: str) -> list[SampledRow]:
        return [row for _, row in self.kept.get(name, ())]


@dataclass
class RowSamples:
    """The samples of a run, and the counts of its rows."""

    seed: int = 0
    counts: RowCounts = field(default_factory=RowCounts)
    _all: _Smallest = field(default_factory=lambda: _Smallest(OF_ALL))
    _low: _Smallest = field(default_factory=lambda: _Smallest(OF_LOW_SCORES))
    _classes: _Groups = field(default_factory=lambda: _Groups(OF_CLASS, _ROWS_OF_CLASSES))
    _reasons: _Groups = field(default_factory=lambda: _Groups(OF_REASON, _ROWS_OF_REASONS))

    def take(self, rows: pa.Table) -> None:
        """Take rows of either table, or rows as workers send them: those with a `reason` are rejects."""
        if "reason" not in rows.column_names:
            self._take_labels(rows)
            return
        is_reject = pc.is_valid(rows["reason"])
        self._take_labels(rows.filter(pc.invert(is_reject)))
        rejects = rows.filter(is_reject)
        if len(rejects):
            self.counts.add_rejects(rejects)
            keys, reasons = self._keys(rejects), single_chunk(rejects["reason"])
            at = self._reasons.candidates(reasons, keys)
            chosen = zip(reasons.take(pa.array(at)).to_pylist(), _kept(rejects, at, keys), strict=True)
            self._reasons.add(chosen, self.counts.rejects)

    def _take_labels(self, rows: pa.Table) -> None:
        if not len(rows):
            return
        self.counts.add_labels(rows)
        keys = self._keys(rows)
        self._all.add(_kept(rows, self._all.candidates(keys), keys))
        if SCORE in rows.column_names:
            scores = np.nan_to_num(rows[SCORE].to_numpy().astype(np.float64))
            self._low.add(_kept(rows, self._low.candidates(scores), scores))
        if LABEL in rows.column_names:
            labels = pc.fill_null(single_chunk(rows[LABEL]).cast(pa.string()), "")
            others = self._keys(rows, 1)  # otherwise the same images would be in both samples
            at = self._classes.candidates(labels, others)
            chosen = zip(labels.take(pa.array(at)).to_pylist(), _kept(rows, at, others), strict=True)
            self._classes.add(chosen, self.counts.labels)

    def _keys(self, rows: pa.Table, sample: int = 0) -> Keys:
        seed = np.uint64(_SEED + 2 * (self.seed + sample))
        return hash_strings(single_chunk(rows["uri"]), seed).astype(np.float64)

    def of_all(self) -> list[SampledRow]:
        """Return labelled rows at random."""
        return [row for _, row in self._all.kept]

    def of_low_scores(self) -> list[SampledRow]:
        """Return the rows with the lowest scores, the lowest first."""
        return [row for _, row in self._low.kept]

    def of_class(self, label: str) -> list[SampledRow]:
        """Return some rows of a label."""
        return self._classes.rows(label[:_TEXT]) or self._classes.rows(label)

    def of_level(self, level: str, node: str, labels: Sequence[str]) -> list[SampledRow]:
        """Return some rows of a node of a taxonomy: the first row of each of its labels, then the second ones.

        Without its labels: rows whose level is recorded as this node.
        """
        of_labels = [self.of_class(label) for label in labels]
        found = [rows[number] for number in range(OF_CLASS) for rows in of_labels if number < len(rows)]
        kept = (row for rows in self._classes.kept.values() for _, row in rows)
        return found or [row for row in kept if row.levels.get(level) == node]

    def by_reason(self) -> dict[str, list[SampledRow]]:
        """Return some rejects of each reason, the most frequent reason first."""
        return {reason: self._reasons.rows(reason) for reason, _ in self.counts.rejects.most_common()}


def _kept(rows: pa.Table, at: Indices, keys: Keys) -> list[Kept]:
    """Return rows of a table with their keys."""
    columns = [name for name in COLUMNS if name in rows.column_names]
    chosen = rows.select(columns).take(pa.array(at)).to_pylist()
    return [(key, SampledRow.of(row)) for key, row in zip(keys[at].tolist(), chosen, strict=True)]

"""Effects: units of work: how the pending images are divided into tasks, and the order of the tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.ledger.streams import UNIT_COLUMNS
from imgbatch.ledger.work_plan import RowRanges, WorkPlan

_MIN_ROWS = 32  # of the first units, which delay the first row, and of the last ones, which delay the end


@dataclass(frozen=True, slots=True)
class Round:
    """The size of units in a round: first large units; lost images are submitted again in smaller ones."""

    rows: int
    """The maximum number of images in a unit, that is, in a task."""
    max_lost: float
    """The maximum proportion of lost images. If more are lost, the cluster is at fault, not the images."""
    isolated: bool = False
    """One task at a time in a process, which decodes in a child process: then the image that killed it is known."""


# Ray's own records of a unit cost the driver 40 kB: 10 bytes per image of 4,096. A lost actor costs half a minute of work.
# If an image kills its process, all units of that process are lost: up to a quarter of a small run.
ROUNDS = (Round(4096, max_lost=0.5), Round(16, max_lost=0.1), Round(1, max_lost=0.1, isolated=True))


def cut_units(work_plan: WorkPlan, round: Round, actors: int) -> Iterator[pa.Table]:
    """Yield the numbers of pending images, a table per unit: each stream is a unit, and other images share units.

    Units of images start small, so that the first rows arrive soon, and end small, so that all actors end together: each
    unit has a quarter of an actor's share of the rest (guided self-scheduling, Polychronopoulos and Kuck 1987).
    """
    for number, stream in work_plan.streams.items():
        if work_plan.pending[number]:
            position = zip(UNIT_COLUMNS, stream.position, strict=True)
            yield pa.table({"index": np.array([number], np.uint32), **{name: [value] for name, value in position}})
    numbers = np.flatnonzero(work_plan.pending).astype(np.uint32)
    numbers = numbers[~work_plan.in_streams(numbers)]
    start = 0
    while start < len(numbers):
        rest_quarter = (len(numbers) - start) // (4 * actors)
        rows = _MIN_ROWS if start < 2 * actors * _MIN_ROWS else max(_MIN_ROWS, rest_quarter)
        end = _end_of_range(work_plan.row_group_ranges, numbers, start + min(rows, round.rows), round.rows)
        # All units of a dataset have the same columns.
        nulls = {name: pa.nulls(end - start, pa.int64()) for name in UNIT_COLUMNS} if work_plan.streams else {}
        yield pa.table({"index": numbers[start:end], **nulls})
        start = end


def _end_of_range(ranges: RowRanges, numbers: npt.NDArray[np.uint32], end: int, max_rows: int) -> int:
    """Return `end`; or the end of the range that a cut at `end` would divide, if it has no more than `max_rows` rows.

    >>> _end_of_range(np.array([[2, 6]]), np.arange(9, dtype=np.uint32), 3, 4)
    6
    """
    if end >= len(numbers):
        return len(numbers)
    at = int(np.searchsorted(ranges[:, 0], numbers[end], side="right")) - 1
    if at < 0 or not ranges[at, 0] < numbers[end] < ranges[at, 1] or ranges[at, 1] - ranges[at, 0] > max_rows:
        return end
    return int(np.searchsorted(numbers, ranges[at, 1]))

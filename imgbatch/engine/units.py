"""Effects: how work is cut: which images go to a worker at a time, and in what order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.ledger.listing import RowRanges, WorkPlan

_LEAST_ROWS = 32  # of the first units, for which the first row waits, and of the last ones, for which the end waits
_WHERE = ("resume_offset", "last_offset")  # columns of a unit that is a tar: where to read on


@dataclass(frozen=True, slots=True)
class Round:
    """How images are handed out: at first in large units, and in ever smaller ones what did not come back."""

    rows: int
    """Most images of a unit, that is, of a task."""
    lost: float
    """The largest share of images that may not have come back; more are the cluster's fault, not theirs."""
    alone: bool = False
    """One task at a time in a process, which decodes in a child of its own: what dies there has a name."""


# A unit costs the driver 40 kB of Ray's books: 10 bytes an image of 4,096. A lost actor costs half a minute of work.
# An image that ends its process takes the units of that process along, which may be a quarter of a small run.
ROUNDS = (Round(4096, lost=0.5), Round(16, lost=0.1), Round(1, lost=0.1, alone=True))


def units(work_plan: WorkPlan, round: Round, actors: int) -> Iterator[pa.Table]:
    """Yield the pending numbers in tables of a unit each: every tar alone, others together.

    Of the others short ones come first, so that rows flow soon, and last, so that all actors end together: each takes a
    quarter of its share of what is left (guided self-scheduling, Polychronopoulos and Kuck 1987).
    """
    for number, tar in work_plan.tars.items():
        if work_plan.pending[number]:
            yield pa.table(
                {
                    "index": np.array([number], np.uint32),
                    "resume_offset": [tar.resume_offset],
                    "last_offset": [tar.last_offset],
                }
            )
    numbers = np.flatnonzero(work_plan.pending).astype(np.uint32)
    if work_plan.tars:
        numbers = numbers[~np.isin(numbers, list(work_plan.tars))]
    start = 0
    while start < len(numbers):
        share = (len(numbers) - start) // (4 * actors)
        rows = _LEAST_ROWS if start < 2 * actors * _LEAST_ROWS else max(_LEAST_ROWS, share)
        end = _not_inside(work_plan.row_group_ranges, numbers, start + min(rows, round.rows), round.rows)
        nowhere = {name: pa.nulls(end - start, pa.int64()) for name in _WHERE} if work_plan.tars else {}
        yield pa.table({"index": numbers[start:end], **nowhere})
        start = end


def _not_inside(ranges: RowRanges, numbers: npt.NDArray[np.uint32], end: int, most: int) -> int:
    """Return `end`, or where what is read as a whole ends, if the cut would go through it and it is no larger than `most`.

    >>> _not_inside(np.array([[2, 6]]), np.arange(9, dtype=np.uint32), 3, 4)
    6
    """
    if end >= len(numbers):
        return len(numbers)
    at = int(np.searchsorted(ranges[:, 0], numbers[end], side="right")) - 1
    if at < 0 or not ranges[at, 0] < numbers[end] < ranges[at, 1] or ranges[at, 1] - ranges[at, 0] > most:
        return end
    return int(np.searchsorted(numbers, ranges[at, 1]))

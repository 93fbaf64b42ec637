"""Values: what a run has to do: which images and tars of the listing have no row yet."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from imgbatch.ledger.tar_cursor import TarCursor

Mask = npt.NDArray[np.bool_]
RowRanges = npt.NDArray[np.int64]


class WorkPlan:
    """The images and tars whose rows are pending, by their numbers in the listing.

    The plan owns the mask: others read `pending`, and report arrivals to `mark_arrived`.

    Args:
        pending: by number, whether rows are to come; the plan takes the array over, one byte per image.
        row_group_ranges: (first, end) of images that are read together, such as a row group of a Parquet file; ascending, n×2.
        tars: the tars among them.
    """

    __slots__ = ("_pending", "row_group_ranges", "tars")

    def __init__(self, pending: Mask, row_group_ranges: RowRanges, tars: dict[int, TarCursor]) -> None:
        self._pending = pending
        self.row_group_ranges = row_group_ranges
        self.tars = tars

    @property
    def pending(self) -> Mask:
        """A read-only view of the mask."""
        view = self._pending.view()
        view.flags.writeable = False
        return view

    @property
    def remaining(self) -> int:
        """How many images and tars are pending."""
        return int(np.count_nonzero(self._pending))

    def mark_arrived(self, numbers: npt.NDArray[np.integer] | Iterable[int]) -> Mask:
        """Mark images, and tars that are read to their end, as done; return a mask of those that were pending before."""
        at = np.asarray(numbers if isinstance(numbers, np.ndarray) else list(numbers), np.int64)
        new = self._pending[at]
        self._pending[at] = False
        return new

    def restricted(self, pending: Mask) -> WorkPlan:
        """Return a plan for other images of the same listing."""
        return WorkPlan(pending, self.row_group_ranges, self.tars)

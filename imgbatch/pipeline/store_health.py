"""Effects: detection of an unreachable store of the input, by consecutive failed reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import Unreachable

MAX_FAILED_READS = 20
"""If so many reads of different objects fail in a row, the store is at fault, not the objects."""

_STORES_FAULT = ("unreachable", "timeout", "forbidden")

Mask = npt.NDArray[np.bool_]


@dataclass
class StoreHealth:
    """Counts consecutive reads that failed for a reason that may be due to the store."""

    store_is_reachable: Callable[[], bool] = lambda: True
    """Checks whether the store of the input grants access at all; called if many reads in a row are forbidden."""
    _failed_in_a_row: int = 0

    def check(self, rows: pa.Table) -> None:
        """Count the reads of these rows.

        Raises:
            Unreachable: 20 reads in a row failed.
        """
        at_fetch = pc.fill_null(pc.equal(rows["stage"], "fetch"), False)
        failing = np.asarray(pc.and_(at_fetch, pc.is_in(rows["reason"], pa.array(_STORES_FAULT))))
        longest, trailing = _runs(failing, self._failed_in_a_row)
        if longest >= MAX_FAILED_READS:
            failed = rows.filter(pa.array(failing))
            # If the store grants access to other objects, only a folder without permission is at fault.
            if pc.unique(failed["reason"]).to_pylist() != ["forbidden"] or not self.store_is_reachable():
                last_message = failed["message"][-1].as_py()
                raise Unreachable(
                    f"{longest} objects in a row could not be read, the store is unreachable: {last_message}"
                )
        self._failed_in_a_row = trailing


def _runs(mask: Mask, before: int) -> tuple[int, int]:
    """Return the length of the longest run of True, where `before` more precede the first value, and that of the last run.

    >>> _runs(np.array([True, False, True, True]), 4)
    (5, 2)
    """
    ends = np.flatnonzero(~mask)
    if not len(ends):
        return before + len(mask), before + len(mask)
    inner = int(np.diff(ends).max(initial=1)) - 1
    return max(before + int(ends[0]), inner, len(mask) - 1 - int(ends[-1])), len(mask) - 1 - int(ends[-1])

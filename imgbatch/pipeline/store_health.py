"""Effects: whether the store of the input is away, which reads show that fail in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import Unreachable

STORE_IS_AWAY = 20
"""So many reads in a row that failed, across objects, are not the objects' fault."""

_STORES_FAULT = ("unreachable", "timeout", "forbidden")

Mask = npt.NDArray[np.bool_]


@dataclass
class StoreHealth:
    """Counts the reads in a row that failed for a reason that may be the store's."""

    store_is_reachable: Callable[[], bool] = lambda: True
    """Asks the input's store whether it grants access at all, when many reads in a row are forbidden."""
    _failed_in_a_row: int = 0

    def check(self, rows: pa.Table) -> None:
        """Count the reads of these rows.

        Raises:
            Unreachable: 20 reads in a row failed.
        """
        at_fetch = pc.fill_null(pc.equal(rows["stage"], "fetch"), False)
        failing = np.asarray(pc.and_(at_fetch, pc.is_in(rows["reason"], pa.array(_STORES_FAULT))))
        longest, trailing = _runs(failing, self._failed_in_a_row)
        if longest >= STORE_IS_AWAY:
            failed = rows.filter(pa.array(failing))
            # A folder without permission is its objects' fault, as long as the store grants access elsewhere.
            if pc.unique(failed["reason"]).to_pylist() != ["forbidden"] or not self.store_is_reachable():
                last = failed["message"][-1].as_py()
                raise Unreachable(f"{longest} objects in a row could not be read, the store is away: {last}")
        self._failed_in_a_row = trailing


def _runs(mask: Mask, before: int) -> tuple[int, int]:
    """Return the longest run of True, with `before` more in front of the first, and the length of the last run.

    >>> _runs(np.array([True, False, True, True]), 4)
    (5, 2)
    """
    ends = np.flatnonzero(~mask)
    if not len(ends):
        return before + len(mask), before + len(mask)
    inner = int(np.diff(ends).max(initial=1)) - 1
    return max(before + int(ends[0]), inner, len(mask) - 1 - int(ends[-1])), len(mask) - 1 - int(ends[-1])

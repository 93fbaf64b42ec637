"""An iterator that may block, made one that always comes back: signals, commits and limits need their moment."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

from imgbatch.errors import ClusterError

Item = TypeVar("Item")

_TICK_S = 0.25
_AHEAD = 2


def ticking(items: Iterator[Item], stall_s: float) -> Iterator[Item | None]:
    """Yield the items as they come, and None whenever a quarter of a second passes without one.

    The items are drawn in a thread of their own. Dropping the iterator leaves that thread to end with its process.

    Raises:
        ClusterError: no item for `stall_s` seconds.
        Exception: whatever drawing an item raised.
    """
    arrived: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(_AHEAD)

    def draw() -> None:
        try:
            for item in items:
                arrived.put((item, None))
            arrived.put((None, None))
        except BaseException as error:  # noqa: BLE001 - it is raised where the items are wanted
            arrived.put((None, error))

    threading.Thread(target=draw, name="results", daemon=True).start()
    last = time.monotonic()
    while True:
        try:
            item, error = arrived.get(timeout=_TICK_S)
        except queue.Empty:
            if time.monotonic() - last > stall_s:
                raise ClusterError(
                    f"not one row for {stall_s:.0f} s (cluster.stall_s): the workers hang, or the cluster lost them; "
                    "run the same command again to go on"
                ) from None
            yield None
            continue
        if error is not None:
            raise error
        if item is None:
            return
        last = time.monotonic()
        yield item

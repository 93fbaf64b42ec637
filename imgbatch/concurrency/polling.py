"""Effects: an iterator that may block, made one that always comes back: signals, commits and limits need their moment."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

from imgbatch.concurrency.monitor import tick
from imgbatch.errors import ClusterError

Item = TypeVar("Item")

RESULTS = "results"
"""The name of the threads in which items are drawn that end when their iterator is closed."""

_TICK_S = 0.25
_AHEAD = 2


def ticking(items: Iterator[Item], stall_s: float, *, closes: bool = False) -> Generator[Item | None, None, None]:
    """Yield the items as they come, and None whenever a quarter of a second passes without one.

    The items are drawn in a thread of their own, which ends with the process. With `closes` it ends when the iterator is
    closed, as soon as the item that it waits for has come, and closes the items.

    Raises:
        ClusterError: no item for `stall_s` seconds.
        Exception: whatever drawing an item raised.
    """
    arrived: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(_AHEAD)
    left = threading.Event()

    def hand_over(item: Item | None, error: BaseException | None) -> None:
        while not left.is_set():
            with suppress(queue.Full):
                arrived.put((item, error), timeout=_TICK_S)
                return

    def draw() -> None:
        try:
            for item in items:
                hand_over(item, None)
                if left.is_set():
                    break
            if isinstance(items, Generator):
                items.close()
            hand_over(None, None)
        except BaseException as error:  # noqa: BLE001 - it is raised where the items are wanted
            hand_over(None, error)

    threading.Thread(target=draw, name=RESULTS if closes else None, daemon=True).start()
    try:
        yield from _as_they_come(arrived, stall_s)
    finally:
        if closes:
            left.set()


def _as_they_come(
    arrived: queue.Queue[tuple[Item | None, BaseException | None]], stall_s: float
) -> Iterator[Item | None]:
    last = time.monotonic()
    while True:
        try:
            item, error = arrived.get(timeout=_TICK_S)
        except queue.Empty:
            if time.monotonic() - last > stall_s:
                raise ClusterError(
                    f"not one row for {stall_s:.0f} s (cluster.stall_timeout_s): the workers hang, or the cluster lost them; "
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


def waited(call: Callable[[], Item]) -> Item:
    """Return call(), made in a thread, while `tick` is called four times a second: it raises to wait no longer."""
    return bounded(call, math.inf, "")


def bounded(call: Callable[[], Item], limit_s: float, what: str) -> Item:
    """Return call(), made in a daemon thread; meanwhile `tick` is called four times a second, and raises to wait no longer.

    Ray's calls into C++ have no timeout of their own, and no signal reaches Python in the thread that makes one.

    Raises:
        ClusterError: the call, named by `what`, took longer than `limit_s` seconds. Its thread is left behind.
    """
    answer: Future[Item] = Future()

    def make() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is wanted
            answer.set_exception(error)

    threading.Thread(target=make, name=what or None, daemon=True).start()
    return awaited(answer, limit_s, what)


def awaited(answer: Future[Item], limit_s: float, what: str) -> Item:
    """Return what `answer` will hold, like `bounded`."""
    started = time.monotonic()
    while not wait([answer], timeout=min(_TICK_S, limit_s)).done:
        tick()
        if time.monotonic() - started >= limit_s:
            raise ClusterError(
                f"{what} did not return within {limit_s:g} s: Ray's control plane (GCS) hangs or cannot be reached; look at "
                "the head node, then run the same command again"
            )
    return answer.result()

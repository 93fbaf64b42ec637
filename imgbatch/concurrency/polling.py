"""Effects: waiting with timeouts: iterators and calls that may block run in threads, while the main thread stays responsive.

Signals, commits and timeouts are handled between two polls.
"""

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
Result = TypeVar("Result")

RESULT_THREADS = "results"
"""The name of the threads of `poll_items` that end when their iterator is closed."""

_POLL_S = 0.25
_MAX_QUEUED = 2


def poll_items(items: Iterator[Item], stall_s: float, *, closes: bool = False) -> Generator[Item | None, None, None]:
    """Yield each item as it arrives, and None whenever a quarter of a second passes without one.

    A daemon thread iterates over the items. It ends with the process.

    Args:
        items: the iterator, which may block.
        stall_s: the timeout for one item, in seconds.
        closes: when this generator is closed, end the thread as soon as its current item has arrived, and close `items`.

    Raises:
        ClusterError: no item for `stall_s` seconds.
        Exception: any exception of the iteration.
    """
    arrived: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(_MAX_QUEUED)
    closed = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                arrived.put((item, error), timeout=_POLL_S)
                return

    def iterate() -> None:
        try:
            for item in items:
                put(item, None)
                if closed.is_set():
                    break
            if isinstance(items, Generator):
                items.close()
            put(None, None)
        except BaseException as error:  # noqa: BLE001 - it is raised in the consumer's thread
            put(None, error)

    threading.Thread(target=iterate, name=RESULT_THREADS if closes else None, daemon=True).start()
    try:
        yield from _receive(arrived, stall_s)
    finally:
        if closes:
            closed.set()


def _receive(arrived: queue.Queue[tuple[Item | None, BaseException | None]], stall_s: float) -> Iterator[Item | None]:
    last_arrival = time.monotonic()
    while True:
        try:
            item, error = arrived.get(timeout=_POLL_S)
        except queue.Empty:
            if time.monotonic() - last_arrival > stall_s:
                raise ClusterError(
                    f"not one row for {stall_s:.0f} s (cluster.stall_timeout_s): the workers hang, or the cluster lost them; "
                    "run the same command again to resume"
                ) from None
            yield None
            continue
        if error is not None:
            raise error
        if item is None:
            return
        last_arrival = time.monotonic()
        yield item


def run_with_ticks(call: Callable[[], Result]) -> Result:
    """Return call(), made in a thread. Call `tick` four times a second while waiting; an exception from it ends the wait."""
    return call_with_timeout(call, math.inf, "")


def call_with_timeout(call: Callable[[], Result], limit_s: float, name: str) -> Result:
    """Return call(), made in a daemon thread, or raise after `limit_s` seconds.

    Call `tick` four times a second while waiting; an exception from it ends the wait. Ray's calls into C++ have no timeout
    of their own, and Python handles no signal in a thread that is in such a call.

    Args:
        name: of the call, in the message and as the name of its thread.

    Raises:
        ClusterError: the timeout. The thread of the call keeps running.
        Exception: any exception of the call.
    """
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
            result.set_exception(error)

    threading.Thread(target=run, name=name or None, daemon=True).start()
    return wait_for(result, limit_s, name)


def wait_for(result: Future[Result], limit_s: float, name: str) -> Result:
    """Return the result of a future, like `call_with_timeout`."""
    started = time.monotonic()
    while not wait([result], timeout=min(_POLL_S, limit_s)).done:
        tick()
        if time.monotonic() - started >= limit_s:
            raise ClusterError(
                f"{name} did not return within {limit_s:g} s: Ray's control plane (GCS) hangs or cannot be reached; check "
                "the head node, then run the same command again"
            )
    return result.result()

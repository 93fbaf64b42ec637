"""Effects: calls and iterators that run in threads ahead of their consumer, with results in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Full, Queue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch_calls(
    pool: Executor,
    call: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    max_pending: int,
    cost: Callable[[Item], int] = lambda item: 0,
    max_cost: int = 0,
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, call(item)) in order, with up to `max_pending` calls submitted, whose costs add up to at most `max_cost`.

    One call is always allowed, regardless of its cost. The number of results in memory has the same limits, so `items` may be
    endless. Calls are submitted in bursts, when half of the limit is free: then a server, and this process, wake up once
    for many of them.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(4) as pool:
    ...     list(prefetch_calls(pool, abs, iter([-3, 1, -2]), max_pending=2))
    [(-3, 3), (1, 1), (-2, 2)]
    """
    pending: deque[tuple[Item, int, Future[Result]]] = deque()
    total = 0
    try:
        for item in items:
            item_cost = cost(item)
            if len(pending) >= max_pending or total + item_cost > max_cost > 0:
                while pending and (len(pending) > max_pending // 2 or 2 * (total + item_cost) > max_cost > 0):
                    oldest, oldest_cost, future = pending.popleft()
                    yield oldest, future.result()
                    total -= oldest_cost
            pending.append((item, item_cost, pool.submit(call, item)))
            total += item_cost
        while pending:
            oldest, _, future = pending.popleft()
            yield oldest, future.result()
    finally:
        for _, _, future in pending:
            future.cancel()


_POLL_S = 0.1
_END = object()


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException


def prefetch_streams(
    streams: Sequence[Callable[[], Iterator[Item]]], *, concurrency: int, max_pending: int
) -> Iterator[Item]:
    """Yield all items of the first stream, then those of the second, and so on, while the next streams are already read.

    Up to `concurrency` streams are read at a time, each in a thread, with up to `max_pending` items in memory. An error of
    a stream is raised in place of its next item.

    >>> list(prefetch_streams([lambda: iter("ab"), lambda: iter("c")], concurrency=2, max_pending=1))
    ['a', 'b', 'c']
    """
    stop, remaining = threading.Event(), iter(streams)
    queues: deque[Queue[Any]] = deque()
    pool = ThreadPoolExecutor(concurrency, "streams")

    def start() -> None:
        if (stream := next(remaining, None)) is not None:
            queues.append(Queue(max_pending))
            pool.submit(_read, stream, queues[-1], stop)

    try:
        for _ in range(concurrency):
            start()
        while queues:
            while (item := queues[0].get()) is not _END:
                if isinstance(item, _Failure):
                    raise item.error
                yield item
            queues.popleft()
            start()
    finally:
        stop.set()
        # A thread that waits for a store ends when the store answers or the request times out.
        pool.shutdown(wait=False)


def prefetch_items(stream: Callable[[], Iterator[Item]], max_pending: int) -> Iterator[Item]:
    """Yield the items of a stream, while a thread reads up to `max_pending` of the next ones.

    >>> list(prefetch_items(lambda: iter("abc"), 2))
    ['a', 'b', 'c']
    """
    yield from prefetch_streams([stream], concurrency=1, max_pending=max_pending)


def _read(stream: Callable[[], Iterator[Any]], items: Queue[Any], stop: threading.Event) -> None:
    try:
        for item in stream():
            _put(items, item, stop)
            if stop.is_set():
                return
        _put(items, _END, stop)
    except BaseException as error:  # noqa: BLE001 - it is raised in the consumer's thread
        _put(items, _Failure(error), stop)


def _put(items: Queue[Any], item: Any, stop: threading.Event) -> None:
    """Put an item into a queue, or drop it if the consumer has stopped while the queue was full."""
    while not stop.is_set():
        with suppress(Full):
            items.put(item, timeout=_POLL_S)
            return

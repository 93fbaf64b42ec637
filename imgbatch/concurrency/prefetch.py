"""Effects: calls and iterators that run ahead of their consumer, in threads, while their results come out in order."""

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


def ahead(
    pool: Executor,
    call: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    most: int,
    cost: Callable[[Item], int] = lambda item: 0,
    most_cost: int = 0,
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, call(item)) in order, with up to `most` calls under way whose costs sum up to at most `most_cost`.

    One call is always allowed, whatever it costs. Results wait in memory only within these bounds, so the iteration may
    be endless. Calls begin in bursts, when half of the bounds is free: a server, and this process, wake up once for many
    of them.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(4) as pool:
    ...     list(ahead(pool, abs, iter([-3, 1, -2]), most=2))
    [(-3, 3), (1, 1), (-2, 2)]
    """
    waiting: deque[tuple[Item, int, Future[Result]]] = deque()
    spent = 0
    try:
        for item in items:
            price = cost(item)
            if len(waiting) >= most or spent + price > most_cost > 0:
                while waiting and (len(waiting) > most // 2 or 2 * (spent + price) > most_cost > 0):
                    first, paid, future = waiting.popleft()
                    yield first, future.result()
                    spent -= paid
            waiting.append((item, price, pool.submit(call, item)))
            spent += price
        while waiting:
            first, _, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, _, future in waiting:
            future.cancel()


_LOOKS_EVERY_S = 0.1
_END = object()


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


def chained(streams: Sequence[Callable[[], Iterator[Item]]], *, at_once: int, most: int) -> Iterator[Item]:
    """Yield all items of the first stream, then those of the second, and so on, while the next ones are drawn already.

    Up to `at_once` streams are drawn at a time, each in a thread, with up to `most` items that wait for their turn. An
    error is raised where the stream's items would stand.

    >>> list(chained([lambda: iter("ab"), lambda: iter("c")], at_once=2, most=1))
    ['a', 'b', 'c']
    """
    stop, todo = threading.Event(), iter(streams)
    waiting: deque[Queue[Any]] = deque()
    pool = ThreadPoolExecutor(at_once, "streams")

    def start() -> None:
        if (stream := next(todo, None)) is not None:
            waiting.append(Queue(most))
            pool.submit(_draw, stream, waiting[-1], stop)

    try:
        for _ in range(at_once):
            start()
        while waiting:
            while (item := waiting[0].get()) is not _END:
                if isinstance(item, _Failed):
                    raise item.error
                yield item
            waiting.popleft()
            start()
    finally:
        stop.set()
        pool.shutdown(wait=False)  # a stream that waits for a store ends when that answers, or gives up


def drawn(stream: Callable[[], Iterator[Item]], most: int) -> Iterator[Item]:
    """Yield the items of a stream, while up to `most` of the next ones are drawn in a thread.

    >>> list(drawn(lambda: iter("abc"), 2))
    ['a', 'b', 'c']
    """
    yield from chained([stream], at_once=1, most=most)


def _draw(stream: Callable[[], Iterator[Any]], arrived: Queue[Any], stop: threading.Event) -> None:
    try:
        for item in stream():
            _put(arrived, item, stop)
            if stop.is_set():
                return
        _put(arrived, _END, stop)
    except BaseException as error:  # noqa: BLE001 - it is raised where the items are wanted
        _put(arrived, _Failed(error), stop)


def _put(arrived: Queue[Any], item: Any, stop: threading.Event) -> None:
    """Wait for room, unless nobody wants the item any more."""
    while not stop.is_set():
        with suppress(Full):
            arrived.put(item, timeout=_LOOKS_EVERY_S)
            return

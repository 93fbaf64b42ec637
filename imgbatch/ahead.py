"""Calls that run ahead of their consumer, in threads, while their results come out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

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
    be endless.

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
            while waiting and (len(waiting) >= most or spent + price > most_cost > 0):
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

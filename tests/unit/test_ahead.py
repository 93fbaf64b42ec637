"""Calls ahead of their consumer: order, bounds, errors."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest

from imgbatch.concurrency.prefetch import prefetch_calls, prefetch_streams


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as opened:
        yield opened


class SubmitsAtOnce:
    """An executor whose calls are over when they are submitted."""

    def submit(self, call: Callable[[int], None], item: int) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(call(item))
        return done


def test_results_come_in_order_however_the_calls_end(pool: ThreadPoolExecutor) -> None:
    second = threading.Event()

    def call(item: int) -> int:
        if item == 0:
            assert second.wait(10)  # ends after its successor
        if item == 1:
            second.set()
        return item * item

    assert list(prefetch_calls(pool, call, range(50), max_pending=4)) == [(n, n * n) for n in range(50)]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_never_more_calls_than_allowed_are_under_way_or_wait(pool: ThreadPoolExecutor, most: int) -> None:
    begun: list[int] = []
    for taken, (item, _) in enumerate(prefetch_calls(pool, begun.append, range(30), max_pending=most)):
        assert item == taken
        assert len(begun) <= taken + most
    assert sorted(begun) == list(range(30))


def test_calls_begin_in_bursts_of_half_of_the_most() -> None:
    begun: list[int] = []
    under_way = [
        len(begun) - item
        for item, _ in prefetch_calls(SubmitsAtOnce(), begun.append, range(32), max_pending=8)  # type: ignore[arg-type]
    ]
    assert under_way == [8, 7, 6, 5] * 7 + [4, 3, 2, 1]


def test_calls_do_run_ahead(pool: ThreadPoolExecutor) -> None:
    together = threading.Barrier(4)
    assert len(list(prefetch_calls(pool, lambda item: together.wait(10), range(8), max_pending=4))) == 8


def test_the_costs_of_what_is_under_way_stay_within_their_sum(pool: ThreadPoolExecutor) -> None:
    costs = [3, 3, 3, 9, 1, 1, 1, 1, 1, 1, 1, 50, 2, 2]
    begun: list[int] = []
    taken = 0
    for item, _ in prefetch_calls(
        pool, begun.append, range(len(costs)), max_pending=8, cost=costs.__getitem__, max_cost=6
    ):
        under_way = [costs[number] for number in begun if number > item]
        assert sum(under_way) <= 6 or len(under_way) == 1
        taken += 1
    assert taken == len(costs)


def test_a_single_call_is_allowed_whatever_it_costs() -> None:
    begun: list[int] = []
    calls = prefetch_calls(SubmitsAtOnce(), begun.append, range(9), max_pending=4, cost=lambda item: 100, max_cost=1)  # type: ignore[arg-type]
    assert [len(begun) - item for item, _ in calls] == [1] * 9


def test_the_items_may_be_endless_and_are_drawn_no_further_than_needed(pool: ThreadPoolExecutor) -> None:
    drawn = itertools.count()
    calls = prefetch_calls(pool, abs, drawn, max_pending=3)
    assert [next(calls) for _ in range(5)] == [(n, n) for n in range(5)]
    calls.close()  # type: ignore[attr-defined]
    assert next(drawn) <= 9


def test_an_error_comes_at_its_place_and_ends_the_iteration(pool: ThreadPoolExecutor) -> None:
    def call(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    calls = prefetch_calls(pool, call, range(100), max_pending=2)
    assert [next(calls), next(calls)] == [(0, 0), (1, 1)]
    with pytest.raises(KeyError):
        next(calls)
    assert list(calls) == []


def test_what_has_not_begun_when_the_consumer_leaves_is_never_begun() -> None:
    go, begun = threading.Event(), []

    def call(item: int) -> None:
        begun.append(item)
        assert item == 0 or go.wait(10)

    with ThreadPoolExecutor(1) as pool:
        calls = prefetch_calls(pool, call, range(100), max_pending=10)
        next(calls)
        calls.close()  # type: ignore[attr-defined]
        go.set()
    assert len(begun) <= 2


def test_nothing_comes_of_nothing(pool: ThreadPoolExecutor) -> None:
    assert list(prefetch_calls(pool, abs, [], max_pending=1)) == []


# Iterators that are drawn at the same time


def test_streams_come_one_after_the_other_however_fast_they_are() -> None:
    last_has_begun = threading.Event()

    def stream(number: int) -> Iterator[tuple[int, int]]:
        if number == 0:
            assert last_has_begun.wait(10)
        if number == 3:
            last_has_begun.set()
        yield from ((number, item) for item in range(number + 1))

    streams = [partial(stream, number) for number in range(10)]
    expected = [(number, item) for number in range(10) for item in range(number + 1)]
    assert list(prefetch_streams(streams, concurrency=4, max_pending=2)) == expected


def test_no_stream_is_drawn_further_than_it_may_be() -> None:
    drawn = [0, 0]

    def stream(number: int) -> Iterator[int]:
        for item in range(1000):
            drawn[number] += 1
            yield item

    items = prefetch_streams([partial(stream, 0), partial(stream, 1)], concurrency=2, max_pending=3)
    next(items)
    time.sleep(0.5)
    assert max(drawn) <= 6
    items.close()  # type: ignore[attr-defined]


def test_an_error_of_a_stream_comes_where_its_items_would_be() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    items = prefetch_streams([lambda: iter([0]), failing, lambda: iter([2])], concurrency=3, max_pending=1)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(KeyError, match="gone"):
        next(items)


def test_items_that_are_none_or_empty_are_items() -> None:
    assert list(prefetch_streams([lambda: iter([None, []]), lambda: iter(())], concurrency=2, max_pending=1)) == [
        None,
        [],
    ]
    assert list(prefetch_streams([], concurrency=2, max_pending=1)) == []

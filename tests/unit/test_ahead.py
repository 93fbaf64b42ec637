"""Calls ahead of their consumer: order, bounds, errors."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from imgbatch.ahead import ahead


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as opened:
        yield opened


def test_results_come_in_order_however_the_calls_end(pool: ThreadPoolExecutor) -> None:
    second = threading.Event()

    def call(item: int) -> int:
        if item == 0:
            assert second.wait(10)  # ends after its successor
        if item == 1:
            second.set()
        return item * item

    assert list(ahead(pool, call, range(50), most=4)) == [(n, n * n) for n in range(50)]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_never_more_calls_than_allowed_are_under_way_or_wait(pool: ThreadPoolExecutor, most: int) -> None:
    begun: list[int] = []
    for taken, (item, _) in enumerate(ahead(pool, begun.append, range(30), most=most)):
        assert item == taken
        assert len(begun) <= taken + most
    assert sorted(begun) == list(range(30))


def test_calls_do_run_ahead(pool: ThreadPoolExecutor) -> None:
    together = threading.Barrier(4)
    assert len(list(ahead(pool, lambda item: together.wait(10), range(8), most=4))) == 8


def test_the_costs_of_what_is_under_way_stay_within_their_sum(pool: ThreadPoolExecutor) -> None:
    costs = [3, 3, 3, 9, 1, 1, 1, 1, 1, 1, 1, 50, 2, 2]
    begun: list[int] = []
    taken = 0
    for item, _ in ahead(pool, begun.append, range(len(costs)), most=8, cost=costs.__getitem__, most_cost=6):
        under_way = [costs[number] for number in begun if number > item]
        assert sum(under_way) <= 6 or len(under_way) == 1
        taken += 1
    assert taken == len(costs)


def test_a_single_call_is_allowed_whatever_it_costs(pool: ThreadPoolExecutor) -> None:
    found = list(ahead(pool, abs, [-5, -6], most=4, cost=lambda item: 100, most_cost=1))
    assert found == [(-5, 5), (-6, 6)]


def test_the_items_may_be_endless_and_are_drawn_no_further_than_needed(pool: ThreadPoolExecutor) -> None:
    drawn = itertools.count()
    calls = ahead(pool, abs, drawn, most=3)
    assert [next(calls) for _ in range(5)] == [(n, n) for n in range(5)]
    calls.close()  # type: ignore[attr-defined]
    assert next(drawn) <= 9


def test_an_error_comes_at_its_place_and_ends_the_iteration(pool: ThreadPoolExecutor) -> None:
    def call(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    calls = ahead(pool, call, range(100), most=2)
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
        calls = ahead(pool, call, range(100), most=10)
        next(calls)
        calls.close()  # type: ignore[attr-defined]
        go.set()
    assert len(begun) <= 2


def test_nothing_comes_of_nothing(pool: ThreadPoolExecutor) -> None:
    assert list(ahead(pool, abs, [], most=1)) == []

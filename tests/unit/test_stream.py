"""Waiting with timeouts for iterators and calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from imgbatch.concurrency.monitor import on_tick
from imgbatch.concurrency.polling import call_with_timeout, poll_items
from imgbatch.errors import ClusterError


def test_items_arrive_in_order() -> None:
    assert [item for item in poll_items(iter(range(100)), 10) if item is not None] == list(range(100))
    assert [item for item in poll_items(iter(()), 10) if item is not None] == []


def test_error_is_raised_in_the_consumer() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("the worker")

    taken = poll_items(items(), 10)
    assert next(taken) == 1
    with pytest.raises(KeyError, match="the worker"):
        list(taken)


def test_blocked_iterator_yields_none_and_stall_raises() -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        gate.wait(60)
        yield 1

    taken = poll_items(items(), 60)
    assert next(taken) is None
    gate.set()
    assert 1 in list(taken)

    gate.clear()
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"cluster\.stall_timeout_s"):
        list(poll_items(items(), 0.5))
    gate.set()
    assert time.monotonic() - started < 30


def test_slow_consumer_is_not_a_stall() -> None:
    taken = poll_items(iter(range(3)), 0.1)
    seen = []
    for item in taken:
        if item is not None:
            seen.append(item)
            time.sleep(0.3)
    assert seen == [0, 1, 2]


def test_prefetched_items_are_limited() -> None:
    drawn = []

    def items() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    taken = poll_items(items(), 10)
    assert next(taken) == 0
    time.sleep(0.2)
    assert len(drawn) < 20


def test_closing_early_closes_the_source() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    taken = poll_items(items(), 10, closes=True)
    assert next(taken) == 0
    assert not closed.wait(0.5)
    taken.close()
    assert closed.wait(10)


def test_call_timeout_names_the_call_and_limit() -> None:
    gate = threading.Event()
    ticks = []
    with (
        pytest.raises(ClusterError, match=r"ray\.nodes did not return within 0\.6 s: .* same command"),
        on_tick(lambda: ticks.append(1)),
    ):
        call_with_timeout(gate.wait, 0.6, "ray.nodes")
    gate.set()
    assert len(ticks) >= 2


def test_result_or_error_of_a_call_is_passed_on() -> None:
    assert call_with_timeout(lambda: None, 60, "a call") is None

    def fails() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        call_with_timeout(fails, 60, "a call")


def test_exception_of_tick_ends_the_wait() -> None:
    def stop() -> None:
        raise KeyError("asked to stop")

    gate = threading.Event()
    with pytest.raises(KeyError, match="asked to stop"), on_tick(stop):
        call_with_timeout(gate.wait, 600, "a call")
    gate.set()

"""The monitor of a run: who calls `tick`, and what it calls."""

from __future__ import annotations

import threading

import pytest

from imgbatch.concurrency.monitor import on_tick, tick


def test_each_tick_makes_the_calls_of_all_blocks_around_it() -> None:
    calls: list[str] = []
    tick()
    with on_tick(lambda: calls.append("stop")):
        tick()
        with on_tick(lambda: calls.append("beat")):
            tick()
        tick()
    tick()
    assert calls == ["stop", "stop", "beat", "stop"]


def test_a_block_that_fails_leaves_nothing_behind() -> None:
    def stop() -> None:
        raise KeyError("asked to stop")

    with pytest.raises(KeyError), on_tick(stop):
        tick()
    tick()


def test_other_threads_are_not_of_the_run() -> None:
    calls: list[int] = []
    with on_tick(lambda: calls.append(1)):
        thread = threading.Thread(target=tick)
        thread.start()
        thread.join()
    assert calls == []

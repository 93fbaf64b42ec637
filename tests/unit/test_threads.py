"""What is told of threads that fail."""

from __future__ import annotations

import threading

import pytest
import ray

from imgbatch import connection


@pytest.mark.parametrize(
    ("there", "expected"), [(False, ["results"]), (True, ["ray-data-metadata-prefetch", "results"])]
)
def test_a_thread_that_finds_ray_gone_says_nothing(
    monkeypatch: pytest.MonkeyPatch, there: bool, expected: list[str]
) -> None:
    told: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda raised: told.append(raised.thread.name))
    monkeypatch.setattr(ray, "is_initialized", lambda: there)
    connection.hush_threads()

    for name in ("ray-data-metadata-prefetch", "results"):
        thread = threading.Thread(target=lambda: {}["nothing"], name=name)
        thread.start()
        thread.join()

    assert told == expected

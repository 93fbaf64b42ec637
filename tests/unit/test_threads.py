"""What is told of threads that fail."""

from __future__ import annotations

import threading

import pytest

from imgbatch import cluster


def test_threads_that_find_ray_gone_say_nothing_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda raised: told.append(raised.thread.name))
    cluster.hush_threads()

    for name in ("ray-data-metadata-prefetch", "results"):
        thread = threading.Thread(target=lambda: {}["nothing"], name=name)
        thread.start()
        thread.join()

    assert told == ["results"]

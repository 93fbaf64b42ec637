"""How training workers are placed: each within a node, and what is said where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from imgbatch import cluster
from imgbatch.config import ClusterConfig
from imgbatch.errors import ClusterError

TWO = [{"CPU": 8.0, "memory": 1e9}, {"CPU": 8.0}]
GPUS = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 2.0}]


def placed(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], workers: int, **more: Any) -> int:
    monkeypatch.setattr(cluster, "_alive", lambda: nodes)
    config = ClusterConfig(wait_s=1e-9)
    return cluster.cpus_of_each(workers, more.pop("asked", None), **{"gpus": False, "config": config, **more})


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "each"),
    [
        (TWO, 1, False, 8),
        (TWO, 2, False, 8),
        (TWO, 3, False, 4),
        (TWO, 5, False, 2),
        (GPUS, 1, True, 16),
        (GPUS, 4, True, 4),
    ],
)
def test_workers_have_as_many_cpus_as_their_nodes_allow(
    monkeypatch: pytest.MonkeyPatch, nodes: list, workers: int, gpus: bool, each: int
) -> None:
    assert placed(monkeypatch, nodes, workers, gpus=gpus) == each


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"workers": 17}, r"train.workers=17 ask for 1 CPUs each, the 2 nodes of the cluster hold 16 of them"),
        ({"workers": 3, "asked": 5}, r"train.workers=3 ask for 5 CPUs each, the 2 nodes of the cluster hold 2 of them"),
        ({"workers": 1, "gpus": True}, r"ask for 1 CPUs and a GPU each, .* hold 0 of them; waited 0 s"),
    ],
)
def test_workers_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        placed(monkeypatch, TWO, **more)

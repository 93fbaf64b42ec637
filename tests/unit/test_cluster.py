"""How training workers are placed: each within a node, and what is said where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from imgbatch.config.sections import ClusterConfig
from imgbatch.engine import placement
from imgbatch.errors import ClusterError

TWO = [{"CPU": 8.0, "memory": 1e9}, {"CPU": 8.0}]
GPUS = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 2.0}]


def placed(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], workers: int, **more: Any) -> int:
    monkeypatch.setattr(placement, "_node_resources", lambda: nodes)
    config = ClusterConfig(startup_timeout_s=1e-9)
    return placement.wait_for_cpus_per_worker(
        workers, more.pop("asked", None), **{"gpus": False, "config": config, **more}
    )


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
        ({"workers": 17}, r"train.workers=17 asks for 1 CPU each, the 2 nodes of the cluster have room for 16"),
        (
            {"workers": 3, "asked": 5},
            r"train.workers=3 asks for 5 CPUs each, the 2 nodes of the cluster have room for 2",
        ),
        ({"workers": 1, "gpus": True}, r"asks for 1 CPU and a GPU each, .* have room for 0; waited 0 s"),
    ],
)
def test_workers_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        placed(monkeypatch, TWO, **more)


def plan(**more: Any) -> placement.Plan:
    found = {"split": False, "actors": 16, "min_actors": 1, "max_actors": 16, "gpus_per_actor": 1.0, "cpus": 16,
             "gpus": 0.0, "nodes": 2, **more}  # fmt: skip
    return placement.Plan(**found)


LEFT_OUT = {"0123456789abcdef": {"host": "worker-7", "why": "its logits differ"}}


def test_a_node_that_is_left_out_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_node_resources", lambda left_out=(): GPUS[1:] if left_out else GPUS)
    assert placement.exclude_nodes(plan(), {}) == plan()
    found = placement.exclude_nodes(plan(actors=18, max_actors=18, min_actors=5), LEFT_OUT)
    assert (found.actors, found.min_actors, found.max_actors, found.nodes, found.cpus) == (2, 2, 2, 1, 2)
    assert found.left_out == ("0123456789abcdef",) and placement.exclude_nodes(found, LEFT_OUT) is found
    grows = placement.exclude_nodes(plan(actors=18, max_actors=40), LEFT_OUT)
    assert (grows.actors, grows.max_actors) == (2, 40), "a cluster that grows may still grow"


@pytest.mark.parametrize(("rest", "split"), [([], False), ([{"memory": 1e9}], False), (GPUS[1:], True)])
def test_a_run_whose_last_worker_is_left_out_names_the_nodes(
    monkeypatch: pytest.MonkeyPatch, rest: list, split: bool
) -> None:
    monkeypatch.setattr(placement, "_node_resources", lambda left_out=(): rest)
    with pytest.raises(ClusterError, match=r"no worker is left.*worker-7 \(node 0123456789ab\): its logits differ"):
        placement.exclude_nodes(plan(split=split), LEFT_OUT)


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        (4, "train.workers=4 with cluster.device=cuda asks for a GPU each, the cluster has 0 GPUs; waited"),
        (None, "cluster.min_actors=1 with cluster.gpus_per_actor=1 asks for 1 GPU, the cluster has 0; waited"),
    ],
)
def test_gpus_that_are_not_there_are_named_by_who_asks_for_them(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, said: str
) -> None:
    monkeypatch.setattr(placement, "_node_resources", lambda: TWO)
    with pytest.raises(ClusterError) as refused:
        placement.wait_for_plan(ClusterConfig(device="cuda", startup_timeout_s=1e-9), workers=workers)
    assert said in str(refused.value)
    assert ("min_actors" in str(refused.value)) == (workers is None)


def test_one_of_a_thing_is_singular(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_node_resources", lambda: [{"CPU": 1.0}])
    assert str(placement.wait_for_plan(ClusterConfig())).startswith(
        "1 node, 1 CPU: 1 actor to fetch, decode and classify"
    )

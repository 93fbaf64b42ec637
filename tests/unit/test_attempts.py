"""The attempts at pending images: smaller units where processes die, the same units where nodes are at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.config.sections import ClusterConfig
from imgbatch.engine import placement
from imgbatch.engine.attempts import abort_if_systemic, run_attempts
from imgbatch.engine.dataset import Attempt
from imgbatch.engine.placement import Plan
from imgbatch.engine.units import ROUNDS, Round, cut_units
from imgbatch.errors import ClusterError
from imgbatch.ledger.work_plan import WorkPlan

PLAN = Plan(split=False, actors=2, min_actors=1, max_actors=2, gpus_per_actor=1.0, cpus=2, gpus=0.0, nodes=2)
LEFT_OUT = {"two": {"host": "b", "why": "its logits differ"}}


@dataclass
class Images:
    """A consumer of blocks whose rows are the numbers of images."""

    count: int = 100
    tars: tuple[int, ...] = ()
    arrived: int = 0
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    attempts: list[tuple[int, int]] = field(default_factory=list)
    """The number of pending images and the size of units of each attempt."""

    def __post_init__(self) -> None:
        shards: Any = dict.fromkeys(self.tars)
        self.work_plan = WorkPlan(np.ones(self.count, bool), np.zeros((0, 2), np.int64), shards)

    def run(self, operators: Callable[[Attempt], Iterator[pa.Table]], retried: int = 0) -> None:
        """Take the blocks of all attempts."""
        config = ClusterConfig(stall_timeout_s=60)
        note = self.attempts.append
        for block in run_attempts(
            operators, PLAN, self, config, retried=retried, on_attempt=lambda pending, rows: note((pending, rows))
        ):
            if block is not None:
                self.take(block)

    def take(self, block: pa.Table) -> None:
        numbers = block["index"].to_numpy()
        self.arrived += int(self.work_plan.pending[numbers].sum())
        self.work_plan.mark_arrived(numbers[~np.isin(numbers, self.tars)])


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The ids of the nodes that are alive, which a test may change."""
    alive = {"one", "two"}
    monkeypatch.setattr(placement, "node_ids", lambda config: set(alive))
    monkeypatch.setattr(placement, "_node_resources", lambda left_out=(): [{"CPU": 1.0} for _ in alive - set(left_out)])
    return alive


def killing(*numbers: int) -> Callable[[Attempt], Iterator[pa.Table]]:
    """Return operators that lose each unit with one of these images in it."""

    def operators(attempt: Attempt) -> Iterator[pa.Table]:
        for unit in cut_units(attempt.work_plan, attempt.round, attempt.plan.actors):
            if not np.isin(unit["index"].to_numpy(), numbers).any():
                yield unit

    return operators


def test_what_kills_its_process_is_narrowed_down_to_single_images(nodes: set[str]) -> None:
    images = Images(200)
    images.run(killing(5, 150))
    assert np.flatnonzero(images.work_plan.pending).tolist() == [5, 150] and images.arrived == 198
    sizes = [rows for _, rows in images.attempts]
    assert sizes == [round.rows for round in ROUNDS]
    lost = [pending for pending, _ in images.attempts]
    assert lost[0] == 200 > lost[1] > lost[2] > 2


def test_nothing_is_handed_out_again_where_all_rows_come(nodes: set[str]) -> None:
    images = Images()
    images.run(killing())
    assert images.attempts == [(100, ROUNDS[0].rows)] and not images.work_plan.pending.any()


def test_what_a_lost_node_had_is_handed_out_in_units_of_the_same_size(
    nodes: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    images = Images()

    def operators(attempt: Attempt) -> Iterator[pa.Table]:
        yield from killing(*([5] if "two" in nodes else []))(attempt)
        nodes.discard("two")

    images.run(operators)
    assert [rows for _, rows in images.attempts] == [ROUNDS[0].rows] * 2 and not images.work_plan.pending.any()
    assert [record.getMessage() for record in caplog.records] == [
        "nodes were lost in the middle of a run: their images are submitted again"
    ]


def test_nodes_that_are_lost_again_and_again_without_a_row_end_the_run(nodes: set[str]) -> None:
    images = Images()

    def operators(attempt: Attempt) -> Iterator[pa.Table]:
        nodes.clear()
        nodes.update({f"node {len(images.attempts)}"})
        yield from ()

    with pytest.raises(ClusterError, match="100 images were lost on 2 node"):
        images.run(operators)
    assert [rows for _, rows in images.attempts] == [round.rows for round in ROUNDS]


def test_an_attempt_ends_where_a_node_is_left_out_and_the_others_get_its_units(nodes: set[str]) -> None:
    images, plans = Images(), []

    def operators(attempt: Attempt) -> Iterator[pa.Table]:
        plans.append(attempt.plan)
        for unit in cut_units(attempt.work_plan, attempt.round, attempt.plan.actors):
            yield unit
            images.left_out = LEFT_OUT

    images.run(operators)
    assert [plan.left_out for plan in plans] == [(), ("two",)] and [plan.nodes for plan in plans] == [2, 1]
    assert [rows for _, rows in images.attempts] == [ROUNDS[0].rows] * 2 and images.attempts[1][0] < 100
    assert not images.work_plan.pending.any()


def test_an_attempt_ends_for_a_plan_with_more_actors_and_its_units_are_submitted_again(nodes: set[str]) -> None:
    images, plans = Images(), []

    def operators(attempt: Attempt) -> Iterator[pa.Table]:
        plans.append(attempt.plan.actors)
        yield from killing()(attempt)

    larger = replace(PLAN, actors=5, max_actors=5)
    for block in run_attempts(operators, PLAN, images, ClusterConfig(), replan=lambda plan: larger):
        if block is not None:
            images.take(block)
    assert plans == [2, 5] and not images.work_plan.pending.any()


@pytest.mark.parametrize(
    ("config", "cpus", "actors"),
    [
        (ClusterConfig(), [2.0, 2.0], 4),  # a node has joined
        (ClusterConfig(max_actors=3), [2.0, 2.0], 3),
        (ClusterConfig(max_actors=2), [2.0, 2.0], 2),  # the limit of the user is reached
        (ClusterConfig(), [1.0], 2),  # a node is gone: the attempt goes on
        (ClusterConfig(device="cuda"), [4.0], 2),
    ],
)
def test_new_nodes_are_used_up_to_the_limit(
    config: ClusterConfig, cpus: list[float], actors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_node_resources", lambda left_out=(): [{"CPU": count} for count in cpus])
    plan = placement.with_new_nodes(PLAN, config)
    assert plan.actors == actors and (plan is PLAN) == (actors == PLAN.actors)


def test_a_tar_is_read_on_as_long_as_rows_come(nodes: set[str]) -> None:
    images, left = Images(1, tars=(0,)), 5

    def operators(attempt: Attempt) -> Iterator[pa.Table]:
        nonlocal left
        if left:
            left -= 1
            yield pa.table({"index": [0]})

    images.run(operators)
    assert [rows for _, rows in images.attempts] == [4096, 16, 1, 1, 1, 1] and images.work_plan.pending[0]


def test_the_operators_end_when_the_caller_stops(nodes: set[str]) -> None:
    ended = Event()

    def operators(attempt: Attempt) -> Iterator[pa.Table]:
        try:
            while True:
                yield pa.table({"index": [0]})
        finally:
            ended.set()

    blocks = run_attempts(operators, PLAN, Images(), ClusterConfig())
    assert next(block for block in blocks if block is not None)["index"].to_pylist() == [0]
    blocks.close()
    assert ended.wait(60) and list(blocks) == []


FIRST, SECOND, LAST = ROUNDS


@pytest.mark.parametrize(
    ("lost", "arrived", "round", "retried"),
    [
        (200, 1000, LAST, 0),  # of which each may have killed its process
        (300, 900, FIRST, 0),  # a large unit went with one of its images
        (21, 0, SECOND, 0),  # all may have gone with one of them
        (20, 0, LAST, 0),
        (21, 0, LAST, 21),  # they died in an earlier run, perhaps
        (0, 0, LAST, 0),
    ],
)
def test_a_few_lost_images_are_their_own_fault(lost: int, arrived: int, round: Round, retried: int) -> None:
    abort_if_systemic(lost, arrived, round, nodes=1, retried=retried)


@pytest.mark.parametrize(("lost", "arrived", "round", "retried"), [(300, 900, SECOND, 0), (21, 0, LAST, 20)])
def test_many_lost_images_are_the_clusters_fault(lost: int, arrived: int, round: Round, retried: int) -> None:
    with pytest.raises(ClusterError, match=f"{lost} images were lost on 3 node"):
        abort_if_systemic(lost, arrived, round, nodes=3, retried=retried)

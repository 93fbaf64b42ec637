"""Ray: attempts at the pending images, in ever smaller units, until each has a row or has ended its process several times.

If a process dies, all units that it holds are lost, and it is unknown which of their images killed it. So images without a
row are submitted again in smaller units, and finally one by one: an image that is missing then has killed its process alone.
If nodes are lost, or their workers give wrong answers, the images are not the cause: such an attempt is repeated with units
of the same size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.polling import poll_items
from imgbatch.config.sections import ClusterConfig
from imgbatch.engine import placement
from imgbatch.engine.dataset import Attempt
from imgbatch.engine.placement import Plan
from imgbatch.engine.units import ROUNDS, Round
from imgbatch.errors import ClusterError
from imgbatch.ledger.work_plan import WorkPlan

log = logging.getLogger(__name__)

_MAX_KILLERS, _MAX_KILLERS_ALONE = 200, 20


class Consumer(Protocol):
    """The receiver of the blocks of all attempts. It records which images have arrived."""

    @property
    def work_plan(self) -> WorkPlan:
        """The pending images and streams. The consumer marks images as arrived when it takes their rows."""

    @property
    def arrived(self) -> int:
        """The number of images with a row."""

    @property
    def left_out(self) -> Mapping[str, Mapping[str, str]]:
        """The nodes that get no work, since their workers give wrong answers: `host` and `why` by the node's id."""


Operators = Callable[[Attempt], Iterator[pa.Table]]
"""Runs the operators on the pending images; yields blocks of rows."""


def run_attempts(
    operators: Operators,
    plan: Plan,
    consumer: Consumer,
    config: ClusterConfig,
    *,
    on_attempt: Callable[[int, int], object] = lambda pending, rows: None,
    retried: int = 0,
    replan: Callable[[Plan], Plan] = lambda plan: plan,
) -> Generator[pa.Table | None, None, None]:
    """Yield the blocks of all attempts, and None whenever a quarter of a second passes without one.

    The caller must pass each block to `consumer` before it requests the next one. Closing the generator ends the current
    attempt. Images that are pending when the generator ends have killed their process in each attempt.

    Args:
        operators: called for each attempt, in a thread.
        plan: where actors fit, with all nodes.
        on_attempt: called before each attempt with the number of pending images and the maximum size of a unit.
        retried: how many of the images may have killed their process in an earlier run.
        replan: called after each block with the plan. If it returns another one, the attempt ends early, and the images that
            are pending are submitted to the actors of that plan.

    Raises:
        ClusterError: no row for `cluster.stall_timeout_s`; so many images without a row that the cluster must be at fault;
            no node is left; or the cluster does not answer.
    """
    return _Attempts(operators, plan, consumer, config, on_attempt, retried, replan).run()


@dataclass
class _Attempts:
    """The arguments of `run_attempts`, and the number of rows at the last check for progress. `plan` may change."""

    operators: Operators
    plan: Plan
    consumer: Consumer
    config: ClusterConfig
    on_attempt: Callable[[int, int], object]
    retried: int
    replan: Callable[[Plan], Plan]
    arrived_before: int = 0

    def run(self) -> Generator[pa.Table | None, None, None]:
        """Yield the blocks of all rounds, one round after the other."""
        for round in ROUNDS:
            while self.consumer.work_plan.remaining:
                nodes, left_out, plan = placement.node_ids(self.config), len(self.consumer.left_out), self.plan
                yield from self.attempt(round)
                # Images of a node that was left out, or of an attempt that was ended for another plan, are still pending. They
                # are submitted in units of the same size, since they killed no process.
                if len(self.consumer.left_out) > left_out or self.plan is not plan:
                    continue
                # A replaced node has another id, so that a node that was restarted counts as lost. Without progress, images may
                # be the reason why nodes die, which only smaller units can show.
                if nodes <= placement.node_ids(self.config) or not self.made_progress():
                    break
                log.warning("nodes were lost in the middle of a run: their images are submitted again")
            lost = self.consumer.work_plan.remaining
            abort_if_systemic(lost, self.consumer.arrived, round, nodes=self.plan.nodes, retried=self.retried)
        # A stream is one unit in each round. Each of its images may kill a process, and each attempt gets past some of them.
        while self.consumer.work_plan.streams and self.consumer.work_plan.remaining and self.made_progress():
            yield from self.attempt(ROUNDS[-1])

    def attempt(self, round: Round) -> Generator[pa.Table | None, None, None]:
        """Yield the blocks of one pass over the pending images; end early when another node is left out."""
        work_plan, left_out = self.consumer.work_plan, len(self.consumer.left_out)
        plan = placement.exclude_nodes(self.plan, self.consumer.left_out)
        self.on_attempt(work_plan.remaining, round.rows)
        # `closes`: an attempt may be left early, and its threads must not outlive Ray (see `session.connected`).
        blocks = poll_items(self.operators(Attempt(work_plan, round, plan)), self.config.stall_timeout_s, closes=True)
        with closing(blocks):
            for block in blocks:
                tick()
                yield block
                if len(self.consumer.left_out) > left_out:
                    return
                if (other := self.replan(self.plan)) is not self.plan:
                    self.plan = other
                    return

    def made_progress(self) -> bool:
        """Return whether rows have arrived since the last call. Otherwise another such attempt would not help either."""
        before, self.arrived_before = self.arrived_before, self.consumer.arrived
        return self.arrived_before > before


def abort_if_systemic(lost: int, arrived: int, round: Round, *, nodes: int, retried: int = 0) -> None:
    """Abort if so many images were lost in a round that the cluster must be at fault; no rejects are recorded for them.

    Args:
        lost: the number of images without a row after the round.
        arrived: the number of images with a row.
        nodes: the number of nodes, for the message.
        retried: how many of the images may have killed their process in an earlier run.

    Raises:
        ClusterError: more than 200 images, and more than the proportion `round.max_lost` of all, are lost. After the last
            round also if no row has arrived, and more than 20 images, or more than `retried`, are lost.
    """
    is_last_round = round is ROUNDS[-1]
    if lost > max(_MAX_KILLERS, round.max_lost * (lost + arrived)) or (
        is_last_round and not arrived and lost > max(_MAX_KILLERS_ALONE, retried)
    ):
        raise ClusterError(
            f"{lost:,} images were lost on {nodes} node(s): their processes die regardless of the image; "
            "look at Ray's worker logs, then run the same command again"
        )

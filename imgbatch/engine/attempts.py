"""Ray: attempts at the pending images, in ever smaller units, until each has a row or has ended its process several times.

A process that dies takes along all units that it holds, and nothing tells which of their images killed it. So images
without a row are handed out again in smaller units, and at last one by one: what is missing then has killed its process
alone. Nodes that are lost, or whose workers give wrong answers, are no fault of the images: such an attempt is repeated
with units of the same size.
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
    """What takes the blocks of the attempts, and keeps the account of them."""

    @property
    def work_plan(self) -> WorkPlan:
        """Which images and tars are pending. The consumer clears those whose rows have arrived."""

    @property
    def arrived(self) -> int:
        """How many images have a row."""

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
) -> Generator[pa.Table | None, None, None]:
    """Yield the blocks of all attempts, and None whenever a quarter of a second passes without one.

    The consumer takes each block before it asks for the next, so that `consumer` is up to date. Closing the generator
    ends the attempt that is running. What is pending when the generator has ended has killed its process each time.

    Args:
        operators: called for each attempt, in a thread.
        plan: where actors fit, with all nodes.
        on_attempt: called before each attempt with the number of pending images and the maximum size of a unit.
        retried: how many of the images may have killed their process in an earlier run.

    Raises:
        ClusterError: no row for `cluster.stall_timeout_s`; so many images without a row that the cluster must be at fault;
            no node is left; or the cluster does not answer.
    """
    return _Attempts(operators, plan, consumer, config, on_attempt, retried).run()


@dataclass
class _Attempts:
    """The arguments of `run_attempts`, and how many rows there were when it was last asked for progress."""

    operators: Operators
    plan: Plan
    consumer: Consumer
    config: ClusterConfig
    on_attempt: Callable[[int, int], object]
    retried: int
    arrived_before: int = 0

    def run(self) -> Generator[pa.Table | None, None, None]:
        """Yield the blocks of one round after the other."""
        for round in ROUNDS:
            while self.consumer.work_plan.remaining:
                nodes, left_out = placement.node_ids(self.config), len(self.consumer.left_out)
                yield from self.attempt(round)
                # What a left-out node had is pending still. The others get it in units of the same size: it killed nothing.
                if len(self.consumer.left_out) > left_out:
                    continue
                # A node that is replaced has another id, so that a node that came back counts as lost. Without progress
                # the nodes may be dying of the images, which only smaller units can tell.
                if nodes <= placement.node_ids(self.config) or not self.made_progress():
                    break
                log.warning("nodes were lost in the middle of a run: what they had is handed out again")
            lost = self.consumer.work_plan.remaining
            abort_if_systemic(lost, self.consumer.arrived, round, nodes=self.plan.nodes, retried=self.retried)
        # A tar is one unit in each round. Each of its members may kill a process, and each attempt gets past some of them.
        while self.consumer.work_plan.tars and self.consumer.work_plan.remaining and self.made_progress():
            yield from self.attempt(ROUNDS[-1])

    def attempt(self, round: Round) -> Generator[pa.Table | None, None, None]:
        """Yield the blocks of one pass over what is pending; end early when another node is left out."""
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

    def made_progress(self) -> bool:
        """Return whether rows have arrived since this was last asked: without, another such attempt would not help either."""
        before, self.arrived_before = self.arrived_before, self.consumer.arrived
        return self.arrived_before > before


def abort_if_systemic(lost: int, arrived: int, round: Round, *, nodes: int, retried: int = 0) -> None:
    """Abort if so many images were lost in a round that the cluster must be at fault; no rejects are recorded for them.

    Args:
        lost: how many images have no row after the round.
        arrived: how many have one.
        nodes: of the cluster, for the message.
        retried: how many of the images may have killed their process in an earlier run.

    Raises:
        ClusterError: more than 200 images, and more than the share `round.max_lost` of all, are lost. After the last round also
            if not one has arrived and more than 20 are lost, apart from those that were retried.
    """
    last = round is ROUNDS[-1]
    if lost > max(_MAX_KILLERS, round.max_lost * (lost + arrived)) or (
        last and not arrived and lost > max(_MAX_KILLERS_ALONE, retried)
    ):
        raise ClusterError(
            f"{lost:,} images never came back from {nodes} node(s): their processes die whatever the image is; "
            "look at Ray's worker logs, then run the same command again"
        )

"""Ray: the operators of a run as a Ray dataset: from numbers of pending images to blocks of rows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imgbatch.engine.placement import Plan
from imgbatch.engine.units import Round, cut_units
from imgbatch.errors import ClusterError
from imgbatch.inference.worker import CHUNK, Classify, Work, Worker
from imgbatch.ledger.work_plan import WorkPlan

if TYPE_CHECKING:
    from ray.data import DataContext, Dataset

TRIES = 2
"""How often Ray tries a task that kills its process, before the driver submits smaller units. Ray's default is no limit."""

_INIT_DEATHS = (
    8  # deaths of actors in a row at their start: a lost node must not end the run, a broken installation must
)
_NODE_LABEL = "ray.io/node-id"  # which Ray gives each node
_STREAMED_BYTES = 1 << 17  # of rows in a block: rows of a task reach the driver while the task is still running
_OPTIONS: dict[str, Any] = {"batch_format": "pyarrow", "zero_copy_batch": True}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One pass over the pending images: which they are, how they are cut into units, and where they are processed."""

    work_plan: WorkPlan
    round: Round
    plan: Plan


class Images:
    """The pending images of an attempt, and the operators that process them, in the order in which they are added.

    Iterating runs the operators and yields the blocks of rows, in any order; those of a stream in its order.
    A block whose task kills its process `TRIES` times is omitted: the images in it get no row.
    """

    def __init__(self, attempt: Attempt, work: Work) -> None:
        import ray

        plan = attempt.plan
        context = _configured_context()
        # It is set in any case, since the context outlives a run.
        context.execution_options.label_selector = (
            {_NODE_LABEL: f"!in({','.join(plan.left_out)})"} if plan.left_out else None
        )
        if not plan.split:
            context.target_max_block_size = _STREAMED_BYTES
        tables = list(cut_units(attempt.work_plan, attempt.round, plan.actors))
        self._plan, self._round, self._units = plan, attempt.round, len(tables)
        self._work = replace(work, node=_this_node)
        # from_arrow would start tasks that return the sizes of the tables: too many workers, one second before the actors.
        self._images: Dataset = ray.data.from_blocks(tables)

    def map_tasks(self, function: Callable[..., Iterator[pa.Table]]) -> Images:
        """Apply `function(block, work, isolated)` in tasks of one CPU each."""
        arguments = {"work": self._work, "isolated": self._round.isolated}
        self._images = self._images.map_batches(
            function, fn_kwargs=arguments, batch_size=None, num_cpus=1, max_retries=TRIES - 1, **_OPTIONS
        )
        return self

    def map_gpu_actors(self, operator: type[Classify]) -> Images:
        """Apply an operator in actors that have their share of a GPU, and no CPU of their own."""
        rows, gpus = min(self._round.rows, CHUNK), self._plan.gpus_per_actor
        # With two calls, pixels are transferred while other images are labelled.
        actors = self._actors(calls=1 if self._round.isolated else 2, initial=self._plan.min_actors)
        self._images = self._images.map_batches(
            operator, batch_size=rows, num_cpus=0, num_gpus=gpus, **actors, **_OPTIONS
        )
        return self

    def map_actors(self, operator: type[Worker]) -> Images:
        """Apply an operator in actors of one CPU each."""
        actors = self._actors(calls=1, initial=self._plan.actors)
        arguments = {"isolated": self._round.isolated}
        self._images = self._images.map_batches(
            operator, fn_constructor_kwargs=arguments, batch_size=None, num_cpus=1, **actors, **_OPTIONS
        )
        return self

    def __iter__(self) -> Iterator[pa.Table]:
        """Run the operators.

        Raises:
            ClusterError: Ray ended the job.
        """
        from ray.exceptions import RayError

        try:
            yield from self._images.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        except RayError as error:
            raise ClusterError(
                f"Ray ended the job: {str(error).strip().splitlines()[0]}; run the same command again"
            ) from error

    def _actors(self, *, calls: int, initial: int) -> dict[str, Any]:
        """Return the options of an operator in actors.

        Args:
            calls: the maximum number of concurrent calls per actor.
            initial: the number of actors at the start. With GPUs, Ray balances both operators and removes surplus actors: so
                the caller starts with the minimum there, and Ray adds actors.
        """
        from ray.data import ActorPoolStrategy

        pool = ActorPoolStrategy(
            min_size=min(self._plan.min_actors, self._units),
            max_size=min(self._plan.max_actors, self._units),
            initial_size=min(initial, self._units),
            max_tasks_in_flight_per_actor=1 if self._round.isolated else 2 * calls,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=True,
        )
        return {
            "compute": pool,
            "fn_constructor_args": (self._work,),
            "max_restarts": -1,
            "max_task_retries": TRIES - 1,
        }


def _this_node() -> str:
    """Return the id of the node of this process."""
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def _configured_context() -> DataContext:
    """Return the context of later datasets, without progress bars and reports."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # lost images are submitted again in smaller units; the job does not fail
    context.max_consecutive_actor_init_deaths = _INIT_DEATHS
    # Ray Data has no other parameters for restarts and retries yet (2.60).
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return context

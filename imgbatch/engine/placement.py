"""Ray: what of Ray a run may use, and the operators that label images on it."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.polling import call_with_timeout
from imgbatch.config.sections import ClusterConfig
from imgbatch.engine.capacity import Costs, images_per_second
from imgbatch.engine.units import Round, units
from imgbatch.errors import ClusterError
from imgbatch.inference.worker import CHUNK, Classify, LabelImages, Work, Worker, decode_block
from imgbatch.ledger.listing import WorkPlan
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted, plural

if TYPE_CHECKING:
    from ray.data import DataContext

log = logging.getLogger(__name__)

Found = TypeVar("Found")

_REMIND_S = 20.0
TRIES = 2
"""How often a task is tried that kills its process, before the driver narrows it down. Ray's default is for ever."""

_INIT_DEATHS = 8  # in a row, of actors that only import: a node that goes away is no reason to end, a broken one is
_NODE_LABEL = "ray.io/node-id"  # which Ray gives each node
_STREAMED_BYTES = 1 << 17  # of rows in a block: what a task has labelled reaches the driver while it goes on


@dataclass(frozen=True, slots=True)
class Plan:
    """Which actors fit, and where."""

    split: bool
    """Fetch and decode as CPU tasks, classify on GPUs; otherwise everything in one actor a core."""
    actors: int
    """How many classify actors fit now."""
    min_actors: int
    max_actors: int
    """More than fit now is possible where the cluster grows."""
    gpus_per_actor: float
    cpus: int
    gpus: float
    nodes: int
    left_out: tuple[str, ...] = ()
    """The ids of nodes that get no work: their workers give wrong answers."""

    @property
    def one_machine(self) -> bool:
        """Whether all actors will run on the node of the driver, as long as nobody adds one."""
        return self.nodes == 1 and self.max_actors <= self.actors

    def __str__(self) -> str:
        where = f"{counted(self.nodes, 'node')}, {counted(self.cpus, 'CPU')}"
        pool = counted(self.actors, "actor") + f", up to {self.max_actors}" * (self.max_actors > self.actors)
        if self.split:
            prepared = (
                f"some {round(images_per_second(Costs(), self.cpus, self.gpus), -2):,.0f} photos of 110 kB a second"
            )
            return (
                f"{where}, {counted(self.gpus, 'GPU')}: {pool} to classify, CPU tasks to fetch and decode ({prepared})"
            )
        return f"{where}: {pool} to fetch, decode and classify"


def plan(config: ClusterConfig, *, workers: int | None = None) -> Plan:
    """Wait until the cluster has what the run asks for, and say what fits it.

    Args:
        workers: of a training, which messages then name; None: the run labels images.

    Raises:
        ClusterError: it does not, `cluster.startup_timeout_s` seconds long, or does not answer.
    """
    console.step("waiting for CPUs and GPUs")
    found = _awaited(partial(_look, config, workers), partial(_ask, config), config.startup_timeout_s, config.call_s)
    log.info("%s", found)
    return found


def cpus_of_each(workers: int, asked: int | None, *, gpus: bool, config: ClusterConfig) -> int:
    """Return how many CPUs each of so many training workers may have, with a GPU each or none: as many as nodes allow.

    Args:
        asked: that many and no other number.

    Raises:
        ClusterError: they do not fit, `cluster.startup_timeout_s` seconds long, or the cluster does not answer.
    """

    def look() -> int | str:
        alive = _alive()
        most = max((int(node.get("CPU", 0)) for node in alive), default=0)
        fitting = 0
        for each in [asked] if asked else range(most, 0, -1):
            places = (int(min(node.get("CPU", 0) // each, node.get("GPU", 0) if gpus else math.inf)) for node in alive)
            fitting = sum(places)
            if fitting >= workers:
                return each
        wants = f"{counted(asked or 1, 'CPU')}{' and a GPU' * gpus}"
        nodes = (
            f"the {counted(len(alive), 'node')} of the cluster {plural(len(alive), 'has', 'have')} room for {fitting}"
        )
        return f"train.workers={workers} asks for {wants} each, {nodes}"

    def ask() -> Callable[[], None]:
        """Ask for room for all of them at once, which waits until it is there; tasks would run one after the other."""
        from ray.util import placement_group, remove_placement_group

        each = {"CPU": float(asked or 1)} | ({"GPU": 1.0} if gpus else {})
        return partial(remove_placement_group, placement_group([each] * workers))

    return _awaited(look, ask, config.startup_timeout_s, config.call_s)


def _awaited(
    look: Callable[[], Found | str],
    ask: Callable[[], Callable[[], None]],
    wait_s: float,
    call_s: float,
) -> Found:
    """Return what `look` finds, once it is there. Meanwhile the cluster is asked for it; what `ask` returns takes that back.

    Where a call does not return, or `tick` raises, nothing is taken back: it ends with this process.
    """
    started = time.monotonic()
    said = started - _REMIND_S
    withdraw: Callable[[], None] | None = None
    while isinstance(found := call_with_timeout(look, call_s, "ray.nodes"), str):
        now = time.monotonic()
        if now - started >= wait_s:
            break
        if now - said >= _REMIND_S:
            log.warning("%s; waiting up to %.0f s", found, wait_s)
            said = now
        withdraw = withdraw or call_with_timeout(ask, call_s, "a request for resources to Ray")
        tick()
        time.sleep(min(1.0, wait_s))
    if withdraw is not None:
        call_with_timeout(withdraw, call_s, "the end of a request for resources to Ray")
    if isinstance(found, str):
        raise ClusterError(f"{found}; waited {wait_s:.0f} s (cluster.startup_timeout_s)")
    return found


def _alive(left_out: Collection[str] = ()) -> list[dict[str, float]]:
    """Return what each node has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in left_out]


def without(found: Plan, left_out: Mapping[str, Mapping[str, str]]) -> Plan:
    """Return the plan for what remains when nodes get no work any more.

    Args:
        left_out: by the id of the node its `host`, and `why` it is left out.

    Raises:
        ClusterError: no other node has what a worker needs, or the cluster does not answer.
    """
    if set(left_out) <= set(found.left_out):
        return found
    alive = call_with_timeout(partial(_alive, left_out), ClusterConfig().call_s, "ray.nodes")
    cpus, gpus = sum(int(node.get("CPU", 0)) for node in alive), sum(node.get("GPU", 0.0) for node in alive)
    each = found.gpus_per_actor
    fitting = sum(int(node.get("GPU", 0.0) / each + 1e-9) for node in alive) if found.split else cpus
    if not fitting or not cpus:
        named = "; ".join(f"{told['host']} (node {name[:12]}): {told['why']}" for name, told in left_out.items())
        raise ClusterError(
            "no worker is left: the model cannot be run, or gives wrong answers, on each node that could run one: "
            f"{named}. Look at the hardware and the installation of these nodes, or set classify.dtype=float32, then run the "
            "same command again"
        )
    most = max(1, min(found.max_actors, fitting) if found.max_actors <= found.actors else found.max_actors)
    return replace(
        found, actors=min(fitting, most), min_actors=min(found.min_actors, fitting, most), max_actors=most, cpus=cpus,
        gpus=gpus, nodes=len(alive), left_out=tuple(left_out),
    )  # fmt: skip


def this_node() -> str:
    """Return the id of the node of this process."""
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def _look(config: ClusterConfig, workers: int | None = None) -> Plan | str:
    """Return what fits now, or what is missing: the thing asked for and the thing found."""
    alive = _alive()
    cpus = sum(int(node.get("CPU", 0)) for node in alive)
    gpus = sum(node.get("GPU", 0.0) for node in alive)
    split = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    each = config.gpus_per_actor
    fitting = sum(int(node.get("GPU", 0.0) / each + 1e-9) for node in alive) if split else cpus
    if split and fitting < config.min_actors:
        if workers is not None:
            return (
                f"train.workers={workers} with cluster.device=cuda asks for a GPU each, the cluster has {gpus:g} GPUs"
            )
        asked = f"cluster.min_actors={config.min_actors} with cluster.gpus_per_actor={each:g}"
        return f"{asked} asks for {counted(config.min_actors * each, 'GPU')}, the cluster has {gpus:g}"
    if cpus < (1 if split else config.min_actors):
        asked = (
            "fetching and decoding asks for 1 CPU"
            if split
            else f"cluster.min_actors={config.min_actors} asks for {counted(config.min_actors, 'CPU')}"
            if workers is None
            else "reading images asks for 1 CPU"
        )
        return f"{asked}, the cluster has {cpus}"
    most = fitting if config.max_actors is None else config.max_actors
    return Plan(split, min(fitting, most), config.min_actors, most, each, cpus, gpus, len(alive))


def nodes(config: ClusterConfig) -> set[str]:
    """Return the names of the nodes that are alive; one that is replaced has another name.

    Raises:
        ClusterError: the cluster does not answer.
    """
    import ray

    return {node["NodeID"] for node in call_with_timeout(ray.nodes, config.call_s, "ray.nodes") if node["Alive"]}


def _ask(config: ClusterConfig) -> Callable[[], None]:
    """Put up tasks that want what the run wants: a cluster that scales from zero grows for them, and only for them.

    Unlike a request to the autoscaler they end with this process, however that ends.
    """
    import ray

    wants = {"num_cpus": 0, "num_gpus": config.gpus_per_actor} if config.device == "cuda" else {"num_cpus": 1}
    task = ray.remote(**wants)(lambda: None)
    demand = [ray.remote(num_cpus=1)(lambda: None).remote()] if config.device == "cuda" else []
    demand += [task.remote() for _ in range(config.max_actors or config.min_actors)]

    def withdraw() -> None:
        for each in demand:
            ray.cancel(each)

    return withdraw


def label_images(
    work: Work, plan: Plan, work_plan: WorkPlan, round: Round, operator: type[Worker] = LabelImages
) -> Iterator[pa.Table]:
    """Yield result blocks for what is pending, in whatever order they come; those of a tar in the order of its members.

    Where the plan is not split, one actor a core of the kind `operator` does it all.

    A block whose task kills its process again and again is left out; the caller sees that its rows never came.
    """
    import ray
    from ray.data import ActorPoolStrategy

    context = _quiet()
    # Set either way: the context outlives a run.
    context.execution_options.label_selector = (
        {_NODE_LABEL: f"!in({','.join(plan.left_out)})"} if plan.left_out else None
    )
    work = replace(work, node=this_node)
    if not plan.split:
        context.target_max_block_size = _STREAMED_BYTES
    tables = list(units(work_plan, round, plan.actors))
    # from_arrow would ask tasks for the sizes of the tables, whose workers come too many and a second before the actors.
    images, most = ray.data.from_blocks(tables), len(tables)
    del tables
    calls = 2 if plan.split and not round.alone else 1  # with two, pixels travel while others are labelled
    options: dict[str, Any] = {"batch_format": "pyarrow", "zero_copy_batch": True}
    pool = ActorPoolStrategy(
        min_size=min(plan.min_actors, most),
        max_size=min(plan.max_actors, most),
        # With GPUs Ray weighs both operators first, and takes back what it finds too much: let it grow by itself.
        initial_size=min(plan.min_actors if plan.split else plan.actors, most),
        max_tasks_in_flight_per_actor=1 if round.alone else 2 * calls,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=True,
    )
    actor = {"compute": pool, "fn_constructor_args": (work,), "max_restarts": -1, "max_task_retries": TRIES - 1}
    if plan.split:
        images = images.map_batches(
            decode_block, fn_kwargs={"work": work, "isolated": round.alone}, batch_size=None, num_cpus=1,
            max_retries=TRIES - 1, **options,
        )  # fmt: skip
        gpus = plan.gpus_per_actor
        images = images.map_batches(
            Classify, batch_size=min(round.rows, CHUNK), num_cpus=0, num_gpus=gpus, **actor, **options
        )
    else:
        alone = {"isolated": round.alone}
        images = images.map_batches(
            operator, fn_constructor_kwargs=alone, batch_size=None, num_cpus=1, **actor, **options
        )
    try:
        yield from images.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ray.exceptions.RayError as error:
        raise ClusterError(f"Ray gave up: {str(error).strip().splitlines()[0]}; run the same command again") from error


def _quiet() -> DataContext:
    """Return the context of the datasets to come, without bars and reports."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # what kills a process is narrowed down by rounds, not by failing the job
    context.max_consecutive_actor_init_deaths = _INIT_DEATHS
    # Ray Data will name its own parameters for restarts and retries; until then this is how they are set.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return context

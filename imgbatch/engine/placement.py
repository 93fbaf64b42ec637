"""Ray: which nodes, CPUs and GPUs of the cluster a run uses, and how many actors fit on them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.polling import call_with_timeout
from imgbatch.config.sections import ClusterConfig
from imgbatch.engine.capacity import Costs, images_per_second
from imgbatch.errors import ClusterError
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted, plural

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_REMIND_S = 20.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The number of actors that fit on the cluster, and the resources of the cluster."""

    split: bool
    """Fetch and decode in CPU tasks, classify on GPUs; otherwise one actor per core does everything."""
    actors: int
    """The number of classify actors that fit now."""
    min_actors: int
    max_actors: int
    """May be more than fit now, if the cluster grows."""
    gpus_per_actor: float
    cpus: int
    gpus: float
    nodes: int
    left_out: tuple[str, ...] = ()
    """The ids of nodes that get no work: their workers give wrong answers."""

    @property
    def one_machine(self) -> bool:
        """Whether all actors will run on the node of the driver, unless a node is added."""
        return self.nodes == 1 and self.max_actors <= self.actors

    def with_one_actor(self) -> Plan:
        """Return a plan in which one worker reads everything."""
        return replace(self, actors=1, min_actors=1, max_actors=1)

    def public(self) -> dict[str, float]:
        """Return the resources for run.json."""
        return {"nodes": self.nodes, "cpus": self.cpus, "gpus": self.gpus, "actors": self.actors}

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


def wait_for_plan(config: ClusterConfig, *, workers: int | None = None) -> Plan:
    """Wait until the cluster has the resources that the run needs; return the plan.

    Args:
        workers: the number of training workers, for messages; None: the run labels images.

    Raises:
        ClusterError: the cluster does not have them within `cluster.startup_timeout_s` seconds, or does not answer.
    """
    console.step("waiting for CPUs and GPUs")
    plan = _poll(
        partial(_try_plan, config, workers),
        partial(_request_resources, config),
        config.startup_timeout_s,
        config.call_s,
    )
    log.info("%s", plan)
    return plan


def wait_for_cpus_per_worker(workers: int, requested: int | None, *, gpus: bool, config: ClusterConfig) -> int:
    """Wait until the nodes have room for all training workers, and return the maximum number of CPUs for each of them.

    Args:
        workers: how many workers, each with one GPU or with none.
        requested: the exact number of CPUs; None: as many as the nodes allow.

    Raises:
        ClusterError: they do not fit within `cluster.startup_timeout_s` seconds, or the cluster does not answer.
    """

    def look() -> int | str:
        nodes = _node_resources()
        max_cpus = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        fitting = 0
        for cpus in [requested] if requested else range(max_cpus, 0, -1):
            workers_by_node = (
                int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else math.inf)) for node in nodes
            )
            fitting = sum(workers_by_node)
            if fitting >= workers:
                return cpus
        return (
            f"train.workers={workers} asks for {counted(requested or 1, 'CPU')}{' and a GPU' * gpus} each, the "
            f"{counted(len(nodes), 'node')} of the cluster {plural(len(nodes), 'has', 'have')} room for {fitting}"
        )

    def request() -> Callable[[], None]:
        """Request a placement group for all workers: single tasks could also run one after the other."""
        from ray.util import placement_group, remove_placement_group

        bundle = {"CPU": float(requested or 1)} | ({"GPU": 1.0} if gpus else {})
        return partial(remove_placement_group, placement_group([bundle] * workers))

    return _poll(look, request, config.startup_timeout_s, config.call_s)


def _poll(
    look: Callable[[], Result | str], request: Callable[[], Callable[[], None]], wait_s: float, call_s: float
) -> Result:
    """Poll `look` until it succeeds or `wait_s` has passed, holding the resource request made by `request` meanwhile.

    A request that does not return, or that is open when `tick` raises, is not withdrawn: it ends with this process.

    Args:
        look: returns the result, or a text with the missing resources.
        request: makes the request, and returns a function that withdraws it.

    Raises:
        ClusterError: resources are still missing, or a call took longer than `call_s`.
    """
    started = time.monotonic()
    warned = started - _REMIND_S
    withdraw: Callable[[], None] | None = None
    while isinstance(result := call_with_timeout(look, call_s, "ray.nodes"), str):
        now = time.monotonic()
        if now - started >= wait_s:
            break
        if now - warned >= _REMIND_S:
            log.warning("%s; waiting up to %.0f s", result, wait_s)
            warned = now
        withdraw = withdraw or call_with_timeout(request, call_s, "a request for resources to Ray")
        tick()
        time.sleep(min(1.0, wait_s))
    if withdraw is not None:
        call_with_timeout(withdraw, call_s, "the end of a request for resources to Ray")
    if isinstance(result, str):
        raise ClusterError(f"{result}; waited {wait_s:.0f} s (cluster.startup_timeout_s)")
    return result


def _node_resources(left_out: Collection[str] = ()) -> list[dict[str, float]]:
    """Return the resources of each node that is alive and not left out."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in left_out]


def _total_cpus(nodes: Iterable[Mapping[str, float]]) -> int:
    return sum(int(node.get("CPU", 0)) for node in nodes)


def _total_gpus(nodes: Iterable[Mapping[str, float]]) -> float:
    return sum(node.get("GPU", 0.0) for node in nodes)


def _fitting_gpu_actors(nodes: Iterable[Mapping[str, float]], gpus_per_actor: float) -> int:
    """Return how many actors fit on the GPUs of the nodes. The small number corrects rounding of fractions such as 0.1."""
    return sum(int(node.get("GPU", 0.0) / gpus_per_actor + 1e-9) for node in nodes)


def exclude_nodes(plan: Plan, left_out: Mapping[str, Mapping[str, str]]) -> Plan:
    """Return the plan for the nodes that remain when some get no more work.

    Args:
        left_out: by the id of the node its `host`, and `why` it is left out.

    Raises:
        ClusterError: no other node has the resources of a worker, or the cluster does not answer.
    """
    if set(left_out) <= set(plan.left_out):
        return plan
    nodes = call_with_timeout(partial(_node_resources, left_out), ClusterConfig().call_s, "ray.nodes")
    cpus, gpus = _total_cpus(nodes), _total_gpus(nodes)
    fitting = _fitting_gpu_actors(nodes, plan.gpus_per_actor) if plan.split else cpus
    if not fitting or not cpus:
        names = "; ".join(f"{node['host']} (node {name[:12]}): {node['why']}" for name, node in left_out.items())
        raise ClusterError(
            "no worker is left: the model cannot be run, or gives wrong answers, on each node that could run one: "
            f"{names}. Look at the hardware and the installation of these nodes, or set classify.dtype=float32, then run the "
            "same command again"
        )
    # If the cluster may grow, the pool may still grow with it.
    max_actors = max(1, min(plan.max_actors, fitting) if plan.max_actors <= plan.actors else plan.max_actors)
    return replace(
        plan, actors=min(fitting, max_actors), min_actors=min(plan.min_actors, fitting, max_actors), max_actors=max_actors,
        cpus=cpus, gpus=gpus, nodes=len(nodes), left_out=tuple(left_out),
    )  # fmt: skip


def with_new_nodes(plan: Plan, config: ClusterConfig) -> Plan:
    """Return a plan that uses nodes which have joined the cluster; the same one if that gives no more actors.

    Raises:
        ClusterError: the cluster does not answer.
    """
    found = call_with_timeout(partial(_try_plan, config), config.call_s, "ray.nodes")
    if isinstance(found, str) or found.split != plan.split or found.actors <= max(plan.actors, plan.max_actors):
        return plan
    log.info("more nodes: %s", found)
    return found


def _try_plan(config: ClusterConfig, workers: int | None = None) -> Plan | str:
    """Return the plan for the current nodes; or, if resources are missing, a text with the requested and the existing ones."""
    nodes = _node_resources()
    cpus, gpus = _total_cpus(nodes), _total_gpus(nodes)
    split = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    fitting = _fitting_gpu_actors(nodes, config.gpus_per_actor) if split else cpus
    if split and fitting < config.min_actors:
        if workers is not None:
            return (
                f"train.workers={workers} with cluster.device=cuda asks for a GPU each, the cluster has {gpus:g} GPUs"
            )
        keys = f"cluster.min_actors={config.min_actors} with cluster.gpus_per_actor={config.gpus_per_actor:g}"
        needed = counted(config.min_actors * config.gpus_per_actor, "GPU")
        return f"{keys} asks for {needed}, the cluster has {gpus:g}"
    if cpus < (1 if split else config.min_actors):
        needed = (
            "fetching and decoding asks for 1 CPU"
            if split
            else f"cluster.min_actors={config.min_actors} asks for {counted(config.min_actors, 'CPU')}"
            if workers is None
            else "reading images asks for 1 CPU"
        )
        return f"{needed}, the cluster has {cpus}"
    max_actors = fitting if config.max_actors is None else config.max_actors
    actors = min(fitting, max_actors)
    return Plan(split, actors, config.min_actors, max_actors, config.gpus_per_actor, cpus, gpus, len(nodes))


def node_ids(config: ClusterConfig) -> set[str]:
    """Return the ids of the nodes that are alive; a node that is replaced has another id.

    Raises:
        ClusterError: the cluster does not answer.
    """
    import ray

    return {node["NodeID"] for node in call_with_timeout(ray.nodes, config.call_s, "ray.nodes") if node["Alive"]}


@dataclass(frozen=True, slots=True)
class NodeShape:
    """The resources of a node."""

    cpus: float
    gpus: float
    memory: float
    """Bytes, as Ray counts them: the memory for tasks and actors."""
    accelerator: str | None
    """The type of its GPUs as Ray names it; None: unknown."""


def node_shapes(config: ClusterConfig) -> list[NodeShape]:
    """Return the resources of the nodes that are alive.

    Raises:
        ClusterError: the cluster does not answer.
    """
    prefix = "accelerator_type:"
    return [
        NodeShape(
            node.get("CPU", 0.0),
            node.get("GPU", 0.0),
            node.get("memory", 0.0),
            next((name.removeprefix(prefix) for name in node if name.startswith(prefix)), None),
        )
        for node in call_with_timeout(_node_resources, config.call_s, "ray.nodes")
    ]


def _request_resources(config: ClusterConfig) -> Callable[[], None]:
    """Start tasks that need the resources of the run; return a function that cancels them.

    A cluster that scales from zero grows for tasks, and only for tasks. Unlike a request to the autoscaler they end with
    this process, however that ends.
    """
    import ray

    resources = {"num_cpus": 0, "num_gpus": config.gpus_per_actor} if config.device == "cuda" else {"num_cpus": 1}
    task = ray.remote(**resources)(lambda: None)
    tasks = [ray.remote(num_cpus=1)(lambda: None).remote()] if config.device == "cuda" else []
    tasks += [task.remote() for _ in range(config.max_actors or config.min_actors)]

    def withdraw() -> None:
        for reference in tasks:
            ray.cancel(reference)

    return withdraw

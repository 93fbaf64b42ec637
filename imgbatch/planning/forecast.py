"""Values: the forecast of a run: seconds by phase, the rate, the bottleneck, and the nodes that a deadline takes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgbatch.engine import capacity
from imgbatch.planning.cost_model import DRAWS, Costs, Draws, Interval

# Standard deviations of the logarithm: how far a phase of one run differs from the same phase of another one on the same
# machines. The bootstrap cannot know that, since it has seen one run. These are assumptions; docs/LOG.md has outcomes.
_SPREAD = {"start": 0.10, "listing": 0.15, "work": 0.08, "end": 0.25}
_SPLIT_EFFICIENCY = (0.70, 0.90)  # of the slower of two operators; with GPUs the gaps of workers are not measured
_AUDIT_S, _AUDIT_S_PER_IMAGE = 0.3, 2.5e-6
_MAX_NODES = 10_000
PHASES = ("start", "listing", "work", "end")


@dataclass(frozen=True, slots=True)
class Cluster:
    """The part of a cluster that a run uses."""

    split: bool
    """Images are prepared in CPU tasks and classified on GPUs."""
    nodes: int
    cpus: float
    gpus: float
    actors: int
    max_actors: int | None = None
    """`cluster.max_actors`"""

    def scaled(self, nodes: int) -> Cluster:
        """Return a cluster of so many nodes like those of this one."""
        actors = math.ceil(self.actors / self.nodes * nodes)
        if self.max_actors is not None:
            actors = min(actors, self.max_actors)
        return Cluster(
            self.split, nodes, self.cpus / self.nodes * nodes, self.gpus / self.nodes * nodes, actors, self.max_actors
        )


@dataclass(frozen=True, slots=True)
class Measurements:
    """The measured seconds of the phases that do not depend on the number of images to label."""

    connect_s: float
    """Ray, and waiting for the nodes."""
    first_row_s: tuple[float, float]
    """From the start of the workers to the first row: in the first and in the second pass over the sample. The first one may
    have converted the model, and in the second one the processes of Ray were there already: a run lies between both."""
    listing_s: float
    shutdown_s: float
    listed: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast for one cluster."""

    cluster: Cluster
    seconds: Mapping[str, Draws]
    """By phase."""
    rate: Draws
    """Images per second after the start."""

    @property
    def total(self) -> Draws:
        """The seconds of all phases."""
        return np.asarray(sum(self.seconds.values()))

    def public(self) -> dict[str, object]:
        """Return the intervals for JSON."""
        seconds = {phase: Interval.of(draws).public() for phase, draws in self.seconds.items()}
        return {
            "nodes": self.cluster.nodes,
            "actors": self.cluster.actors,
            "seconds": {**seconds, "total": Interval.of(self.total).public()},
            "images_per_second": Interval.of(self.rate).public(),
        }


def forecast(
    costs: Costs, cluster: Cluster, measured: Measurements, streams: Sequence[float] = (), seed: int = 0
) -> Forecast:
    """Return the forecast of a run that labels all images of `costs`.

    Args:
        streams: the sizes of the streams, if all images are in streams: one worker reads each of them.
    """
    random = np.random.default_rng(seed)

    def spread(phase: str) -> Draws:
        values = np.exp(random.normal(0.0, _SPREAD[phase], DRAWS + 1))
        values[0] = 1.0
        return values

    efficiency = random.uniform(*_SPLIT_EFFICIENCY, DRAWS + 1)
    labelling = seconds_of_work(costs, cluster, efficiency) * imbalance(streams, cluster.actors) * spread("work")
    if not costs.images.any():  # no worker is started
        labelling = np.zeros(DRAWS + 1)
    first_row = random.uniform(min(measured.first_row_s), max(measured.first_row_s), DRAWS + 1)
    start = (measured.connect_s + first_row) * spread("start") * bool(costs.images.any())
    end = measured.shutdown_s * bool(costs.images.any()) + _AUDIT_S + _AUDIT_S_PER_IMAGE * measured.listed
    seconds = {
        "start": start,
        "listing": measured.listing_s * spread("listing"),
        "work": labelling,
        "end": end * spread("end"),
    }
    return Forecast(cluster, seconds, np.asarray(costs.images / np.maximum(labelling, 1e-9)))


def seconds_of_work(costs: Costs, cluster: Cluster, efficiency: Draws) -> Draws:
    """Return the seconds in which the workers of a cluster label all images."""
    if not cluster.split:
        return np.asarray(
            (costs.prepare_s + costs.images * (costs.wait_s + costs.forward_s + costs.gap_s)) / cluster.actors
        )
    prepared = (costs.prepare_s + costs.images * costs.wait_s) / cluster.cpus
    classified = costs.images * costs.forward_s / cluster.actors
    return np.asarray(np.maximum(prepared, classified) / efficiency)


def imbalance(streams: Sequence[float], actors: int) -> float:
    """Return how much longer the busiest worker reads than the mean, if each stream goes to the next free worker.

    >>> imbalance([1.0, 1.0, 1.0], actors=2), imbalance([], actors=2)
    (1.3333333333333333, 1.0)
    """
    if not sum(streams):
        return 1.0
    busy = [0.0] * actors
    for size in streams:
        heapq.heapreplace(busy, busy[0] + size)
    return max(busy) * actors / sum(streams)


def nodes_for(
    costs: Costs,
    cluster: Cluster,
    measured: Measurements,
    seconds: float,
    streams: Sequence[float] = (),
) -> int | None:
    """Return the smallest number of nodes with which 95 % of the draws end within so many seconds; None: no number does."""

    def late(nodes: int) -> bool:
        total = forecast(costs, cluster.scaled(nodes), measured, streams).total
        return float(np.quantile(total, 0.95)) > seconds

    low, high = 0, 1
    while late(high):
        low, high = high, 2 * high
        if low > _MAX_NODES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if late(middle) else (low, middle)
    return high


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The stage that limits the rate, and what would raise it."""

    stage: str
    """fetch, decode, classify or idle"""
    share: float
    """The part of the time of the workers that it takes; with GPUs: of the limiting operator."""
    remedy: str


def bottleneck(costs: Costs, cluster: Cluster) -> Bottleneck:
    """Return the stage with the largest part of the time of the workers."""
    images = max(1.0, float(costs.images[0]))
    stages = {
        "fetch": float(costs.wait_s[0]),
        "decode": float(costs.prepare_s[0]) / images,
        "classify": float(costs.forward_s[0]),
        "idle": float(costs.gap_s[0]),
    }
    if cluster.split:
        return _of_gpus(stages, cluster)
    total = sum(stages.values()) or 1.0
    stage = max(stages, key=lambda name: stages[name])
    more = 1 / total
    remedies = {
        "fetch": "the workers wait for the store: raise fetch.concurrency, or run closer to the store; more cores help less",
        "decode": f"each further core labels {more:,.0f} images a second more; a GPU would not help with decoding",
        "classify": f"each further core labels {more:,.0f} images a second more; a GPU would free "
        f"{stages['classify'] / total:.0%} of the time of these cores for fetching and decoding",
        "idle": "the workers wait for tasks: the images are few or small for this cluster; fewer cores would do",
    }
    return Bottleneck(stage, stages[stage] / total, remedies[stage])


def _of_gpus(stages: Mapping[str, float], cluster: Cluster) -> Bottleneck:
    """Return the slower one of the two operators."""
    prepare, forward = stages["fetch"] + stages["decode"], max(stages["classify"], 1e-9)
    gpu_per_s = cluster.actors / forward / max(cluster.gpus, 1e-9)
    per_gpu = capacity.cores_per_gpu(capacity.Costs(prepare_ms=prepare * 1000, gpu_per_s=gpu_per_s))
    existing = cluster.cpus / max(cluster.gpus, 1e-9)
    if existing < per_gpu:
        stage = "fetch" if stages["fetch"] > stages["decode"] else "decode"
        busy = existing / per_gpu
        remedy = (
            f"a GPU needs {per_gpu:.1f} cores to be busy, and has {existing:.1f}: the GPUs are idle for {1 - busy:.0%} of the "
            "time. Use machines with more cores per GPU, or add nodes without a GPU"
        )
        return Bottleneck(stage, 1.0, remedy)
    remedy = (
        f"a GPU needs {per_gpu:.1f} cores to be busy, and has {existing:.1f}: more GPUs raise the rate, and machines with "
        "fewer cores per GPU cost less"
    )
    return Bottleneck("classify", 1.0, remedy)

"""Values: the capacity of a cluster: from core-milliseconds per image to images per second, cores per GPU, and cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of one image. The defaults are for photos of 110 kB and EfficientNet-Lite0, measured as in docs/LOG.md."""

    prepare_ms: float = 1.9
    """Core-milliseconds to fetch, decode and resize it."""
    forward_ms: float = 5.1
    """Core-milliseconds of the network where it runs on CPUs."""
    gpu_per_s: float | None = None
    """Images per second that one GPU classifies when it never waits; None: not measured."""


def images_per_second(costs: Costs, cpus: float, gpus: float = 0) -> float:
    """Return the images per second of `cpus` cores; with GPUs, the minimum of the rates of preparation and classification.

    >>> round(images_per_second(Costs(), cpus=2))
    286
    >>> round(images_per_second(Costs(gpu_per_s=3000), cpus=4, gpus=1))
    2105
    """
    if not gpus:
        return cpus * 1000 / (costs.prepare_ms + costs.forward_ms)
    prepared = cpus * 1000 / costs.prepare_ms
    return prepared if costs.gpu_per_s is None else min(prepared, gpus * costs.gpu_per_s)


def cores_per_gpu(costs: Costs) -> float:
    """Return how many cores keep one GPU busy.

    Raises:
        ValueError: the rate of the GPU is not known.

    >>> round(cores_per_gpu(Costs(gpu_per_s=3000)), 1)
    5.7
    """
    if costs.gpu_per_s is None:
        raise ValueError("gpu_per_s is not known: measure it on the card")
    return costs.gpu_per_s * costs.prepare_ms / 1000


def night(rate: float, nodes: int, hours: float = 8.0, start_s: float = 60.0, efficiency: float = 0.75) -> int:
    """Return how many images `nodes` nodes label in a night, at `rate` images per second each.

    Args:
        start_s: seconds from the command to the first row.
        efficiency: the proportion of `rate` that remains with Ray, the store and the driver; 0.78 to 0.89 was measured.

    >>> night(rate=images_per_second(Costs(), cpus=8), nodes=10)
    246342857
    """
    return int(rate * nodes * efficiency * (3600 * hours - start_s))


def cost(images: int, rate: float, price_per_hour: float, efficiency: float = 0.75) -> float:
    """Return the cost of labelling on nodes of `rate` images per second, at a price per hour each.

    >>> round(cost(1_000_000, rate=images_per_second(Costs(), cpus=8), price_per_hour=0.40), 2)
    0.13
    """
    return images / (rate * efficiency) / 3600 * price_per_hour

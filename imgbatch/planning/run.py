"""Effects: `imgbatch plan`: list, draw a sample, measure it on the cluster, and forecast the run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from imgbatch.concurrency import process
from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config import deadline
from imgbatch.config.sections import Config
from imgbatch.ledger.listing import Listing
from imgbatch.models.model import Model
from imgbatch.pipeline.preflight import Job, list_images, open_output, warn_of_local_paths
from imgbatch.planning import admission, measurement, prices
from imgbatch.planning.document import Planned, compose
from imgbatch.planning.forecast import Cluster
from imgbatch.planning.measurement import Measured
from imgbatch.planning.prices import Catalogue, Price
from imgbatch.planning.reservoir import Reservoir
from imgbatch.planning.sample import Sample, draw
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted

if TYPE_CHECKING:
    from imgbatch.engine.placement import NodeShape, Plan

log = logging.getLogger("imgbatch")

_IMAGES, _IMAGES_PER_ACTOR, _MAX_IMAGES = 1_000, 64, 8_192
_WARM_UP_IMAGES, _WARM_UP_ACTORS = 32, 4
_WARM_UP_S, _MEASURE_S = 20.0, 45.0
_OF_MEMORY = (
    0.7  # the part of a node's memory that Ray counts for tasks and actors; the rest is for its objects and the system
)


@dataclass(frozen=True, slots=True)
class Options:
    """The flags of `imgbatch plan` that classify does not have."""

    prices: str | None = None
    machine: str | None = None
    nodes: int | None = None
    seed: int = 0


@dataclass
class Clock:
    """The seconds of the phases, as they were measured."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


@dataclass(frozen=True, slots=True)
class OnCluster:
    """What was found and measured on the cluster."""

    plan: Plan
    max_actors: int | None
    """The maximum number of actors on any number of nodes."""
    shapes: list[NodeShape]
    prices: list[Price]
    listing: Listing
    sample: Sample
    warm_up: Measured | None
    """The first pass, which loads and converts the model on the nodes; None: nothing is pending."""
    measured: Measured | None


def plan(config: Config, options: Options, stop: StopRequest) -> dict[str, Any]:
    """Return the plan of a run: the document that is printed with --json, and kept below the output.

    Raises:
        ImgbatchError: the run could not work either: a wrong config, no image, no output, a cluster that is too small.
    """
    started = datetime.now(UTC)
    text = config.run.finish_by
    finish_by = None if text is None else deadline.parse(text, "run.finish_by").at(started)
    clock, job = Clock(), open_output(config, read_only=True)
    catalogue = _read_prices(options, job)
    console.step("checking the output")
    checks = admission.check_output(job.output)
    reservoir = Reservoir(options.seed)
    found = on_cluster(job, reservoir, catalogue, options, clock, stop)
    if found.measured is not None:
        checks.append(check_memory(found.plan, found.shapes, found.measured))
    placed = found.plan
    document = compose(
        Planned(
            job=job,
            started=started,
            finish_by=finish_by,
            nodes=options.nodes,
            counts=found.listing.counts,
            reservoir=reservoir,
            sample=found.sample,
            measured=found.measured,
            cold_start_s=found.warm_up.first_row_s if found.warm_up else None,
            cluster=Cluster(placed.split, placed.nodes, placed.cpus, placed.gpus, placed.actors, found.max_actors),
            prices=found.prices,
            price_file=catalogue,
            checks=checks,
            seconds=clock.seconds,
        )
    )
    document["kept"] = admission.keep(job.output, json.dumps(document, indent=2).encode()) if checks[0].passed else None
    return document


def on_cluster(
    job: Job, reservoir: Reservoir, catalogue: Catalogue | None, options: Options, clock: Clock, stop: StopRequest
) -> OnCluster:
    """Connect to the cluster, list the images, and measure a sample of them.

    Raises:
        ImgbatchError: the cluster is too small or not there, there is no image, or a worker failed.
    """
    from imgbatch.engine import placement, session, shared_weights

    limits = job.config.cluster
    with ExitStack() as stack:
        with clock.phase("connect"):
            stack.enter_context(stop.reinstall_after_ray())
            stack.enter_context(session.connected(limits.call_s))
            tick()  # as in a run
        with clock.phase("resources"):
            placed = placement.wait_for_plan(limits)
        shapes = placement.node_shapes(limits)
        prices_of_nodes = _prices_of(catalogue, options, shapes)  # before the measurement: it may refuse
        warn_of_local_paths(job.output, job.sources, placed.nodes)
        with clock.phase("listing"):
            listing = list_images(job, None, reservoir.add)
            work_plan = listing.work_plan()
        max_actors = limits.max_actors
        if work_plan.streams and job.config.limit is not None:  # as in a run
            placed, max_actors = placed.with_one_actor(), 1
        process.release_memory()
        images = min(_MAX_IMAGES, max(_IMAGES, _IMAGES_PER_ACTOR * placed.actors))
        sample = draw(reservoir, work_plan.streams, images)
        warm_up = measured = None
        if len(sample):
            local = placed.one_machine
            with nullcontext(job.model) if local else shared_weights.in_object_store(job.model, limits.call_s) as model:
                warm_up, measured = measure(job, model, placed, sample, clock)
        with clock.phase("shutdown"):
            stack.close()
    return OnCluster(placed, max_actors, shapes, prices_of_nodes, listing, sample, warm_up, measured)


def measure(job: Job, model: Model, placed: Plan, sample: Sample, clock: Clock) -> tuple[Measured, Measured]:
    """Measure a sample in two passes.

    The first one has a few images. It loads and converts the model on the nodes, so that the second one measures what a run
    after the plan will meet.
    """
    streams = len(sample.streams)
    images = len(sample) - streams
    warm = min(_WARM_UP_IMAGES * min(placed.actors, _WARM_UP_ACTORS), images // 4) or min(1, streams // 2)
    log.info("measuring a sample of %s", counted(images, "image") + f" and {counted(streams, 'tar')}" * bool(streams))
    console.step("starting the workers")
    with clock.phase("warm_up"):
        part = sample.work_plan(0, max(1, warm))
        warm_up = measurement.measure(job, model, placed, sample, "plan/warm-up", part, _WARM_UP_S)
    console.step("measuring the sample")
    with clock.phase("sample"):
        part = sample.work_plan(warm)
        measured = measurement.measure(job, model, placed, sample, "plan/sample", part, _MEASURE_S)
    return warm_up, measured


def _read_prices(options: Options, job: Job) -> Catalogue | None:
    if options.prices is None:
        return None
    catalogue = prices.read(options.prices, job.stores)
    return catalogue.of_machine(options.machine) if options.machine else catalogue


def _prices_of(catalogue: Catalogue | None, options: Options, shapes: list[NodeShape]) -> list[Price]:
    """Return the prices of the machines of the cluster: of the one that was named, or of those like its largest node."""
    if catalogue is None or options.machine is not None or not shapes:
        return catalogue.prices if catalogue is not None else []
    node = max(shapes, key=lambda shape: (shape.gpus, shape.cpus))
    return catalogue.like(node.cpus, node.gpus, node.accelerator, node.memory / _OF_MEMORY / (1 << 30)).prices


def check_memory(placed: Plan, shapes: list[NodeShape], measured: Measured) -> admission.Check:
    """Compare the memory of the workers with that of the nodes, on which they are spread by CPUs and GPUs."""
    cpus, gpus = (max(1e-9, sum(getattr(shape, name) for shape in shapes)) for name in ("cpus", "gpus"))
    actor = max((int(note["memory"]) for note in measured.classified), default=0)
    decoder = max((int(note["memory"]) for note in measured.prepared), default=0)
    nodes = []
    for shape in shapes:
        if placed.split:
            needed = actor * placed.actors * shape.gpus / gpus + decoder * shape.cpus
        else:
            needed = actor * placed.actors * shape.cpus / cpus
        nodes.append((needed, shape.memory))
    return admission.check_memory(actor, nodes)

"""Effects: the measurement of a sample: it runs through the workers and operators of a run, and no row is written."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imgbatch.config.worker import WorkerConfig
from imgbatch.inference.messages import received
from imgbatch.inference.timing import CLASSIFIED, PREPARED, STREAM, Sampling
from imgbatch.ledger.listing_pages import PackedPages
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.models.model import Model
from imgbatch.pipeline.preflight import Job
from imgbatch.pipeline.run import label_images
from imgbatch.planning.sample import Sample
from imgbatch.terminal import console

if TYPE_CHECKING:
    from imgbatch.engine.placement import Plan

log = logging.getLogger("imgbatch")

MEMBERS = 256
"""The number of images that are read from each stream of the sample."""


@dataclass
class Measured:
    """What the workers reported about a sample. It takes the place of the committer (`attempts.Consumer`)."""

    work_plan: WorkPlan
    stream_numbers: frozenset[int]
    clock: Callable[[], float] = time.monotonic
    arrived: int = 0
    left_out: dict[str, Mapping[str, str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts about the runtime: device, dtype, batch size."""
    prepared: list[dict[str, Any]] = field(default_factory=list)
    classified: list[dict[str, Any]] = field(default_factory=list)
    streams: dict[int, dict[str, Any]] = field(default_factory=dict)
    """How far each stream was read, by its number."""
    first_row_s: float | None = None
    """Seconds until the first rows arrived."""
    seconds: float = 0.0
    lost: int = 0
    """Images whose process died, and images that were not reached in time."""

    def __post_init__(self) -> None:
        self._started = self.clock()

    def take(self, block: pa.Table) -> None:
        """Take one block of results.

        Raises:
            ImgbatchError: a worker sent this error.
        """
        rows, notes, ends = received(block)
        for note in notes:
            self._take_note(note)
        self.work_plan.mark_arrived(end.number for end in ends if end.number in self.stream_numbers)
        if not len(rows):
            return
        if self.first_row_s is None:
            self.first_row_s = self.clock() - self._started
        self.seconds = self.clock() - self._started
        numbers = rows["index"].to_numpy()
        self.work_plan.mark_arrived(numbers[~self.work_plan.in_streams(numbers)])
        self.arrived += len(rows)
        self.reasons.update(reason for reason in rows["reason"].to_pylist() if reason is not None)

    def is_over(self, limit_s: float) -> bool:
        """Return whether so many seconds have passed since the first row."""
        since = self.clock() - self._started
        return self.first_row_s is not None and since - self.first_row_s > limit_s

    def _take_note(self, note: dict[str, Any]) -> None:
        for key, value in note.items():
            if key == PREPARED:
                self.prepared.append(value)
            elif key == CLASSIFIED:
                self.classified.append(value)
            elif key == STREAM:
                self.streams[value["number"]] = value
                self.work_plan.mark_arrived([value["number"]])
            elif key == "left_out":
                self.left_out |= value
            elif not key.endswith("_s"):
                self.facts[key] = value


def measure(
    job: Job, model: Model, plan: Plan, sample: Sample, name: str, work_plan: WorkPlan, limit_s: float
) -> Measured:
    """Run a part of a sample through the workers; end after a time limit.

    Args:
        plan: the actors.
        name: distinguishes this listing from others in a worker.
        work_plan: the part.
        limit_s: the limit in seconds after the first row; images that have not arrived by then are given up.

    Raises:
        ImgbatchError: a worker failed, or the cluster did.
    """
    from imgbatch.engine.attempts import run_attempts
    from imgbatch.inference.worker import Work

    pages = PackedPages.of(name, sample.rows)
    work = Work(job.stores, pages, WorkerConfig.of(job.config), model, sampling=Sampling(MEMBERS))
    measured = Measured(work_plan, frozenset(work_plan.streams))
    with closing(run_attempts(partial(label_images, work), plan, measured, job.config.cluster)) as blocks:
        for block in blocks:
            if block is not None:
                measured.take(block)
                console.show(f"{measured.arrived:,} images")
            if measured.is_over(limit_s):
                break
    measured.lost = work_plan.remaining
    return measured

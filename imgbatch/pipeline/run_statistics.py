"""Effects: the statistics of one run: counts, reasons of rejects, seconds by stage, and the notes of its workers."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.pipeline.rate_series import RateSeries
from imgbatch.rejects import Example, note_examples

log = logging.getLogger(__name__)


@dataclass
class Pace:
    """The time of the first rows, and the rate of the rows after them."""

    first_row: str | None = None
    """UTC, ISO 8601."""
    _first: float = 0.0
    _last: float = 0.0
    _rows: int = 0

    def note(self, rows: int, now: float) -> None:
        """Note the arrival of rows."""
        if self.first_row is None:
            self.first_row, self._first = datetime.now(UTC).isoformat(timespec="milliseconds"), now
        else:
            self._rows += rows
        self._last = now

    def rate(self) -> float | None:
        """Return images a second from the first rows on, without the start; None if all arrived at once."""
        return round(self._rows / (self._last - self._first), 2) if self._rows and self._last > self._first else None


@dataclass
class RunStatistics:
    """The counts of one run's own rows, and the notes of its workers."""

    clock: Callable[[], float] = time.monotonic
    labelled: int = 0
    rejected: int = 0
    bytes: int = 0
    """The sizes of these images, as far as they are known."""
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    """The first reject of each reason."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts that workers report about themselves: device, dtype, runtime, batch size."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of work by stage, summed over all workers."""
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    """Nodes whose workers give wrong answers, by their ids: `host`, and `why`."""
    series: RateSeries = field(default_factory=RateSeries)
    """How many images arrived when, since the start of these statistics."""
    _pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def arrived(self) -> int:
        """The number of images of this run with a row that is committed, or buffered."""
        return self.labelled + self.rejected

    def count(self, rows: pa.Table) -> None:
        """Count rows of images, none of which was counted before."""
        now = self.clock()
        self._pace.note(len(rows), now)
        self.series.note(len(rows), now - self._started)
        rejects = rows.filter(pc.is_valid(rows["reason"]))
        self.labelled += len(rows) - len(rejects)
        self.rejected += len(rejects)
        self.bytes += pc.sum(rows["size"]).as_py() or 0
        if len(rejects):
            self.reasons.update(rejects["reason"].to_pylist())
            note_examples(self.examples, rejects)

    def add_notes(self, notes: Iterable[Mapping[str, Any]]) -> None:
        """Add notes of workers: seconds of a stage, faults of their node, or other facts; later facts replace earlier ones."""
        for key, value in ((key, value) for note in notes for key, value in note.items()):
            if key.endswith("_s"):
                self.add_seconds(key.removesuffix("_s"), value)
            elif key == "left_out":
                self.left_out |= value
                faults = {node["host"]: f"{node['why']}: the node is left out" for node in value.values()}
                self._add_node_faults(faults)
            elif key == "node_faults":
                self._add_node_faults(value)
            elif key == "canary":
                self._add_canary(value)
            else:
                self.facts[key] = value

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the seconds of a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def rate(self) -> float | None:
        """Return images a second without the start of the workers; None if all rows arrived at once."""
        return self._pace.rate()

    def report(self) -> dict[str, Any]:
        """Return the statistics for the record of the run."""
        elapsed = self.clock() - self._started
        overall = round(self.arrived / elapsed, 2) if elapsed else None
        return {
            **self.facts,
            "rejects": dict(self.reasons),
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
            "first_row": self._pace.first_row,
            "images_per_second": self.rate() or overall,
            "arrivals": self.series.public(),
        }

    def _add_canary(self, score: Mapping[str, Any]) -> None:
        """Record the accuracy of the canary, once per node, runtime and device."""
        scores = self.facts.setdefault("canary", [])
        if score not in scores:  # each worker of a node sends it
            scores.append(score)
            log.info(
                "canary: %s of %s images correct (%.1f %%; required %.1f %%) on %s (%s, %s)",
                f"{score['right']:,}", f"{score['images']:,}", 100 * score["accuracy"], 100 * score["required"],
                score["host"], score.get("runtime"), score.get("device"),
            )  # fmt: skip

    def _add_node_faults(self, faults: Mapping[str, str]) -> None:
        """Record faults of nodes, by host, and log each fault once."""
        logged = self.facts.setdefault("node_faults", {})
        for host, fault in faults.items():
            if logged.get(host) != fault:
                log.warning("node %s: %s", host, fault)
            logged[host] = fault

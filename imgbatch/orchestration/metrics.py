"""Values: the metrics of a run for Prometheus: their names and meanings, and their values from the facts of run.json.

Ray's exporter and the files of `metrics_export.py` have the same metrics. Ray adds the prefix `ray_` to each name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. Each has the labels `verb`, `output` and `run_id`, and those of its own."""

    name: str
    """For a counter without its suffix `_total`, which Prometheus's libraries add."""
    help: str
    counter: bool = False
    labels: tuple[str, ...] = ()

    @property
    def exported_name(self) -> str:
        """The name of its series in a file; Ray's exporter adds `ray_` in front."""
        return f"{self.name}_total" if self.counter else self.name


@dataclass(frozen=True, slots=True)
class Sample:
    """The value of a metric for one set of labels."""

    metric: Metric
    labels: Mapping[str, str]
    value: float


IMAGES = Metric("imgbatch_images", "Images of this run with a row, by outcome.", True, ("outcome",))
REJECTS = Metric("imgbatch_rejects", "Images that this run rejected, by reason.", True, ("reason",))
BYTES = Metric("imgbatch_bytes", "Sizes of the images of this run with a row.", True)
STAGE_SECONDS = Metric("imgbatch_stage_seconds", "Seconds of work by stage, over all workers.", True, ("stage",))
LISTED = Metric("imgbatch_images_listed", "Images in the listing, those with rows of earlier runs included.")
PLANNED = Metric("imgbatch_images_planned", "Images that this run has to label; absent while an input has unread tars.")
RATE = Metric("imgbatch_images_per_second", "Images per second: of the last 30 s, and at the end of the whole run.")
TIME_LEFT = Metric("imgbatch_time_left_seconds", "Seconds until the last image at this rate; absent while unknown.")
LATE = Metric("imgbatch_late", "1 once the forecast has passed run.finish_by, else 0; absent without run.finish_by.")
START = Metric("imgbatch_start_timestamp_seconds", "When the run started.")
LAST_COMMIT = Metric("imgbatch_last_commit_timestamp_seconds", "When rows were last written to the tables.")
HEARTBEAT = Metric("imgbatch_heartbeat_timestamp_seconds", "When run.json was last written.")
END = Metric("imgbatch_end_timestamp_seconds", "When the run ended; absent before.")
EXIT_CODE = Metric("imgbatch_exit_code", "Exit code of the run; absent before its end.")

METRICS = (
    *(IMAGES, REJECTS, BYTES, STAGE_SECONDS, LISTED, PLANNED, RATE, TIME_LEFT, LATE),
    *(START, LAST_COMMIT, HEARTBEAT, END, EXIT_CODE),
)
COMMON_LABELS = ("verb", "output", "run_id")


def samples(facts: Mapping[str, Any], *, verb: str, output: str) -> Iterator[Sample]:
    """Yield the values of all metrics that are known.

    Args:
        facts: the content of run.json.
        output: the URI of the output, without secrets.
    """
    common = {"verb": verb, "output": output, "run_id": str(facts.get("run_id", ""))}
    for metric, values in _values(facts):
        for label, value in values.items():
            if value is not None:
                labels = common | dict.fromkeys(metric.labels, label)
                yield Sample(metric, labels, float(value))


def _values(facts: Mapping[str, Any]) -> Iterator[tuple[Metric, Mapping[str, Any]]]:
    """Yield each metric with its values, by the value of its own label, which is empty if it has none."""
    progress, this_run = facts.get("progress") or {}, facts.get("this_run") or {}
    yield IMAGES, {outcome: this_run.get(outcome) for outcome in ("labelled", "rejected")}
    yield REJECTS, progress.get("rejects") or {}
    yield BYTES, {"": progress.get("bytes")}
    seconds = facts.get("seconds")
    yield STAGE_SECONDS, seconds if isinstance(seconds, Mapping) else {}  # in the record of a training it is a number
    yield LISTED, {"": (facts.get("counts") or {}).get("listed")}
    yield PLANNED, {"": progress.get("total")}
    running = facts.get("status") == "running"
    yield RATE, {"": progress.get("rate") if running else facts.get("images_per_second")}
    yield TIME_LEFT, {"": progress.get("seconds_left") if running else None}
    finish_by = (facts.get("config") or {}).get("run", {}).get("finish_by")
    yield LATE, {"": None if finish_by is None else "late" in facts}
    yield START, {"": _timestamp(facts.get("started"))}
    yield LAST_COMMIT, {"": _timestamp(progress.get("last_commit"))}
    yield HEARTBEAT, {"": _timestamp(facts.get("written"))}
    yield END, {"": _timestamp(facts.get("finished"))}
    yield EXIT_CODE, {"": facts.get("exit_code")}


def _timestamp(text: Any) -> float | None:
    """Return seconds since 1970 of a time in ISO 8601.

    >>> _timestamp("2026-11-29T00:00:00+00:00")
    1795910400.0
    """
    return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None


def text_format(all_samples: Iterator[Sample]) -> bytes:
    """Return samples in Prometheus's text format, with HELP and TYPE of each metric.

    >>> print(text_format(samples({"run_id": "r", "counts": {"listed": 3}}, verb="classify", output="out")).decode())
    # HELP imgbatch_images_listed Images in the listing, those with rows of earlier runs included.
    # TYPE imgbatch_images_listed gauge
    imgbatch_images_listed{output="out",run_id="r",verb="classify"} 3.0
    <BLANKLINE>
    """
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # takes 0.1 s, and is needed rarely
    from prometheus_client.exposition import generate_latest

    families: dict[str, Any] = {}
    for sample in all_samples:
        metric, names = sample.metric, (*COMMON_LABELS, *sample.metric.labels)
        kind = CounterMetricFamily if metric.counter else GaugeMetricFamily
        family = families.setdefault(metric.name, kind(metric.name, metric.help, labels=names))
        family.add_metric([sample.labels[name] for name in names], sample.value)
    return bytes(generate_latest(_Collected(list(families.values()))))


class _Collected:
    """The metrics in the form in which the library reads them."""

    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        """Return the families."""
        return self._families

"""Ray: counters and gauges of a run, which Ray's exporter offers to Prometheus on the node of the driver."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Metric(Protocol):
    """The name and the meaning of a metric."""

    @property
    def name(self) -> str:
        """The name; Ray's exporter adds `ray_`, and to counters `_total`."""

    @property
    def help(self) -> str:
        """What it measures."""

    @property
    def counter(self) -> bool:
        """Whether it only grows."""


class Sample(Protocol):
    """The value of a metric for one set of labels."""

    @property
    def metric(self) -> Metric:
        """The metric."""

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels; all samples of a metric have the same ones."""

    @property
    def value(self) -> float:
        """The value; that of a counter is the total so far."""


class RayMetrics:
    """Publishes samples. Ray must be connected, and the metrics last as long as this process.

    Ray sends them from this process to the agent of its node every 10 s (RAY_metrics_report_interval_ms).
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._failed = False

    def publish(self, samples: Iterable[Sample]) -> None:
        """Set all gauges, and increase all counters; a gauge that has no sample any more becomes NaN.

        An error is logged once, and does not end the run.
        """
        try:
            before, self._values = self._values, {}
            for sample in samples:
                key = (sample.metric.name, tuple(sorted(sample.labels.items())))
                self._values[key] = sample.value
                self._record(sample.metric, sample.labels, sample.value, before.get(key, 0.0))
            for (name, labels), value in before.items():
                if (name, labels) not in self._values and not math.isnan(value):
                    self._forget(name, labels)
        except Exception as error:  # noqa: BLE001 - a metric must not end a run
            if not self._failed:
                log.warning("the metrics could not be given to Ray: %s", error)
            self._failed = True

    def _record(self, metric: Metric, labels: Mapping[str, str], value: float, before: float) -> None:
        from ray.util.metrics import Counter, Gauge

        if metric.name not in self._metrics:
            kind = Counter if metric.counter else Gauge
            self._metrics[metric.name] = kind(metric.name, metric.help, tuple(labels))
        if not metric.counter:
            self._metrics[metric.name].set(value, dict(labels))
        elif value > before:
            self._metrics[metric.name].inc(value - before, dict(labels))

    def _forget(self, name: str, labels: tuple[tuple[str, str], ...]) -> None:
        """Set a gauge to NaN: Ray would repeat its last value until the end of the process."""
        from ray.util.metrics import Gauge

        if isinstance(self._metrics[name], Gauge):
            self._metrics[name].set(math.nan, dict(labels))

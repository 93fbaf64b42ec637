"""Ray: counters and gauges of a run, which Ray's exporter offers to Prometheus on the node of the driver."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

log = logging.getLogger(__name__)

_REPEAT_S = 5.0


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
    """Publishes samples. Ray must be connected.

    Ray sends them from this process to the agent of its node every 10 s (RAY_metrics_report_interval_ms). The agent drops a
    gauge that was not set for two of these intervals, and keeps counters until it ends (2.60).
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        """What was added to each counter."""
        self._gauges: list[Sample] = []
        self._failed = False
        self._lock = threading.Lock()

    def publish(self, samples: Iterable[Sample]) -> None:
        """Set all gauges, and increase all counters; a gauge that has no sample any more disappears.

        An error is logged once, and does not end the run.
        """
        with self._logging_errors():
            self._gauges.clear()
            for sample in samples:
                if sample.metric.counter:
                    self._increase(sample)
                else:
                    self._gauges.append(sample)
            self._set_gauges()

    @contextmanager
    def repeating(self, interval_s: float = _REPEAT_S) -> Iterator[None]:
        """Within the block, set the gauges to the same values every few seconds, in a thread.

        Otherwise the metrics of a driver that hangs would disappear, and no alert could report its old heartbeat.
        """
        ended = threading.Event()

        def repeat() -> None:
            while not ended.wait(interval_s):
                with self._logging_errors():
                    self._set_gauges()

        thread = threading.Thread(target=repeat, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()  # Ray is disconnected after the block

    @contextmanager
    def _logging_errors(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except Exception as error:  # noqa: BLE001 - a metric must not end a run
                if not self._failed:
                    log.warning("the metrics could not be given to Ray: %s", error)
                self._failed = True

    def _increase(self, sample: Sample) -> None:
        key = (sample.metric.name, tuple(sorted(sample.labels.items())))
        added = sample.value - self._totals.get(key, 0.0)
        if added > 0:
            self._metric(sample).inc(added, dict(sample.labels))
            self._totals[key] = sample.value

    def _set_gauges(self) -> None:
        for sample in self._gauges:
            self._metric(sample).set(sample.value, dict(sample.labels))

    def _metric(self, sample: Sample) -> Any:
        from ray.util.metrics import Counter, Gauge

        metric = sample.metric
        if metric.name not in self._metrics:
            kind = Counter if metric.counter else Gauge
            self._metrics[metric.name] = kind(metric.name, metric.help, tuple(sample.labels))
        return self._metrics[metric.name]

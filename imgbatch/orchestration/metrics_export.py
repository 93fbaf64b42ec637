"""Effects: the metrics of a run where others read them: in Ray's exporter, in the run's folder, and in a local file.

A job that ends loses the last scrape of Ray's exporter. `metrics.prom` in the folder of the run has the final figures, and so
has the local file, `metrics.textfile`. A file that cannot be written is a warning, and never changes the result of a run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgbatch.concurrency.signals import StopRequest
from imgbatch.config.results import MetricsConfig
from imgbatch.config.secrets import masked
from imgbatch.errors import StoreError
from imgbatch.ledger import run_record
from imgbatch.orchestration import metrics
from imgbatch.storage.stores import Folder

log = logging.getLogger(__name__)

FINAL = "metrics.prom"


@contextmanager
def written(config: MetricsConfig, verb: str, output: str, runs: Folder | None, stop: StopRequest) -> Iterator[None]:
    """Within the block, write the textfile after each run.json, and both files at the end of each run.

    Args:
        output: the URI of the output, for the labels.
        runs: the folder with runs/; None: write no `metrics.prom`, since the folder of the run is deleted when it ends.
        stop: if the orderly stop is slow, `metrics.prom` is left out as well.
    """
    files = _Files(config.textfile, verb, output, runs, stop)
    with run_record.on_write(files.update), run_record.on_finish(files.finish):
        yield


@contextmanager
def exported(verb: str, output: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Within the block, give the metrics to Ray after each run.json. Ray must be connected.

    Yields:
        A function that gives the metrics of these facts to Ray now.
    """
    from imgbatch.engine.ray_metrics import RayMetrics  # imports Ray

    exporter = RayMetrics()

    def publish(facts: Mapping[str, Any]) -> None:
        exporter.publish(metrics.samples(facts, verb=verb, output=masked(output)))

    with run_record.on_write(publish), exporter.repeating():
        yield publish


@dataclass
class _Files:
    """Writes the files of the runs of an output. Each problem is logged once."""

    textfile: str | None
    verb: str
    output: str
    runs: Folder | None
    stop: StopRequest
    _logged: set[str] = field(default_factory=set)

    def update(self, facts: Mapping[str, Any]) -> None:
        """Write the textfile, with the facts of run.json so far."""
        if self.textfile is None:
            return
        try:
            write_textfile(Path(self.textfile), self._content(facts))
        except OSError as error:
            self._warn(f"metrics.textfile={self.textfile} cannot be written: {error.strerror or error}")

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write both files, with the facts of a run that has ended."""
        self.update(facts)
        if self.runs is None or self.stop.is_slow:
            return
        try:
            self.runs.put(f"runs/{facts['run_id']}/{FINAL}", self._content(facts))
        except StoreError as error:
            self._warn(f"the metrics of the run could not be written: {error}")

    def _content(self, facts: Mapping[str, Any]) -> bytes:
        return metrics.text_format(metrics.samples(facts, verb=self.verb, output=masked(self.output)))

    def _warn(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            log.warning("%s", masked(text))


def write_textfile(path: Path, content: bytes) -> None:
    """Replace a local file, so that a reader sees either the old or the new content.

    The textfile collector of node exporter reads all files `*.prom` of its folder, as another user.

    Raises:
        OSError: the folder does not exist, or cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(content)
        new.replace(path)
    except OSError:
        with suppress(OSError):
            new.unlink()
        raise

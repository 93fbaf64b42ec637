"""Effects: small pictures of images for a page, from child processes that fetch and decode the images, within a time limit."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pyarrow as pa

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.process import module_command
from imgbatch.config.sections import Config
from imgbatch.report.parts import Picture
from imgbatch.report.picture_process import Task, Wanted, read_result
from imgbatch.report.row_samples import SampledRow
from imgbatch.schema import PARQUET
from imgbatch.storage.stores import Stores

_SECONDS = 30.0
_WAIT_S = 0.25
_PROCESSES = 2
_FEW = 16  # images
_CRASHES = 3  # of one series of images
_CONCURRENCY, _INFLIGHT_BYTES = 16, 32 << 20  # of each process
NO_TIME = "there was no time to read it"
CRASHED = "its decoder crashed"


def pictures(
    stores: Stores, config: Config, rows: Iterable[SampledRow], tars: Collection[str], seconds: float
) -> dict[str, Picture]:
    """Return a picture of each image by its URI, or the reason why there is none. The time limit is kept.

    Args:
        config: of the run; its limits apply.
        rows: rows of a table or of a listing, the most important ones first.
        tars: the URIs of the tars among the inputs.
        seconds: the time limit.

    Raises:
        Interrupted, OutputChangedError: see `tick`. The processes are ended.
    """
    images = [_wanted(row, tars, config) for row in {row.uri: row for row in rows}.values()]
    if not images:
        return {}
    fetch = replace(
        config.fetch,
        concurrency=min(config.fetch.concurrency, _CONCURRENCY),
        max_inflight_bytes=min(config.fetch.max_inflight_bytes, _INFLIGHT_BYTES),
    )
    pickle.dumps(stores)  # an error is raised here, not in a thread
    deadline = time.monotonic() + seconds
    series = [_Series(stores, replace(config, fetch=fetch), part, deadline) for part in _divided(images)]
    threads = [threading.Thread(target=each.run, daemon=True) for each in series]
    for thread in threads:
        thread.start()
    found = {image.row.uri: Picture(reason=NO_TIME) for image in images}
    try:
        for thread in threads:
            while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
                tick()
                thread.join(min(left, _WAIT_S))
    finally:
        for each in series:
            found |= each.stop()
    return found


def of_listing(
    stores: Stores, config: Config, images: pa.Table, tars: Collection[str] = ()
) -> dict[str, Picture] | None:
    """Return a picture of each image of a page that is not about a run of classify; None: the config has them left out.

    Args:
        images: their URIs and versions.

    Raises:
        Interrupted, OutputChangedError: see `pictures`.
    """
    if not config.report.thumbnails:
        return None
    return pictures(stores, config, map(SampledRow.of, images.to_pylist()), tars, config.report.timeout_s or _SECONDS)


def _wanted(row: SampledRow, tars: Collection[str], config: Config) -> Wanted:
    at = [place.start() for place in re.finditer("#", row.uri)]
    tar = next((row.uri[:end] for end in at if row.uri[:end] in tars), None)
    suffix = "" if config.source.format == "parquet" else r"\.parquet"
    in_table = tar is None and re.search(rf"(?i:{suffix})#\d+$", row.uri) is not None
    return Wanted(row, PARQUET if in_table else None, tar)


def _divided(images: Sequence[Wanted]) -> list[list[Wanted]]:
    """Divide images among the processes: members of a tar stay together, rows of a Parquet file as well."""
    files: dict[str, list[Wanted]] = {}
    processes = min(_PROCESSES, os.cpu_count() or 1, 1 + len(images) // _FEW)  # for few images, one start is enough
    parts: list[list[Wanted]] = [[] for _ in range(processes)]
    objects = 0
    for image in images:
        if image.container or image.tar:
            files.setdefault(image.tar or image.row.uri.rpartition("#")[0], []).append(image)
        else:
            parts[objects % len(parts)].append(image)
            objects += 1
    for number, of_file in enumerate(files.values()):
        if of_file[0].tar is None:
            of_file.sort(key=lambda image: int(image.row.uri.rpartition("#")[2]))
        parts[number % len(parts)] += of_file
    return [part for part in parts if part]


@dataclass
class _Series:
    """The images of one process. If it crashes, another one continues after the image that it was reading."""

    stores: Stores
    config: Config
    images: Sequence[Wanted]
    deadline: float
    _results: list[Picture] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None
    _stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Run processes until all images have a result."""
        for _ in range(_CRASHES + 1):
            seconds = self.deadline - time.monotonic()
            rest = self.images[len(self._results) :]
            if not rest or seconds <= 0 or not self._start():
                return
            assert self._process is not None and self._process.stdin is not None
            with suppress(OSError):  # it has crashed
                pickle.dump(Task(self.stores, self.config, rest, seconds + 1), self._process.stdin)
                self._process.stdin.close()
            self._read(self._process)
            if len(self._results) < len(self.images) and not self._stopped:
                self._results.append(Picture(reason=CRASHED))

    def _start(self) -> bool:
        command, environment = module_command("imgbatch.report.picture_process")
        with self._lock:
            if self._stopped:
                return False
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        return True

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as results:
            while len(self._results) < len(self.images) and (result := read_result(results)) is not None:
                self._results.append(Picture(*result))
        process.wait()

    def stop(self) -> dict[str, Picture]:
        """End the process, and return what it has read."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()
        return {image.row.uri: picture for image, picture in zip(self.images, [*self._results], strict=False)}

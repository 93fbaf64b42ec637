"""Effects: a random sample of labels/: its images are fetched and labelled again, in child processes.

The images are read by the same code as in a run, with the same limits. A decoder that crashes or hangs ends only a child
process. Nothing is written to the store.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.concurrency.monitor import tick
from imgbatch.config.sections import ModelConfig
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import ClusterError, ModelError, StoreError
from imgbatch.inference.blocks import pixels_of
from imgbatch.inference.messages import received
from imgbatch.inference.worker import LabelImages, Work
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.part_file import Footer
from imgbatch.ledger.tar_progress import members_of, version_of
from imgbatch.models import loading
from imgbatch.models.preprocess import Preprocess
from imgbatch.rejects import Refusal
from imgbatch.schema import INDEX, LABELS, LISTING, PARQUET, TAR, single_chunk
from imgbatch.sources.fetch import Fetched
from imgbatch.sources.tar_reader import End, TarReader
from imgbatch.storage.stores import Folder, Stores

log = logging.getLogger(__name__)

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]

PART, OF_TAR = "part", "of_tar"
"""Columns of drawn rows: the URI of their part, and of the tar that the image is a member of."""
_MIN_IMAGES, _MAX_IMAGES = 8, 256
"""Minimum and maximum number of images in a task."""
_TICK_S = 0.25


@dataclass
class Reservoir:
    """Draws rows from a stream of parts, each with the same probability: those with the smallest random keys."""

    size: int
    seed: int
    row_count: int = 0
    """Number of rows in the parts so far."""
    _keys: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _rows: pa.Table | None = None
    _threshold: float = 1.0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def add_part(self, log: Log, number: int, file: pq.ParquetFile, footer: Footer) -> None:
        """Draw from the rows of a part; its columns are read only if one of its rows is drawn."""
        count = file.metadata.num_rows
        keys = self._random.random(count)
        self.row_count += count
        drawn = np.flatnonzero(keys < self._threshold)
        if len(drawn) > self.size:
            drawn = np.sort(np.argpartition(keys, self.size)[: self.size])
        if not len(drawn):
            return
        names = set(file.schema_arrow.names)
        table = file.read(columns=[name for name in LABELS.names if name in names], use_threads=False)
        table = table.take(pa.array(drawn)).replace_schema_metadata(None)
        table = table.append_column(PART, pa.repeat(pa.scalar(log.uri(number)), len(table)))
        table = table.append_column(OF_TAR, _tars(table, footer))
        self._rows = table if self._rows is None else pa.concat_tables([self._rows, table], promote_options="default")
        self._keys = np.concatenate([self._keys, keys[drawn]])
        if len(self._keys) > 2 * self.size:
            self._compact()

    def rows(self) -> pa.Table:
        """Return the drawn rows."""
        self._compact()
        return self._rows if self._rows is not None else pa.table({})

    def _compact(self) -> None:
        if self._rows is not None and len(self._keys) > self.size:
            smallest = np.sort(np.argpartition(self._keys, self.size)[: self.size])
            self._keys, self._rows = self._keys[smallest], self._rows.take(pa.array(smallest)).combine_chunks()
            self._threshold = float(self._keys.max())


def _tars(table: pa.Table, footer: Footer) -> pa.Array:
    """Return for each row the tar that its image is a member of, or null."""
    tars = np.full(len(table), None, object)
    for tar in footer.streams:
        tars[np.asarray(members_of(single_chunk(table["uri"]), tar))] = tar
    return pa.array(tars, pa.string())


def as_listing(rows: pa.Table, *, parquet: bool) -> pa.Table:
    """Return drawn rows as rows of a listing, numbered in `index`.

    Args:
        parquet: whether files of any name are Parquet files (`source.format=parquet`), so that a number after `#` is a row.
    """
    uris = single_chunk(rows["uri"])
    file = "" if parquet else r"\.parquet"
    of_table = pc.match_substring_regex(uris, rf"(?i:{file})#\d+$")
    container = pc.if_else(rows[OF_TAR].is_valid(), TAR, pc.if_else(of_table, PARQUET, None))
    columns = {name: rows[name] for name in ("uri", "size", "etag", "last_modified")}
    table = pa.table({**columns, "container": container}).select(LISTING.names).cast(LISTING)
    return table.append_column(INDEX, pa.array(np.arange(len(rows)))).append_column(OF_TAR, single_chunk(rows[OF_TAR]))


def split_into_blocks(images: pa.Table, processes: int) -> list[pa.Table]:
    """Split a listing into blocks, one for each task: one for each version of a tar or Parquet file; other images share blocks.

    A tar is streamed once a task, so its members are in one block. Other images are divided into equal blocks, within limits.
    """
    groups: dict[Any, list[int]] = {}
    for at, row in enumerate(images.select(["uri", "etag", "last_modified", "container", OF_TAR]).to_pylist()):
        kind = row["container"]
        file = row[OF_TAR] if kind == TAR else row["uri"].rpartition("#")[0] if kind == PARQUET else None
        version = version_of(row["etag"], row["last_modified"]) if kind else ""
        groups.setdefault((kind or "", file, version), []).append(at)
    blocks = []
    for (kind, _, _), places in groups.items():
        if kind == PARQUET:  # it is read forward
            places.sort(key=lambda at: int(images["uri"][at].as_py().rpartition("#")[2]))
        rows = len(places) if kind else min(max(len(places) // (4 * processes), _MIN_IMAGES), _MAX_IMAGES)
        blocks += [images.take(pa.array(places[start : start + rows])) for start in range(0, len(places), rows)]
    return blocks


class SampleWorker(LabelImages):
    """Labels rows of a listing, which it receives instead of their numbers; finds members of tars by their names."""

    last_decoded: pa.Table | None = None
    """The block that was decoded last, with its pixels."""

    def decoded(self, block: pa.Table, rows: int) -> Iterator[pa.Table]:
        """Yield the images of a block, `rows` at a time."""
        tar = block[OF_TAR][0].as_py()
        images = block.select(LISTING.names)
        fetched = self._fetcher(images) if tar is None else self._fetch_members(tar, images)
        for start in range(0, len(block), rows):
            part = slice(start, start + rows)
            yield self._table(block["index"].to_numpy()[part], images[part], islice(fetched, rows), self._decode)

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of the model."""
        return self._work.model.preprocess

    def _table(self, *arguments: Any, **options: Any) -> pa.Table:
        self.last_decoded = super()._table(*arguments, **options)
        return self.last_decoded

    def _fetch_members(self, tar: str, images: pa.Table) -> Iterator[Fetched]:
        """Yield members of a tar, in the order of the listing; the tar is read up to the last of them."""
        rows = images.to_pylist()
        names = {row["uri"][len(tar) + 1 :]: None for row in rows}
        contents: dict[str, bytes | Refusal | None] = dict(names)
        refusal = Refusal("fetch", "vanished", f"{tar} has no member of that name any more")
        stores = self._work.stores
        try:
            meta = stores.call("look at", tar, lambda store, path: store.head(path))
            first_row = rows[0]
            if version_of(meta.etag, meta.last_modified) != version_of(first_row["etag"], first_row["last_modified"]):
                refusal = Refusal("fetch", "changed", f"{tar} has another version than the one that was labelled")
            else:
                limit = self._work.config.fetch.max_bytes
                for member in TarReader(stores, tar, meta, "*", limit, wanted=frozenset(names)).members():
                    if isinstance(member, End):
                        break
                    if contents[member.name] is None:  # of members with one name, the first has the label
                        contents[member.name] = member.content
                    if None not in contents.values():
                        break
        except StoreError as error:
            refusal = Refusal("fetch", error.reason, str(error)[:300], error.attempts)
        for row in rows:
            content = contents[row["uri"][len(tar) + 1 :]]
            size = len(content) if isinstance(content, bytes) else None
            yield Fetched(refusal if content is None else content, size, row["etag"], row["last_modified"])


@dataclass(frozen=True, slots=True)
class Task:
    """The task of each process. The model is loaded there, since the function that builds a network may not pickle."""

    stores: Stores
    output: Folder
    config: WorkerConfig
    model: ModelConfig
    digest: str
    """Of the model that was checked against the output."""
    stall_timeout_s: float
    """`cluster.stall_timeout_s`"""
    isolated: bool = False
    """Whether images are decoded in child processes."""


_tasks: list[Task] = []
_workers: list[SampleWorker] = []
"""The task and the worker of this process, once they are set."""


def _start(task: Task) -> None:
    """Prepare this process. Steps that may fail are in `_label`, since the pool would lose an error that is raised here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _tasks.append(task)


def _end_with(sentinel: int) -> None:
    """End this process when the caller's process has ended, even if it was killed."""
    wait_for([sentinel])
    os._exit(1)


def _label(block: pa.Table) -> list[pa.Table]:
    """Label a block; the model is loaded for the first one."""
    if not _workers:
        (task,) = _tasks
        model = loading.load(task.model, task.stores)
        if model.digest != task.digest:
            raise ModelError(f"{model.name} has changed since this command began: start it again")
        work = Work(task.stores, task.output, task.config, model)
        _workers.append(SampleWorker(work, isolated=task.isolated))
    return list(_workers[0](block))


def _label_with_pixels(block: pa.Table) -> tuple[list[pa.Table], Pixels | None]:
    """Label a block of one image; return its results, and the image as the network sees it, None if it was rejected."""
    tables = _label(block)
    (worker,) = _workers
    decoded = worker.last_decoded
    if decoded is None or decoded["reason"][0].is_valid:
        return tables, None
    return tables, pixels_of(decoded, worker.preprocess)[0].copy()


def label_one(task: Task, image: pa.Table) -> tuple[Mapping[str, Any], Pixels | None]:
    """Label one image in a child process; return its row of RESULTS, and the image as the network sees it.

    If the process dies, the image is decoded in a child of its own, and gets the reject of a crash.

    Args:
        image: the result of `as_listing`, with one row.

    Raises:
        ClusterError: the process died again, or gave no result for `cluster.stall_timeout_s`.
        ImgbatchError: raised by the process.
    """
    for isolated in (False, True):
        try:
            for _, (tables, pixels) in _completed(replace(task, isolated=isolated), {0: image}, 1, _label_with_pixels):
                (row,) = [row for table in tables for row in received(table).rows.to_pylist()]
                return row, pixels
        except BrokenProcessPool:
            continue
    raise ClusterError(
        "the process that labels the image ends unexpectedly: is there enough memory? (see the kernel's log)"
    )


def relabel(task: Task, images: pa.Table) -> dict[int, Mapping[str, Any]]:
    """Label images again in child processes; return rows of RESULTS by their `index`. `tick` is called four times a second.

    A process that dies loses its blocks. They are labelled once more, with each image decoded in a child of its own.

    Args:
        images: the result of `as_listing`.

    Raises:
        ClusterError: a process died again, or no block was completed for `cluster.stall_timeout_s`.
        ImgbatchError: raised by a process.
    """
    processes = 1 if task.config.device == "cuda" else len(os.sched_getaffinity(0))
    pending = dict(enumerate(split_into_blocks(images, processes)))
    results: dict[int, Mapping[str, Any]] = {}
    for isolated in (False, True):
        if not pending:
            break
        if isolated:
            log.warning(
                "a process ended unexpectedly: its images are labelled again, each decoded in a process of its own"
            )
            task = replace(task, isolated=True)
        try:
            for number, tables in _completed(task, pending, min(processes, len(pending)), _label):
                del pending[number]
                for table in tables:
                    results |= {row["index"]: row for row in received(table).rows.to_pylist()}
        except BrokenProcessPool as error:
            if isolated:
                raise ClusterError(
                    "the processes that label the sample end unexpectedly: is there enough memory? (see the kernel's log)"
                ) from error
    return results


def _completed(
    task: Task, pending: Mapping[int, pa.Table], processes: int, label: Callable[[pa.Table], T]
) -> Iterator[tuple[int, T]]:
    """Yield (number, label(block)) of blocks as they are completed."""
    with _pool(task, processes) as pool:
        numbers: dict[Future[T], int] = {pool.submit(label, block): number for number, block in pending.items()}
        last_result = time.monotonic()
        while numbers:
            tick()
            done, _ = wait(numbers, timeout=_TICK_S, return_when=FIRST_COMPLETED)
            if done:
                last_result = time.monotonic()
            elif time.monotonic() - last_result > task.stall_timeout_s:
                raise ClusterError(
                    f"no image was labelled again for {task.stall_timeout_s:.0f} s (cluster.stall_timeout_s)"
                )
            broken = None
            for future in done:
                number = numbers.pop(future)
                try:
                    yield number, future.result()
                except BrokenProcessPool as error:  # blocks that were completed before it count
                    broken = error
            if broken is not None:
                raise broken


@contextmanager
def _pool(task: Task, processes: int) -> Iterator[ProcessPoolExecutor]:
    """Provide a pool of processes, and kill those that are still running at the end."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start, initargs=(task,)
    )
    try:
        yield pool
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        pool.shutdown(wait=True, cancel_futures=True)

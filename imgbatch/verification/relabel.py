"""Effects: rows of labels/ drawn at random, their images fetched again, and labelled again in processes of their own.

The images are read by the code that a run reads them with, under the same limits: a decoder that crashes or does not return
takes a child process along, never the caller. Nothing is written to the store.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.concurrency.monitor import tick
from imgbatch.config.sections import Config
from imgbatch.errors import ClusterError, ModelError, StoreError
from imgbatch.inference.messages import received
from imgbatch.inference.worker import LabelImages, Work
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.part_file import Footer
from imgbatch.ledger.tar_progress import members_of, version_of
from imgbatch.models import loading
from imgbatch.rejects import Refusal
from imgbatch.schema import INDEX, LABELS, LISTING, PARQUET, TAR, whole
from imgbatch.sources.fetch import Fetched
from imgbatch.sources.tar_reader import End, TarReader
from imgbatch.storage.stores import Folder, Stores

log = logging.getLogger(__name__)

PART, OF_TAR = "part", "of_tar"
"""Columns of drawn rows: the URI of their part, and of the tar that the image is a member of."""
_LEAST, _MOST = 8, 256  # images of a task
_TICK_S = 0.25


@dataclass
class Reservoir:
    """Draws rows of parts that pass by, each with the same probability: those with the smallest of random keys."""

    size: int
    seed: int
    seen: int = 0
    """How many rows have passed."""
    _keys: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _rows: pa.Table | None = None
    _threshold: float = 1.0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def take(self, log: Log, number: int, file: pq.ParquetFile, footer: Footer) -> None:
        """Let the rows of a part pass by; its columns are read only if there is one among them that is drawn as yet."""
        count = file.metadata.num_rows
        keys = self._random.random(count)
        self.seen += count
        chosen = np.flatnonzero(keys < self._threshold)
        if len(chosen) > self.size:
            chosen = np.sort(np.argpartition(keys, self.size)[: self.size])
        if not len(chosen):
            return
        names = set(file.schema_arrow.names)
        table = file.read(columns=[name for name in LABELS.names if name in names], use_threads=False)
        table = table.take(pa.array(chosen)).replace_schema_metadata(None)
        table = table.append_column(PART, pa.repeat(pa.scalar(log.uri(number)), len(table)))
        table = table.append_column(OF_TAR, _tars(table, footer))
        self._rows = table if self._rows is None else pa.concat_tables([self._rows, table], promote_options="default")
        self._keys = np.concatenate([self._keys, keys[chosen]])
        if len(self._keys) > 2 * self.size:
            self._compact()

    def rows(self) -> pa.Table:
        """Return the rows that were drawn."""
        self._compact()
        return self._rows if self._rows is not None else pa.table({})

    def _compact(self) -> None:
        if self._rows is not None and len(self._keys) > self.size:
            kept = np.sort(np.argpartition(self._keys, self.size)[: self.size])
            self._keys, self._rows = self._keys[kept], self._rows.take(pa.array(kept)).combine_chunks()
            self._threshold = float(self._keys.max())


def _tars(table: pa.Table, footer: Footer) -> pa.Array:
    """Return for each row the tar that its image is a member of, null if it is of none."""
    tars = np.full(len(table), None, object)
    for tar in footer.tars:
        tars[np.asarray(members_of(whole(table["uri"]), tar))] = tar
    return pa.array(tars, pa.string())


def listed(rows: pa.Table, *, parquet: bool) -> pa.Table:
    """Return the drawn rows as a listing has them, with their numbers as `index`.

    Args:
        parquet: names of any kind may be Parquet files (`source.format=parquet`), in which `#` is followed by a row.
    """
    uris = whole(rows["uri"])
    file = "" if parquet else r"\.parquet"
    of_table = pc.match_substring_regex(uris, rf"(?i:{file})#\d+$")
    container = pc.if_else(rows[OF_TAR].is_valid(), TAR, pc.if_else(of_table, PARQUET, None))
    columns = {name: rows[name] for name in ("uri", "size", "etag", "last_modified")}
    table = pa.table({**columns, "container": container}).select(LISTING.names).cast(LISTING)
    return table.append_column(INDEX, pa.array(np.arange(len(rows)))).append_column(OF_TAR, whole(rows[OF_TAR]))


def blocks(images: pa.Table, processes: int) -> list[pa.Table]:
    """Cut a listing into tasks: a version of a tar, or of a Parquet file, each; other images some at a time."""
    groups: dict[Any, list[int]] = {}
    for at, row in enumerate(images.select(["uri", "etag", "last_modified", "container", OF_TAR]).to_pylist()):
        kind = row["container"]
        file = row[OF_TAR] if kind == TAR else row["uri"].rpartition("#")[0] if kind == PARQUET else None
        version = version_of(row["etag"], row["last_modified"]) if kind else ""
        groups.setdefault((kind or "", file, version), []).append(at)
    cut = []
    for (kind, _, _), places in groups.items():
        if kind == PARQUET:  # which is read forward
            places.sort(key=lambda at: int(images["uri"][at].as_py().rpartition("#")[2]))
        rows = len(places) if kind else min(max(len(places) // (4 * processes), _LEAST), _MOST)
        cut += [images.take(pa.array(places[start : start + rows])) for start in range(0, len(places), rows)]
    return cut


class Resampler(LabelImages):
    """Labels rows of a listing that it is given, members of tars by their names among them."""

    def decoded(self, block: pa.Table, rows: int) -> Iterator[pa.Table]:
        """Yield the images of a block, `rows` at a time."""
        tar = block[OF_TAR][0].as_py()
        images = block.select(LISTING.names)
        fetched = self._fetcher(images) if tar is None else self._wanted(tar, images)
        for start in range(0, len(block), rows):
            few = slice(start, start + rows)
            yield self._table(block["index"].to_numpy()[few], images[few], islice(fetched, rows), self._decode)

    def _wanted(self, tar: str, images: pa.Table) -> Iterator[Fetched]:
        """Yield members of a tar, in the order of the listing; the tar is streamed up to the last one of them."""
        rows = images.to_pylist()
        names = {row["uri"][len(tar) + 1 :]: None for row in rows}
        left: dict[str, bytes | Refusal | None] = dict(names)
        refusal = Refusal("fetch", "vanished", f"{tar} has no member of that name any more")
        stores = self._work.stores
        try:
            meta = stores.call("look at", tar, lambda store, path: store.head(path))
            first = rows[0]
            if version_of(meta.etag, meta.last_modified) != version_of(first["etag"], first["last_modified"]):
                refusal = Refusal("fetch", "changed", f"{tar} is another than the one that was labelled")
            else:
                limit = self._work.config.fetch.max_bytes
                for member in TarReader(stores, tar, meta, "*", limit, wanted=frozenset(names)).members():
                    if isinstance(member, End):
                        break
                    if left[member.name] is None:  # the first of a name is the one that has a label
                        left[member.name] = member.content
                    if None not in left.values():
                        break
        except StoreError as error:
            refusal = Refusal("fetch", error.reason, str(error)[:300], error.attempts)
        for row in rows:
            content = left[row["uri"][len(tar) + 1 :]]
            size = len(content) if isinstance(content, bytes) else None
            yield Fetched(refusal if content is None else content, size, row["etag"], row["last_modified"])


@dataclass(frozen=True, slots=True)
class Task:
    """What a process has to know. The model is loaded there: what builds a network need not travel."""

    stores: Stores
    output: Folder
    config: Config
    digest: str
    isolated: bool


_tasks: list[Task] = []
_resamplers: list[Resampler] = []
"""Of this process: one each."""


def _start(task: Task) -> None:
    """Prepare this process. What may fail comes later: here an error would be lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _tasks.append(task)


def _end_with(sentinel: int) -> None:
    """End this process when the caller's has ended, however it did."""
    wait_for([sentinel])
    os._exit(1)


def _label(block: pa.Table) -> list[pa.Table]:
    """Label a block; the model is loaded with the first one."""
    if not _resamplers:
        (task,) = _tasks
        model = loading.load(task.config.model, task.stores)
        if model.digest != task.digest:
            raise ModelError(f"{model.name} has changed since this command began: start it again")
        work = Work(task.stores, task.output, task.config, model)
        _resamplers.append(Resampler(work, isolated=task.isolated))
    return list(_resamplers[0](block))


def label_again(task: Task, images: pa.Table) -> dict[int, Mapping[str, Any]]:
    """Return what the model says of images now, by their `index`: rows of RESULTS. `tick` is called four times a second.

    Raises:
        ClusterError: a process died with one image at a time, or nothing came for `cluster.stall_timeout_s`.
        ImgbatchError: what a process raised.
    """
    processes = 1 if task.config.cluster.device == "cuda" else len(os.sched_getaffinity(0))
    left = dict(enumerate(blocks(images, processes)))
    found: dict[int, Mapping[str, Any]] = {}
    for isolated in (False, True):
        if not left:
            break
        if isolated:
            log.warning("a process ended while it labelled: the images that it had are decoded one by one")
            task = replace(task, isolated=True)
        try:
            for number, tables in _completed(task, left, min(processes, len(left))):
                del left[number]
                for table in tables:
                    rows, _, _ = received(table)
                    found |= {row["index"]: row for row in rows.to_pylist()}
        except BrokenProcessPool as error:
            if isolated:
                raise ClusterError(
                    "the processes that label the sample end whatever they do: is there enough memory? (the kernel's log says)"
                ) from error
    return found


def _completed(task: Task, left: Mapping[int, pa.Table], processes: int) -> Iterator[tuple[int, list[pa.Table]]]:
    """Yield (number, results) of the blocks as they are done."""
    with _pool(task, processes) as pool:
        numbers: dict[Future[list[pa.Table]], int] = {
            pool.submit(_label, block): number for number, block in left.items()
        }
        last = time.monotonic()
        while numbers:
            tick()
            done, _ = wait(numbers, timeout=_TICK_S, return_when=FIRST_COMPLETED)
            if done:
                last = time.monotonic()
            elif time.monotonic() - last > task.config.cluster.stall_timeout_s:
                raise ClusterError(
                    f"not one image labelled again for {task.config.cluster.stall_timeout_s:.0f} s (cluster.stall_timeout_s)"
                )
            broken = None
            for future in done:
                number = numbers.pop(future)
                try:
                    yield number, future.result()
                except BrokenProcessPool as error:  # what came before it counts
                    broken = error
            if broken is not None:
                raise broken


@contextmanager
def _pool(task: Task, processes: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool of processes that are gone with it, whatever they do."""
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

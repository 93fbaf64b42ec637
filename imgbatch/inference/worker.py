"""Effects: from numbers of the listing to result rows: the pure functions on blocks, and the body of an actor.

    numbers ──listed──► uri, size, …  ──decoded──► + H×W×3 uint8 ──labelled──► RESULTS

`decoded` and `labelled` run one after the other in one actor on a CPU machine, and as two operators where there are GPUs.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import imgbatch
from imgbatch.concurrency.watchdog import Watchdog
from imgbatch.config.sections import Config
from imgbatch.errors import ConfigError, ModelError
from imgbatch.evaluation.training_images import content_hash
from imgbatch.inference.label_columns import answers
from imgbatch.inference.messages import FATAL, NOTE, READ, fatal, message, with_note
from imgbatch.ledger.listing_pages import Pages
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.base import Runtime
from imgbatch.models.runtimes.build import build_checked
from imgbatch.models.self_check import SelfCheckError
from imgbatch.rejects import Refusal
from imgbatch.schema import (
    CONTENT_HASH,
    EMBEDDING,
    LISTING,
    PLACE_COLUMNS,
    REFUSAL_COLUMNS,
    RESULTS,
    TAR,
    carried_fields,
    whole,
    with_carried,
)
from imgbatch.sources.fetch import Fetched, Fetcher, members_of_tar
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal import console

if TYPE_CHECKING:
    from imgbatch.decode import Picture

PIXELS = "pixels"
CHUNK = 256
"""Images that cross processes at a time where there are GPUs."""
_ISOLATED_MEMBERS = 256
"""Of a tar whose reader was killed: the image that did it is among so many, counted from the last row that arrived."""
_AT_ONCE = 64  # decoded, and then labelled, where there are none: the network of the store never waits for long

_UNUSABLE_S = 0.5  # until a worker that cannot be used gives a unit back: the driver is about to leave its node out


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker has to know; travels to every process once."""

    stores: Stores
    listing: Folder
    config: Config
    model: Model
    version: str = imgbatch.__version__
    node: Callable[[], str] = socket.gethostname
    """Returns the id of the node of the calling process, as the cluster knows it."""


def decoded(
    numbers: npt.NDArray[np.int64],
    listed: pa.Table,
    fetched: Iterable[Fetched],
    preprocess: Preprocess,
    decode: Callable[[bytes], Picture],
    *,
    hashed: bool = False,
) -> pa.Table:
    """Return a row for each listed image: its pixels at the network's input size, or why there are none.

    The column `pixels` holds H×W×3 bytes, all zero for a reject; width and height are the original's, upright. With `hashed`
    each image whose bytes were read has a hash of them.
    """
    from imgbatch.decode import Rejected

    height, width = preprocess.height, preprocess.width
    pixels = np.zeros((len(listed), height, width, 3), np.uint8)
    rows: list[dict[str, Any]] = []
    for i, image in enumerate(fetched):
        row: dict[str, Any] = {"size": image.size, "etag": image.etag, "last_modified": image.last_modified}
        refusal = image.content if isinstance(image.content, Refusal) else None
        if isinstance(image.content, bytes):
            if hashed:
                row[CONTENT_HASH] = content_hash(image.content)
            try:
                picture = decode(image.content)
                pixels[i] = preprocess(picture.pixels)
                row |= {"width": picture.width, "height": picture.height}
            except Rejected as error:
                refusal = Refusal("decode", error.reason, str(error))
            except (RuntimeError, MemoryError) as error:  # torch, which could not resize it
                reason = "out_of_memory" if "memory" in str(error) else "corrupt"
                refusal = Refusal("decode", reason, str(error)[:300])
        if refusal is not None:
            row |= {"stage": refusal.stage, "reason": refusal.reason, "message": refusal.message}
            row |= {"passing": refusal.passing, "attempts": refusal.attempts}
        rows.append(row)
    known = ["width", "height", CONTENT_HASH, *REFUSAL_COLUMNS, "size", "etag", "last_modified"]
    columns = {name: pa.array([row.get(name) for row in rows], RESULTS.field(name).type) for name in known}
    flat = pa.FixedSizeBinaryArray.from_buffers(pa.binary(height * width * 3), len(rows), [None, pa.py_buffer(pixels)])
    carried = {name: listed[name] for name in carried_fields(listed.schema).names}
    place = {
        name: listed[name] if name in listed.column_names else pa.nulls(len(rows), pa.int64()) for name in PLACE_COLUMNS
    }
    return pa.table({"index": pa.array(numbers), "uri": listed["uri"], **columns, **place, **carried, PIXELS: flat})


def pixels_of(images: pa.Table, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Return the column `pixels` as n×H×W×3, without a copy."""
    column = whole(images[PIXELS])
    size = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
    return flat.reshape(-1, preprocess.height, preprocess.width, 3)


def labelled(images: pa.Table, runtime: Runtime, model: Model, min_score: float) -> pa.Table:
    """Return RESULTS with carried columns for what `decoded` gave."""
    pixels, good = pixels_of(images, model.preprocess), np.asarray(images["reason"].is_null())
    prediction = runtime(pixels if good.all() else pixels[good])
    if not np.isfinite(prediction.scores).all():
        raise ModelError("the network answers with numbers that are not finite: try --set classify.dtype=float32")
    columns = answers(prediction, model, min_score)
    schema = with_carried(RESULTS, carried_fields(images.schema))
    if prediction.embeddings is not None:
        columns[EMBEDDING] = _fixed_lists(prediction.embeddings)
        schema = schema.append(pa.field(EMBEDDING, columns[EMBEDDING].type))
    # Row i of the table takes row places[i] of the answers, or null where it is a reject.
    places = pa.array(np.cumsum(good) - 1, mask=~good)
    taken = {name: values.take(places) for name, values in columns.items()}
    table = images.drop_columns([PIXELS])
    for name in taken:
        table = table.append_column(name, taken[name])
    return table.select(schema.names).cast(schema)


def _fixed_lists(numbers: npt.NDArray[np.float16]) -> pa.FixedSizeListArray:
    """Return the rows of a matrix as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1])


class Worker:
    """What the operators share: the listing's pages, and images fetched and decoded as their numbers come."""

    def __init__(self, work: Work, *, isolated: bool = False) -> None:
        console.log_in_worker()
        self._work = work
        self._pages = Pages(work.listing)
        self._fetcher = Fetcher(work.stores, work.config.fetch, work.config.source)
        self._isolated = isolated

    @cached_property
    def _decode(self) -> Callable[[bytes], Picture]:
        return _decoder(self._work, self._isolated)

    @cached_property
    def _decode_here(self) -> Callable[[bytes], Picture]:
        return _decoder(self._work, isolated=False)

    def decoded(self, block: pa.Table, rows: int) -> Iterator[pa.Table]:
        """Yield the images of a block, `rows` at a time; the GETs of the next ones are under way by then."""
        if imgbatch.__version__ != self._work.version:  # Python and Ray compare theirs when a node joins
            raise ConfigError(
                f"a node runs imgbatch {imgbatch.__version__}, the driver {self._work.version}: install one version everywhere"
            )
        numbers = block["index"].to_numpy()
        listed = self._pages.rows(numbers)
        if listed["container"][0].as_py() == TAR:
            yield from self._members(block, listed, rows)
            return
        fetched = self._fetcher(listed)
        for start in range(0, len(numbers), rows):
            few = slice(start, start + rows)
            yield self._table(numbers[few], listed[few], islice(fetched, rows), self._decode)

    def keeps_sidecars(self, number: int) -> Callable[[Mapping[str, Mapping[str, str]]], None] | None:
        """Return what keeps the sidecars of a tar that do not lie beside their image; None: nobody wants them."""
        return None

    def _members(self, block: pa.Table, listed: pa.Table, rows: int) -> Iterator[pa.Table]:
        """Yield the images of a tar, and at last a row that says that it was read to its end."""
        (number,), (tar,) = block["index"].to_pylist(), listed.select(LISTING.names).to_pylist()
        (resume_offset,), (last_offset,) = block["resume_offset"].to_pylist(), block["last_offset"].to_pylist()
        keep = self.keeps_sidecars(number)
        found = members_of_tar(self._work.stores, number, tar, self._work.config, resume_offset, last_offset, keep)
        isolated = _ISOLATED_MEMBERS if self._isolated else 0
        schema = with_carried(RESULTS, carried_fields(listed.schema))
        while few := list(islice(found, rows)):
            numbers = np.array([READ if row.get("read") else number for row, _ in few], np.int64)
            table = pa.Table.from_pylist([row for row, _ in few], schema=schema)
            decode = self._decode if isolated > 0 or not self._isolated else self._decode_here
            yield self._table(numbers, table, [image for _, image in few], decode)
            isolated -= len(few)

    def _table(
        self,
        numbers: npt.NDArray[np.int64],
        listed: pa.Table,
        fetched: Iterable[Fetched],
        decode: Callable[[bytes], Picture],
    ) -> pa.Table:
        """Return what `decoded` does, as the model and the config ask for it."""
        preprocess, hashed = self._work.model.preprocess, self._work.config.output.content_hash
        return decoded(numbers, listed, fetched, preprocess, decode, hashed=hashed)


def _decoder(work: Work, isolated: bool) -> Callable[[bytes], Picture]:
    """Return a decoder that ends its process when it does not come back; or one in a child, which can be stopped."""
    from imgbatch.decode import decode
    from imgbatch.decode.sandbox import decode_isolated

    limits, short_side = work.config.decode, work.model.preprocess.short_side
    known: dict[str, Any] = {"max_pixels": limits.max_pixels, "short_side": short_side}
    if isolated:
        return lambda data: decode_isolated(data, timeout_s=limits.timeout_s, **known)
    watchdog = Watchdog(limits.timeout_s)

    def watched(data: bytes) -> Picture:
        with watchdog.watching():
            return decode(data, **known)

    return watched


def guarded(tables: Iterator[pa.Table], work: Work) -> Iterator[pa.Table]:
    """Yield the tables, and the error that ends the run: an exception would be lost among those of dying processes.

    A node that cannot be used is a note, `left_out`: its images are not done, and others do them.
    """
    try:
        yield from tables
    except SelfCheckError as error:
        told = {"host": socket.gethostname(), "why": str(error)}
        yield message(NOTE, "note", json.dumps({"left_out": {work.node(): told}}))
    except Exception as error:  # noqa: BLE001 - whatever it is, the driver raises it
        yield fatal(error)


_workers: dict[tuple[str, bool], Worker] = {}
"""The worker of this process, by the listing it reads; a process serves one run at a time."""


def _worker_of(work: Work, isolated: bool) -> Worker:
    key = (work.listing.uri, isolated)
    if key not in _workers:
        _workers.clear()
        _workers[key] = Worker(work, isolated=isolated)
    return _workers[key]


def decode_block(block: pa.Table, work: Work, isolated: bool = False) -> Iterator[pa.Table]:
    """Fetch and decode a block of image numbers: the CPU operator where there are GPUs. Pixels come out."""

    def blocks() -> Iterator[pa.Table]:
        yield from _worker_of(work, isolated).decoded(block, CHUNK)

    yield from guarded(blocks(), work)


class Classify:
    """The GPU operator: pixels in, rows out."""

    def __init__(self, work: Work, load: Callable[[Work], Runtime] | None = None) -> None:
        self._work = work
        self._runtime: Runtime | None = None
        self._load = load or load_runtime
        self._unusable: SelfCheckError | None = None
        self._lock = Lock()

    def __call__(self, images: pa.Table) -> Iterator[pa.Table]:
        """Label a block of decoded images; an error that decoding sent goes on to the driver."""
        failed = images.filter(pa.array(images["index"].to_numpy() == FATAL))
        if len(failed):
            yield message(FATAL, failed["reason"][0].as_py(), failed["message"][0].as_py())
        else:
            yield from guarded(map(self.label, [images]), self._work)

    def label(self, images: pa.Table, **seconds: float) -> pa.Table:
        """Return the results of decoded images; the network is built at the first call.

        Raises:
            SelfCheckError: this node cannot be used, now and at each later call.
        """
        with self._lock:
            if self._unusable is not None:
                time.sleep(_UNUSABLE_S)
                raise self._unusable
            if self._runtime is None:
                try:
                    self._runtime = self._load(self._work)
                except SelfCheckError as error:
                    self._unusable = error
                    raise
            started = time.monotonic()
            results = labelled(images, self._runtime, self._work.model, self._work.config.answer.min_score)
            seconds["classify_s"] = time.monotonic() - started
            return with_note(results, {**self._runtime.facts(), **seconds})


class LabelImages(Worker):
    """The one operator of a CPU machine: numbers in, rows out. Moving pixels between processes would cost more."""

    def __init__(self, work: Work, load: Callable[[Work], Runtime] | None = None, *, isolated: bool = False) -> None:
        super().__init__(work, isolated=isolated)
        self._classify = Classify(work, load)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Fetch, decode and label a block of image numbers."""
        yield from guarded(self._labelled(block), self._work)

    def _labelled(self, block: pa.Table) -> Iterator[pa.Table]:
        started = time.monotonic()
        batch = self._work.config.classify.batch_size or 1
        for images in self.decoded(block, -(-_AT_ONCE // batch) * batch):  # no batch is padded but the last
            yield self._classify.label(images, fetch_and_decode_s=time.monotonic() - started)
            started = time.monotonic()


def load_runtime(work: Work) -> Runtime:
    """Build what executes the model, here.

    Raises:
        SelfCheckError: this node cannot be used: no runtime answers as the model should.
    """
    config = work.config
    return build_checked(
        work.model,
        k=config.top_k,
        device=config.cluster.device,
        config=config.classify,
        embeddings=config.output.embeddings,
    )

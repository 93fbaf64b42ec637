"""Effects: the code of worker processes: from image numbers of the listing to rows of results.

    numbers ──listing──► uri, size, … ──decode──► + H×W×3 uint8 ──classify──► RESULTS

Both steps run one after the other in one actor on a CPU machine (`LabelImages`), and as two operators where there are GPUs
(`decode_block`, `Classify`). A worker does not raise: Ray Data ignores failed tasks here, since one image may kill a process.
It sends the error to the driver as an event.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import imgbatch
from imgbatch.concurrency.watchdog import Watchdog
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import ConfigError
from imgbatch.inference.blocks import classify_images, decode_images
from imgbatch.inference.canary import Canary, CanaryError, require_accuracy
from imgbatch.inference.messages import (
    Event,
    events_alone,
    fatal,
    is_fatal,
    note,
    split_events,
    stream_end,
    with_events,
)
from imgbatch.inference.timing import BatchTimer, ImageTimings, Sampling, Timed, stream_event
from imgbatch.ledger.listing_pages import PageFolder, Pages
from imgbatch.ledger.streams import UNIT_COLUMNS
from imgbatch.models.model import Model
from imgbatch.models.runtimes.base import Runtime
from imgbatch.models.runtimes.build import build_checked
from imgbatch.models.self_check import SelfCheckError
from imgbatch.schema import LISTING, RESULTS, carried_fields, with_carried
from imgbatch.sources.base import StreamEnd, is_stream
from imgbatch.sources.fetch import Fetched, Fetcher, read_stream
from imgbatch.storage.stores import Stores
from imgbatch.terminal import console

if TYPE_CHECKING:
    from imgbatch.decode import Picture

CHUNK = 256
"""Number of images that are sent between processes at a time where there are GPUs."""
_AT_ONCE = 64
"""Number of images that are decoded, then classified, on CPU machines: a small number, so that GETs never pause for long."""
_ISOLATED_IMAGES = 256
"""Number of images of a stream that are decoded in a child process after a process died: the one that killed it is among
those after the last row that arrived."""
_UNUSABLE_S = 0.5
"""Seconds before a worker that cannot be used returns a unit: by then the driver excludes its node."""

Sidecars = Mapping[str, Mapping[str, str]]
"""The texts of sidecars by the key of their image, then by column."""


@dataclass(frozen=True, slots=True)
class Work:
    """The task of all workers of a run; sent to every process once."""

    stores: Stores
    listing: PageFolder
    config: WorkerConfig
    model: Model
    version: str = imgbatch.__version__
    """The version of the driver."""
    node: Callable[[], str] = socket.gethostname
    """Returns the cluster's id of the node on which it is called."""
    canary: Canary | None = None
    """Labelled images that each node labels first; see `guard.canary`."""
    sampling: Sampling | None = None
    """Set if the images are a sample: workers report the seconds of each image and batch."""


class Worker:
    """The base of operators: fetches and decodes the images of a block."""

    def __init__(self, work: Work, *, isolated: bool = False) -> None:
        """Start the threads that fetch.

        Args:
            isolated: decode in a child process, which may crash or hang without ending this one.
        """
        console.log_in_worker()
        self._work = work
        self._pages = Pages(work.listing)
        self._fetcher = Fetcher(work.stores, work.config.fetch, work.config.source)
        self._isolated = isolated

    @cached_property
    def _decode(self) -> Callable[[bytes], Picture]:
        return _decoder(self._work, self._isolated)

    @cached_property
    def _decode_in_process(self) -> Callable[[bytes], Picture]:
        return _decoder(self._work, isolated=False)

    def decoded(self, block: pa.Table, rows: int) -> Iterator[pa.Table]:
        """Yield the images of a block, `rows` at a time, while the next ones are fetched.

        Args:
            block: the column `index`; for a stream also UNIT_COLUMNS, from which reading resumes.

        Raises:
            ConfigError: this node has another version of imgbatch than the driver.
        """
        if imgbatch.__version__ != self._work.version:  # Python and Ray compare their own versions when a node joins
            raise ConfigError(
                f"a node runs imgbatch {imgbatch.__version__}, the driver {self._work.version}: install one version everywhere"
            )
        numbers = block["index"].to_numpy()
        listed = self._pages.rows(numbers)
        if is_stream(listed)[0].as_py():
            yield from self._stream(block, listed, rows)
            return
        fetched = self._fetcher(listed)
        for start in range(0, len(numbers), rows):
            part = slice(start, start + rows)
            yield self._table(numbers[part], listed[part], islice(fetched, rows), self._decode)

    def sidecar_sink(self, number: int) -> Callable[[Sidecars], None] | None:
        """Return a function for the sidecars of a stream that are not next to their image; None: they are only counted.

        Args:
            number: the stream's number in the listing.
        """
        return None

    def _stream(self, block: pa.Table, listed: pa.Table, rows: int) -> Iterator[pa.Table]:
        """Yield the images of a stream, the last ones with the event that its end was reached."""
        (number,), (row,) = block["index"].to_pylist(), listed.select(LISTING.names).to_pylist()
        (position,) = block.select(UNIT_COLUMNS).to_pylist()
        work = self._work
        stream = read_stream(work.stores, number, row, work.config, keep=self.sidecar_sink(number), **position)
        if work.sampling is not None:
            stream = islice(stream, work.sampling.members)
        isolated = _ISOLATED_IMAGES if self._isolated else 0
        schema = with_carried(RESULTS, carried_fields(listed.schema))
        start = max(0, *position.values())
        read, offset = 0, start
        while batch := list(islice(timed := Timed(stream), rows)):
            images = [item for item in batch if not isinstance(item, StreamEnd)]
            events = [stream_end(item) for item in batch if isinstance(item, StreamEnd)]
            decode = self._decode if isolated > 0 or not self._isolated else self._decode_in_process
            table = pa.Table.from_pylist([row for row, _ in images], schema=schema)
            numbers = np.full(len(images), number, np.int64)
            fetched = [image for _, image in images]
            if work.sampling is not None:
                read, offset = read + len(images), images[-1][0]["offset"] if images else offset
                ended = bool(events) or read >= work.sampling.members
                events += [stream_event(number, read, start, offset, whole=bool(events))] if ended else []
            yield self._table(numbers, table, fetched, decode, *events, fetch_s=timed.seconds)
            isolated -= len(images)

    def _table(
        self,
        numbers: npt.NDArray[np.int64],
        listed: pa.Table,
        fetched: Iterable[Fetched],
        decode: Callable[[bytes], Picture],
        *events: Event,
        fetch_s: float = 0.0,
    ) -> pa.Table:
        """Return a block of decoded images, followed by events; one of them reports the seconds of both stages.

        Args:
            fetched: their bytes. The time in which the decoder waits for them is that of fetching.
            fetch_s: seconds of fetching before this call.
        """
        preprocess, hashed = self._work.model.preprocess, self._work.config.content_hash
        started, timed = time.monotonic(), Timed(fetched)
        timings = None if self._work.sampling is None else ImageTimings(timed, fetch_s)
        images = decode_images(numbers, listed, timings or timed, preprocess, decode, hashed=hashed)
        decode_s = time.monotonic() - started - timed.seconds
        seconds = note({"fetch_s": fetch_s + timed.seconds, "decode_s": decode_s})
        return with_events(images, *events, seconds, *([] if timings is None else [timings.event(images)]))


def _decoder(work: Work, isolated: bool) -> Callable[[bytes], Picture]:
    """Return a decoder that ends its process after a timeout; or one in a child process, which is stopped instead."""
    from imgbatch.decode import decode
    from imgbatch.decode.sandbox import decode_isolated

    limits, short_side = work.config.decode, work.model.preprocess.short_side
    options: dict[str, Any] = {"max_pixels": limits.max_pixels, "short_side": short_side}
    if isolated:
        return lambda data: decode_isolated(data, timeout_s=limits.timeout_s, **options)
    watchdog = Watchdog(limits.timeout_s)

    def watched(data: bytes) -> Picture:
        with watchdog.watching():
            return decode(data, **options)

    return watched


def errors_as_events(blocks: Iterator[pa.Table], work: Work) -> Iterator[pa.Table]:
    """Yield the blocks; an exception becomes a block with the event that ends the run, and so does a canary that failed.

    A node that cannot be used does not end the run: it is reported in the note `left_out`, and other nodes process its images.
    """
    try:
        yield from blocks
    except SelfCheckError as error:
        yield events_alone(note({"left_out": {work.node(): {"host": socket.gethostname(), "why": str(error)}}}))
    except CanaryError as error:  # the driver records the facts, and ends the run
        yield events_alone(note({"canary": dict(error.facts)}))
    except Exception as error:  # noqa: BLE001 - the driver raises it
        yield events_alone(fatal(error))


_workers: dict[tuple[str, bool], Worker] = {}
"""The worker of this process, by its listing and whether it isolates decoding; a process serves one run at a time."""


def _worker_of(work: Work, isolated: bool) -> Worker:
    key = (work.listing.uri, isolated)
    if key not in _workers:
        _workers.clear()
        _workers[key] = Worker(work, isolated=isolated)
    return _workers[key]


def decode_block(block: pa.Table, work: Work, isolated: bool = False) -> Iterator[pa.Table]:
    """Fetch and decode a block of image numbers: the CPU operator where there are GPUs."""

    def blocks() -> Iterator[pa.Table]:
        yield from _worker_of(work, isolated).decoded(block, CHUNK)

    yield from errors_as_events(blocks(), work)


class Classify:
    """The GPU operator: decoded images in, rows of results out."""

    def __init__(self, work: Work, load: Callable[[Work], Runtime] | None = None) -> None:
        self._work = work
        self._runtime: Runtime | None = None
        self._load = load or load_runtime
        self._unusable: SelfCheckError | CanaryError | None = None
        self._lock = Lock()

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Classify a block of decoded images; events are passed on to the driver."""
        images, events = split_events(block)
        errors = [event for event in events if is_fatal(event)]
        if errors:
            yield events_alone(*errors)
        else:
            yield from errors_as_events(map(self.label, [images], [events]), self._work)

    def label(self, images: pa.Table, events: list[Event]) -> pa.Table:
        """Return the results of decoded images, followed by events; the network is built at the first call.

        Args:
            images: what `decode_images` returned.
            events: of the same block; they are passed on.

        Raises:
            SelfCheckError: this node cannot be used, now and at each later call.
            CanaryError: the same, and the run has to end.
        """
        with self._lock:
            if self._unusable is not None:
                time.sleep(_UNUSABLE_S)
                raise self._unusable
            if self._runtime is None:
                try:
                    runtime = self._load(self._work)
                    events = [*_canary_events(self._work, runtime), *events]
                except (SelfCheckError, CanaryError) as error:
                    self._unusable = error
                    raise
                self._runtime = runtime
            started, timer = time.monotonic(), BatchTimer()
            results = classify_images(images, self._runtime, self._work.model, self._work.config.min_score)
            seconds = {"classify_s": time.monotonic() - started}
            if self._work.sampling is not None:
                events = [*events, timer.event(len(images))]
            return with_events(results, *events, note({**self._runtime.facts(), **seconds}))


class LabelImages(Worker):
    """The one operator of a CPU machine: image numbers in, rows of results out.

    Sending pixels to another process would cost more than a second operator gains.
    """

    def __init__(self, work: Work, load: Callable[[Work], Runtime] | None = None, *, isolated: bool = False) -> None:
        super().__init__(work, isolated=isolated)
        self._classify = Classify(work, load)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Fetch, decode and classify a block of image numbers."""
        yield from errors_as_events(self._labelled(block), self._work)

    def _labelled(self, block: pa.Table) -> Iterator[pa.Table]:
        batch = self._work.config.classify.batch_size or 1
        for decoded in self.decoded(block, -(-_AT_ONCE // batch) * batch):  # only the last batch is padded
            images, events = split_events(decoded)
            yield self._classify.label(images, events)


def _canary_events(work: Work, runtime: Runtime) -> list[Event]:
    """Return the event with the accuracy of the canary on this node.

    Raises:
        CanaryError: it is too low.
    """
    canary = work.canary
    if canary is None:
        return []
    images = partial(_canary_images, work, canary)
    facts = require_accuracy(canary, work.model, runtime, work.node(), images)
    return [note({"canary": dict(facts)})]


def _canary_images(work: Work, canary: Canary, isolated: bool) -> Iterator[pa.Table]:
    """Yield the images of the canary, decoded as all other images are."""
    config = replace(work.config, source=canary.source, content_hash=False)
    worker = Worker(replace(work, listing=canary.folder, config=config), isolated=isolated)
    for unit in canary.units():
        for block in worker.decoded(unit, _AT_ONCE):
            yield split_events(block)[0]


def load_runtime(work: Work) -> Runtime:
    """Build the runtime that executes the model, in this process.

    Raises:
        SelfCheckError: this node cannot be used: no runtime returns the expected results.
    """
    config = work.config
    return build_checked(
        work.model, k=config.top_k, device=config.device, config=config.classify, embeddings=config.embeddings
    )

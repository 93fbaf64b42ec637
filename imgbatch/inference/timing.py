"""Effects: the seconds that a worker spends: waiting for images, and, for `imgbatch plan`, on each image and batch.

Those of a plan are sent to the driver as notes. They have no URI.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import psutil
import pyarrow as pa

from imgbatch.decode.formats import sniff
from imgbatch.inference.messages import Event, note
from imgbatch.sources.fetch import Fetched

PREPARED, CLASSIFIED, STREAM = "prepared", "classified", "stream_sample"
"""The keys of the notes."""

Item = TypeVar("Item")


class Timed(Iterator[Item]):
    """An iterator that measures how long the caller waits for its items."""

    def __init__(self, items: Iterable[Item], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._items, self._clock = iter(items), clock
        self.seconds = 0.0

    def __next__(self) -> Item:
        """Return the next item."""
        started = self._clock()
        try:
            return next(self._items)
        finally:
            self.seconds += self._clock() - started


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a worker does differently when it measures a sample."""

    members: int
    """The maximum number of images that are read from one stream."""


@dataclass
class ImageTimings:
    """Passes images on to the decoder, and measures how long each takes there, and how long the decoder waits for it."""

    fetched: Iterable[Fetched]
    waited_s: float = 0.0
    _prepare_s: list[float] = field(default_factory=list)
    _bytes: list[int] = field(default_factory=list)
    _formats: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began, self._cpu = time.monotonic() - self.waited_s, time.process_time()

    def __iter__(self) -> Iterator[Fetched]:
        """Yield the images. The time until the next one is requested is that of preparing the image."""
        images = iter(self.fetched)
        while True:
            requested = time.monotonic()
            image = next(images, None)
            self.waited_s += time.monotonic() - requested
            if image is None:
                return
            content = image.content if isinstance(image.content, bytes) else b""
            self._bytes.append(len(content))
            self._formats.append(sniff(content))
            started = time.monotonic()
            yield image
            self._prepare_s.append(time.monotonic() - started)

    def event(self, images: pa.Table) -> Event:
        """Return the note about these images.

        Args:
            images: what `decode_images` returned for them.
        """
        sides = zip(images["width"].to_pylist(), images["height"].to_pylist(), strict=True)
        ended = time.monotonic()
        facts = {
            "worker": worker_name(),
            "began": self._began,
            "ended": ended,
            "waited_s": self.waited_s,
            "cpu_s": time.process_time() - self._cpu,
            "index": images["index"].to_pylist(),
            "bytes": self._bytes,
            "pixels": [(width or 0) * (height or 0) for width, height in sides],
            "prepare_s": [round(seconds, 7) for seconds in self._prepare_s],
            "formats": self._formats,
            "reasons": images["reason"].to_pylist(),
            "memory": psutil.Process().memory_info().rss,
        }
        return note({PREPARED: facts})


@dataclass
class BatchTimer:
    """Measures a batch in the network."""

    def __post_init__(self) -> None:
        self._began, self._cpu = time.monotonic(), time.process_time()

    def event(self, rows: int) -> Event:
        """Return the note about a batch of so many images."""
        facts = {
            "worker": worker_name(),
            "began": self._began,
            "ended": time.monotonic(),
            "cpu_s": time.process_time() - self._cpu,
            "rows": rows,
            "memory": psutil.Process().memory_info().rss,
        }
        return note({CLASSIFIED: facts})


def stream_event(number: int, images: int, start: int, offset: int, *, whole: bool) -> Event:
    """Return the note about the part of a stream that was read.

    Args:
        number: the stream's number in the listing.
        images: the number of images in this part.
        start: the offset at which reading began.
        offset: the offset of the last image, from the beginning of the stream.
        whole: whether the stream was read to its end.
    """
    return note({STREAM: {"number": number, "images": images, "start": start, "offset": offset, "whole": whole}})


def worker_name() -> str:
    """Return a name of this process that no other process of the cluster has."""
    return f"{socket.gethostname()}:{os.getpid()}"

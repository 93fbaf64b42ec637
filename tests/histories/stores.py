"""Two stores in memory: one for the images, which may fail for each of them, and one that keeps the contract of an output."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from imgbatch import errors
from imgbatch.errors import Forbidden, NotFound, Unreachable
from imgbatch.storage.base import STORE_LISTING
from imgbatch.storage.stores import Meta
from tests.unit.pictures import encode

LABELS = tuple("abcdefg")
MOODS = {"unreachable": Unreachable, "forbidden": Forbidden, "vanished": NotFound}
"""How reading an image may fail, whatever its bytes; the names are the reasons of the rejects."""

STEP = 36  # of grey, between two labels
_FEW = 3
CONTENTS = {label: encode(np.full((8, 8, 3), STEP * i, np.uint8), "PNG") for i, label in enumerate(LABELS)}
CONTENTS |= {
    "not_an_image": b"a letter to my mother",
    "empty": b"",
    "crashed": encode(np.zeros((9, 9, 3), np.uint8), "PNG"),
}
KINDS = tuple(CONTENTS)
"""What the bytes of a picture give: a label, or the reason of a permanent reject."""


@dataclass
class Image:
    """One object of the input."""

    kind: str
    etag: str
    mood: str | None = None


class Memory:
    """A store in memory with conditional creation and replacement, by ETag."""

    conditional = True

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self._made = 0

    def path(self, uri: str) -> str:
        return uri.partition("://")[2]

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        data, etag = self.read_tagged(path)
        return data, Meta(len(data), etag)

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def head(self, path: str) -> Meta:
        return self.read(path)[1]

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        names = sorted(name for name in self.objects if name.startswith(f"{path}/"))
        yield pa.record_batch({"path": pa.array(names, pa.string())})

    def folders(self, path: str) -> list[str]:
        below = (name[len(path) + 1 :].partition("/") for name in self.objects if name.startswith(f"{path}/"))
        return sorted({name for name, slash, _ in below if slash})

    def put(self, path: str, data: bytes) -> None:
        self._made += 1
        self.objects[path] = (data, f"v{self._made}")

    def create(self, path: str, data: bytes) -> None:
        if path in self.objects:
            raise errors.Exists(path)
        self.put(path, data)

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        if self.objects.get(path, (b"", None))[1] != tag:
            raise errors.Conflict(path)
        self.put(path, data)

    def delete(self, path: str, tag: str | None = None) -> None:
        if tag is not None and path in self.objects and self.objects[path][1] != tag:
            raise errors.Conflict(path)
        self.objects.pop(path, None)


class Input:
    """The images as a store, a few in a batch, and a manifest with notes on some of them."""

    manifest = "notes/list.csv"

    def __init__(self, images: dict[str, Image]) -> None:
        self._images = images
        self.listed: dict[str, Image] = {}
        """The images as they were when the run began: sources are listed in threads, and a history is to repeat itself."""
        self.notes: dict[str, str] = {}
        """What the manifest says of them."""

    def path(self, uri: str) -> str:
        return uri.partition("://")[2]

    def head(self, path: str) -> Meta:
        if path != self.manifest:
            raise FileNotFoundError(path)
        return Meta(None, None)

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        rows = [f"in://in/{name},{note}" for name, note in sorted(self.notes.items())]
        yield io.BytesIO("\n".join(["uri,note", *rows, ""]).encode())

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        listed = self.listed
        names = sorted(listed)
        for start in range(0, len(names), _FEW):
            few = names[start : start + _FEW]
            known = [listed[name] for name in few]
            sizes = [len(CONTENTS[image.kind]) for image in known]
            columns = [[f"in/{name}" for name in few], sizes, [image.etag for image in known], [None] * len(few)]
            yield pa.record_batch(
                [pa.array(c, f.type) for c, f in zip(columns, STORE_LISTING, strict=True)], schema=STORE_LISTING
            )

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        image = self._images.get(path.removeprefix("in/"))
        if image is None:
            raise FileNotFoundError(path)
        if image.mood:
            raise MOODS[image.mood](f"by mood: {path}")
        data = CONTENTS[image.kind]
        return data, Meta(len(data), image.etag)

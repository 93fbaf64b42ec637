"""Effects: a child process that fetches images and reduces them: a decoder that crashes or hangs ends only this process.

stdin has a pickled `Task`. stdout gets a result for each of its images, in their order: the lengths of the picture and of the
reason, then both. It is not pickled, since its reader must not trust a process that decodes any bytes.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any

import pyarrow as pa
from PIL import Image, ImageFile, ImageOps

from imgbatch.config.sections import Config
from imgbatch.decode.sandbox import confine
from imgbatch.errors import StoreError
from imgbatch.report.row_samples import SampledRow
from imgbatch.report.thumbnail import reduced, thumbnail
from imgbatch.schema import LISTING
from imgbatch.sources.fetch import Fetched, Fetcher
from imgbatch.sources.tar_reader import End, TarReader
from imgbatch.storage.stores import Meta, Stores

MAX_BYTES = 4_000
"""The maximum size of a picture, unless the lowest quality needs more."""

Result = tuple[bytes, str]
_HEAD = struct.Struct("<II")
_LIMIT = 1 << 20  # bytes of a result


def write_result(file: IO[bytes], result: Result) -> None:
    """Write the result of one image."""
    webp, reason = result[0], result[1].encode()
    file.write(_HEAD.pack(len(webp), len(reason)) + webp + reason)
    file.flush()


def read_result(file: IO[bytes]) -> Result | None:
    """Return the next result; None at the end, also if the process ended in the middle of it."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    lengths = _HEAD.unpack(head)
    if sum(lengths) > _LIMIT:
        return None
    content = file.read(sum(lengths))
    if len(content) < sum(lengths):
        return None
    return content[: lengths[0]], content[lengths[0] :].decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image of which a picture is wanted."""

    row: SampledRow
    container: str | None
    """PARQUET, or None."""
    tar: str | None
    """The URI of the tar that it is a member of."""


@dataclass(frozen=True, slots=True)
class Task:
    """The images of one process, with members of a tar next to each other, in the order of the tar."""

    stores: Stores
    config: Config
    images: Sequence[Wanted]
    seconds: float
    """After so many seconds the process ends."""


def pictures(task: Task) -> Iterator[Result]:
    """Yield the picture of each image, or the reason why there is none."""
    for tar, group in groupby(task.images, key=lambda wanted: wanted.tar):
        images = list(group)
        if tar is not None:
            yield from _members(task, tar, images)
            continue
        rows = [{**_version(image.row), "uri": image.row.uri, "container": image.container} for image in images]
        fetcher = Fetcher(task.stores, task.config.fetch, task.config.source)
        for row, fetched in zip(rows, fetcher(pa.Table.from_pylist(rows, LISTING)), strict=True):
            yield _picture(task, fetched, row)


def _picture(task: Task, fetched: Fetched, row: Mapping[str, Any]) -> Result:
    """Return the picture of an image; of a truncated one, the part that can be decoded."""
    webp, reason = thumbnail(fetched, row, task.config, MAX_BYTES)
    if reason == "truncated" and isinstance(fetched.content, bytes):
        return first_part(fetched.content, task.config.decode.max_pixels), reason
    return webp, reason


def first_part(content: bytes, max_pixels: int) -> bytes:
    """Return a picture of the part of a truncated image that can be decoded; empty if there is none."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with suppress(Exception), Image.open(io.BytesIO(content)) as image:  # whatever Pillow raises for such bytes
            if image.width * image.height <= max_pixels:
                image.draft("RGB", (512, 512))
                return reduced(ImageOps.exif_transpose(image.convert("RGB")), MAX_BYTES)
        return b""
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _version(row: SampledRow) -> dict[str, Any]:
    return {"size": row.size, "etag": row.etag, "last_modified": row.last_modified}


def _members(task: Task, tar: str, images: Sequence[Wanted]) -> Iterator[Result]:
    """Yield the pictures of members of a tar. It is read at the positions of the members, or else from its beginning."""
    pending = list(images)
    try:
        meta = task.stores.call("look at", tar, lambda store, path: store.head(path))
        if pending[0].row.resume_offset is None:
            found = dict(_read(task, tar, meta, {image.row.uri for image in images}, 0, -1))
            while pending:
                yield found.get(pending.pop(0).row.uri, (b"", "vanished"))
        while pending:
            row = pending[0].row
            start, before = row.resume_offset or 0, -1 if row.previous_offset is None else row.previous_offset
            result = dict(_read(task, tar, meta, {row.uri}, start, before)).get(row.uri, (b"", "vanished"))
            pending.pop(0)
            yield result
    except StoreError as error:
        yield from [(b"", error.reason) for _ in pending]


def _read(
    task: Task, tar: str, meta: Meta, uris: set[str], resume_offset: int, last_offset: int
) -> Iterator[tuple[str, Result]]:
    """Yield the first member of each of these URIs."""
    names = {uri[len(tar) + 1 :]: uri for uri in uris}
    reader = TarReader(task.stores, tar, meta, "*", task.config.fetch.max_bytes, wanted=frozenset(names))
    for member in reader.members(resume_offset, last_offset):
        if isinstance(member, End):
            return
        if (uri := names.pop(member.name, None)) is not None:
            version = {"size": None, "etag": None, "last_modified": None}
            yield uri, _picture(task, Fetched(member.content, None, None, None), version)
        if not names:
            return


def main() -> None:
    """Read the task, and write the results."""
    output = os.dup(1)
    os.dup2(2, 1)  # the output of libraries must not mix with the results
    task: Task = pickle.load(sys.stdin.buffer)
    confine(task.seconds)
    with open(output, "wb") as file:
        for result in pictures(task):
            write_result(file, result)


if __name__ == "__main__":
    main()

"""Effects: every other store that fsspec knows, and S3 with options or keys that obstore cannot express."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

from imgbatch.errors import NotFound, TooLarge
from imgbatch.storage.base import FOUND, Meta, unquoted

_STREAMED = 1 << 20


class Other:
    """One fsspec file system; listed folder by folder, each of which is in memory meanwhile, with some 1 kB an object."""

    conditional = False

    def __init__(self, protocol: str, options: Mapping[str, Any], timeout_s: float) -> None:
        self._fs = fsspec.filesystem(protocol, use_listings_cache=False, **options)
        self._timeout_s = timeout_s
        # What fsspec runs in its event loop may be given a limit, of all of its requests; other file systems know none.
        # A listing, of as many requests as a folder has pages, has that which the file system itself gives each of them.
        self._within: dict[str, Any] = {"timeout": timeout_s} if self._fs.async_impl else {}

    def path(self, uri: str) -> str:
        """Return fsspec's name for a URI."""
        return str(self._fs._strip_protocol(uri))

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return an object's bytes. fsspec tells no ETag with them; asking for it would cost a request an image."""
        data = self._fs.cat_file(path, **self._within)
        if limit is not None and len(data) > limit:
            raise TooLarge(f"read {path}: {len(data)} bytes are more than {limit}")
        return data, Meta(size=len(data))

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return some bytes of an object; fsspec has no condition for it."""
        return bytes(self._fs.cat_file(path, start=start, end=end, **self._within))

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the bytes of an object from a position on, in the requests that fsspec makes of it."""
        with self._fs.open(path, "rb") as file:
            file.seek(start)
            while data := file.read(_STREAMED):
                yield data

    def open(self, path: str) -> BinaryIO:
        """Return the object, to be read as a stream."""
        return self._fs.open(path, "rb")  # type: ignore[no-any-return]

    def head(self, path: str) -> Meta:
        """Return what is known of an object."""
        info = self._fs.info(path, **self._within)
        if info["type"] != "file":
            raise NotFound(f"{path} is not an object")
        return _meta(info)

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder, a batch a folder."""
        todo = [path]
        while todo:
            try:
                entries = sorted(self._fs.ls(todo.pop(), detail=True), key=lambda entry: str(entry["name"]))
            except FileNotFoundError:
                continue
            todo += [entry["name"] for entry in reversed(entries) if entry["type"] == "directory"]
            files = [entry for entry in entries if entry["type"] == "file"]
            if files:
                yield _batch(files)

    def folders(self, path: str) -> list[str]:
        """Return the names of the folders directly below `path`."""
        with suppress(FileNotFoundError):
            entries = self._fs.ls(path, detail=True)
            return sorted(os.path.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] != "file")
        return []

    def create(self, path: str, data: bytes) -> None:
        """Write an object that must not exist yet; whether two writers can both succeed depends on the store."""
        self._fs.pipe_file(path, data, mode="create", **self._within)

    def put(self, path: str, data: bytes) -> None:
        """Write an object, whether it exists or not."""
        self._fs.pipe_file(path, data, **self._within)

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        """Return an object's bytes, without a tag."""
        return self.read(path)[0], None

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Write over an object; fsspec has no condition for it."""
        self.put(path, data)

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove an object; fsspec has no condition for it."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(path, **self._within)


def _meta(info: Mapping[str, Any]) -> Meta:
    etag = next((info[name] for name in ("ETag", "etag", "e_tag", "md5Hash") if info.get(name)), None)
    moment = next(
        (info[name] for name in ("LastModified", "last_modified", "mtime", "updated") if info.get(name)), None
    )
    return Meta(size=info.get("size"), etag=unquoted(etag), last_modified=_moment(moment))


def _moment(told: object) -> datetime | None:
    """Return a time as the file system tells it, None where that is none that a `datetime` can hold."""
    with suppress(ValueError, OverflowError, OSError):
        if isinstance(told, str):
            return datetime.fromisoformat(told)
        if isinstance(told, int | float):
            return datetime.fromtimestamp(told, UTC)
    return told if isinstance(told, datetime) else None


def _batch(entries: list[dict[str, Any]]) -> pa.RecordBatch:
    metas = [_meta(entry) for entry in entries]
    return pa.record_batch(
        [
            pa.array([entry["name"] for entry in entries], pa.string()),
            pa.array([meta.size for meta in metas], pa.int64()),
            pa.array([meta.etag for meta in metas], pa.string()),
            pa.array([meta.last_modified for meta in metas], FOUND.field(3).type),
        ],
        schema=FOUND,
    )

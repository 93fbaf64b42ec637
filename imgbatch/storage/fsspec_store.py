"""Effects: all other stores, through fsspec; and S3 with options or keys that obstore does not support."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

from imgbatch.errors import NotFound, TooLarge
from imgbatch.storage.base import STORE_LISTING, Meta, unquote_etag

_STREAMED = 1 << 20


class FsspecStore:
    """One fsspec file system. It is listed folder by folder; a folder is held in memory, with about 1 kB per object."""

    conditional = False

    def __init__(self, protocol: str, options: Mapping[str, Any], timeout_s: float) -> None:
        self._fs = fsspec.filesystem(protocol, use_listings_cache=False, **options)
        self._timeout_s = timeout_s
        # Calls that fsspec runs in its event loop accept a timeout for all their requests together; other file systems
        # accept none. Listings make a request per page, so they rely on the timeout of the file system for each request.
        self._timeout: dict[str, Any] = {"timeout": timeout_s} if self._fs.async_impl else {}

    def path(self, uri: str) -> str:
        """Return fsspec's name for a URI."""
        return str(self._fs._strip_protocol(uri))

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return the content of an object, without its ETag: fsspec would need another request for that."""
        data = self._fs.cat_file(path, **self._timeout)
        if limit is not None and len(data) > limit:
            raise TooLarge(f"read {path}: {len(data)} bytes are more than {limit}")
        return data, Meta(size=len(data))

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return a range of bytes; fsspec cannot check the ETag."""
        return bytes(self._fs.cat_file(path, start=start, end=end, **self._timeout))

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the content of an object from a position on; fsspec decides on the requests."""
        with self._fs.open(path, "rb") as file:
            file.seek(start)
            while data := file.read(_STREAMED):
                yield data

    def open(self, path: str) -> BinaryIO:
        """Open the object as a stream."""
        return self._fs.open(path, "rb")  # type: ignore[no-any-return]

    def head(self, path: str) -> Meta:
        """Return the metadata of an object."""
        info = self._fs.info(path, **self._timeout)
        if info["type"] != "file":
            raise NotFound(f"{path} is not an object")
        return _meta(info)

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder, one batch per folder."""
        pending = [path]
        while pending:
            try:
                entries = sorted(self._fs.ls(pending.pop(), detail=True), key=lambda entry: str(entry["name"]))
            except FileNotFoundError:
                continue
            pending += [entry["name"] for entry in reversed(entries) if entry["type"] == "directory"]
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
        """Write an object that must not exist yet. Two writers may both succeed, depending on the store."""
        self._fs.pipe_file(path, data, mode="create", **self._timeout)

    def put(self, path: str, data: bytes) -> None:
        """Write an object, whether it exists or not."""
        self._fs.pipe_file(path, data, **self._timeout)

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        """Return the content of an object, without a tag."""
        return self.read(path)[0], None

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Replace an object; fsspec cannot check the tag."""
        self.put(path, data)

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove an object; fsspec cannot check the tag."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(path, **self._timeout)


def _meta(info: Mapping[str, Any]) -> Meta:
    etag = next((info[name] for name in ("ETag", "etag", "e_tag", "md5Hash") if info.get(name)), None)
    time = next((info[name] for name in ("LastModified", "last_modified", "mtime", "updated") if info.get(name)), None)
    return Meta(size=info.get("size"), etag=unquote_etag(etag), last_modified=_datetime(time))


def _datetime(time: object) -> datetime | None:
    """Convert the time of an object, in whatever form the file system reports it; None if a `datetime` cannot hold it."""
    with suppress(ValueError, OverflowError, OSError):
        if isinstance(time, str):
            return datetime.fromisoformat(time)
        if isinstance(time, int | float):
            return datetime.fromtimestamp(time, UTC)
    return time if isinstance(time, datetime) else None


def _batch(entries: list[dict[str, Any]]) -> pa.RecordBatch:
    metas = [_meta(entry) for entry in entries]
    return pa.record_batch(
        [
            pa.array([entry["name"] for entry in entries], pa.string()),
            pa.array([meta.size for meta in metas], pa.int64()),
            pa.array([meta.etag for meta in metas], pa.string()),
            pa.array([meta.last_modified for meta in metas], STORE_LISTING.field(3).type),
        ],
        schema=STORE_LISTING,
    )

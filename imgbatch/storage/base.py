"""Values: the operations of every store. Paths are the store's own.

A store lets the exceptions of its library through; `error_mapping` translates them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import Conflict, Unreachable
from imgbatch.schema import LISTING

STORE_LISTING = pa.schema([pa.field("path", pa.string(), nullable=False), *[LISTING.field(i) for i in (1, 2, 3)]])
"""The schema of the batches in which a store lists its objects."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)
LATEST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)
"""The range, in microseconds since 1970, that a `datetime` can hold. A broken clock writes other times into files."""


@dataclass(frozen=True, slots=True)
class Meta:
    """The size in bytes, the unquoted ETag and the time of an object; None where the store does not report it."""

    size: int | None = None
    etag: str | None = None
    last_modified: datetime | None = None


class Store(Protocol):
    """The operations on one bucket or file system."""

    conditional: bool
    """Whether `create` and `replace` are atomic: of two writers, one always fails."""

    def path(self, uri: str) -> str:
        """Return the store's own name for a URI."""

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return the content of an object and the metadata of the version that was read; TooLarge beyond `limit` bytes."""

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return the bytes from `start` up to `end`. Conflict if the object no longer has this ETag and the store can
        check that."""

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the content of an object from `start` on, in one request; Conflict as for `read_range`."""

    def head(self, path: str) -> Meta:
        """Return the metadata of an object without reading it."""

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder `path`, recursively and in a reproducible order, as `STORE_LISTING`."""

    def folders(self, path: str) -> list[str]:
        """Return the names of the folders directly below `path`."""

    def create(self, path: str, data: bytes) -> None:
        """Write an object that must not exist yet; an error that maps to Exists if it does."""

    def put(self, path: str, data: bytes) -> None:
        """Write an object, whether it exists or not."""

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        """Return the content of an object and the tag of this version; None where the store has no tags."""

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Replace an object. Conflict if it no longer has this tag and the store can check that."""

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove an object; a missing object is no error. With a tag only that version: Conflict if it is another one and
        the store can check that."""


def require_listed_size(uri: str, size: int, read: Meta, listed: Meta) -> None:
    """Refuse a body whose length differs from the listed size, unless it belongs to a newer version.

    Args:
        size: the length of the body.
        read: the metadata that came with it.
        listed: the metadata in the listing.

    Raises:
        Unreachable: the ETag is the listed one, so the body was cut off in transfer. A retry may succeed.
        Conflict: neither ETags nor times show that it is a newer version.
    """
    if listed.size is None or size == listed.size:
        return
    if read.etag is not None and listed.etag is not None:
        if read.etag == listed.etag:
            raise Unreachable(f"read {uri}: received {size} of {listed.size} bytes")
    elif not (read.last_modified and listed.last_modified) or read.last_modified == listed.last_modified:
        raise Conflict(f"read {uri}: {size} bytes, but {listed.size} bytes were listed")


def to_datetime(microseconds: int) -> datetime | None:
    """Return the time that many microseconds after 1970; None if a `datetime` cannot hold it.

    >>> to_datetime(-11_644_473_600_000_001).isoformat(), to_datetime(1 << 60)
    ('1600-12-31T23:59:59.999999+00:00', None)
    """
    return _EPOCH + timedelta(microseconds=microseconds) if EARLIEST <= microseconds <= LATEST else None


def unquote_etag(etag: str | None) -> str | None:
    """Return an ETag as the tables have it: without quotes and without the mark of a weak ETag; None if it is empty.

    >>> unquote_etag('W/"abc"'), unquote_etag(None)
    ('abc', None)
    """
    return etag.removeprefix("W/").strip('"') or None if etag else None


def unquote_etags(etags: pa.Array) -> pa.Array:
    """Apply `unquote_etag` to a column.

    >>> unquote_etags(pa.array(['W/"abcW"', "", None])).to_pylist()
    ['abcW', None, None]
    """
    bare = pc.replace_substring_regex(etags.cast(pa.string()), pattern=r'^(W/)?"*|"*$', replacement="")
    return pc.if_else(pc.equal(bare, ""), None, bare)

"""Values: what every store can do. Paths are the store's own; what a library raises leaves a store as it is (see `faults`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import Conflict, Unreachable
from imgbatch.schema import LISTING

FOUND = pa.schema([pa.field("path", pa.string(), nullable=False), *[LISTING.field(i) for i in (1, 2, 3)]])
"""What listing a store yields."""


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)
LATEST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)
"""Microseconds since 1970 that a `datetime` can hold; a broken clock writes others into files."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What a store tells about an object: bytes, unquoted ETag, time; None where it tells nothing."""

    size: int | None = None
    etag: str | None = None
    last_modified: datetime | None = None


class Store(Protocol):
    """A few verbs over one bucket or file system."""

    conditional: bool
    """Whether `create` and `replace` can tell for certain that another writer was first."""

    def path(self, uri: str) -> str:
        """Return the store's own name for a URI."""

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return an object's bytes and what was read; TooLarge beyond `limit` bytes."""

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return the bytes from `start` up to `end`; Conflict if the object is not the version with this ETag any more,
        where the store can tell."""

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield an object's bytes from `start` on, in one request; Conflict as for `read_range`."""

    def head(self, path: str) -> Meta:
        """Return what is known of an object without reading it."""

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder `path`, recursively, in an order that repeats, as `FOUND`."""

    def folders(self, path: str) -> list[str]:
        """Return the names of the folders directly below `path`."""

    def create(self, path: str, data: bytes) -> None:
        """Write an object that must not exist yet."""

    def put(self, path: str, data: bytes) -> None:
        """Write an object, whether it exists or not."""

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        """Return an object's bytes and the tag of this version of it; None where the store has no such thing."""

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Write over an object that is still the version with this tag, where the store can check that."""

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove an object; one that is not there is no error. With a tag only that version of it, where the store can
        check that; Conflict if there is another one."""


def require_listed_size(uri: str, size: int, read: Meta, known: Meta) -> None:
    """Refuse a body that is not as long as the listing has it, unless it is that of a newer version.

    Raises:
        Unreachable: by its ETag it is the listed version, so that the body was cut on its way: another try may get it all.
        Conflict: whether it is the listed version is not to be had.
    """
    if known.size is None or size == known.size:
        return
    if read.etag is not None and known.etag is not None:
        if read.etag == known.etag:
            raise Unreachable(f"read {uri}: {size} bytes came of the {known.size} that were listed")
    elif not (read.last_modified and known.last_modified) or read.last_modified == known.last_modified:
        raise Conflict(f"read {uri}: {size} bytes, listed were {known.size}")


def moment(microseconds: int) -> datetime | None:
    """Return the time so long after 1970; None for one that no `datetime` can hold.

    >>> moment(-11_644_473_600_000_001).isoformat(), moment(1 << 60)
    ('1600-12-31T23:59:59.999999+00:00', None)
    """
    return _EPOCH + timedelta(microseconds=microseconds) if EARLIEST <= microseconds <= LATEST else None


def unquoted(etag: str | None) -> str | None:
    """Return an ETag as tables hold it.

    >>> unquoted('W/"abc"'), unquoted(None)
    ('abc', None)
    """
    return etag.removeprefix("W/").strip('"') or None if etag else None


def unquoted_all(etags: pa.Array) -> pa.Array:
    """Return a column of ETags as `unquoted` returns each.

    >>> unquoted_all(pa.array(['W/"abcW"', "", None])).to_pylist()
    ['abcW', None, None]
    """
    bare = pc.replace_substring_regex(etags.cast(pa.string()), pattern=r'^(W/)?"*|"*$', replacement="")
    return pc.if_else(pc.equal(bare, ""), None, bare)

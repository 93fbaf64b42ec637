"""Effects: objects as file objects, for random access or for reading forward."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from imgbatch.errors import TimedOut, Unreachable
from imgbatch.storage.base import Meta
from imgbatch.storage.error_mapping import guarded
from imgbatch.storage.retry import backoff

if TYPE_CHECKING:
    from imgbatch.storage.stores import Stores

_MAX_EMPTY_READS = 8


class RangeFile(io.RawIOBase):
    """An object with random access: each read is a range request. Reads raise the errors of `Stores.call`."""

    def __init__(self, stores: Stores, uri: str, meta: Meta) -> None:
        assert meta.size is not None
        self._stores, self._uri, self._etag, self._size, self._at = stores, uri, meta.etag, meta.size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position. Makes no request."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes, fewer than asked for only at the end."""
        start = self._at
        end = self._size if size is None or size < 0 else min(self._size, start + size)
        if end <= start:
            return b""
        data = self._stores.call("read", self._uri, lambda store, path: store.read_range(path, start, end, self._etag))
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return how many bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class StreamFile(io.RawIOBase):
    """An object that is read forward in one request. If the request fails, another one resumes where it ended."""

    def __init__(self, stores: Stores, uri: str, meta: Meta, start: int, retries: int) -> None:
        self._stores, self._uri, self._etag = stores, uri, meta.etag
        self._size = sys.maxsize if meta.size is None else meta.size
        self._at, self._retries = start, retries
        self._chunks: Iterator[bytes] | None = None
        self._buffer = memoryview(b"")
        self._empty_reads = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes, often fewer than `size`; none at the end.

        Raises:
            StoreError: the store stayed unreachable, or now has another version of the object.
            EOFError: the end was reached and several reads have already returned nothing.
        """
        if not self._buffer and not self._fill():
            self._empty_reads += 1
            # If a header claims a petabyte, `tarfile` would skip it block by block after the end of the data.
            if self._empty_reads > _MAX_EMPTY_READS:
                raise EOFError("end of data")
        end = len(self._buffer) if size is None or size < 0 else size
        data, self._buffer = self._buffer[:end], self._buffer[end:]
        return bytes(data)

    def _fill(self) -> bool:
        """Fill the buffer with the next bytes; return False at the end."""
        attempt = 1
        while self._at < self._size:
            try:
                with guarded("read", self._uri):
                    if self._chunks is None:
                        store, path = self._stores.resolve(self._uri)
                        self._chunks = store.stream(path, self._at, self._etag)
                    data = next(self._chunks, b"")
                if not data and self._size == sys.maxsize:
                    return False
                if not data:
                    raise Unreachable(f"read {self._uri}: the response ended after {self._at} of {self._size} bytes")
                self._at += len(data)
                self._buffer = memoryview(data)
                return True
            except (Unreachable, TimedOut) as error:
                self._chunks, error.attempts = None, attempt
                if attempt > self._retries:
                    raise
            time.sleep(backoff(attempt))
            attempt += 1
        return False

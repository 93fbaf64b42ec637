"""Effects: objects as files: read here and there, or forward from a position on."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imgbatch.errors import TimedOut, Unreachable
from imgbatch.storage.base import Meta
from imgbatch.storage.error_mapping import guarded
from imgbatch.storage.retry import backoff

if TYPE_CHECKING:
    from imgbatch.storage.stores import Stores


_MOST_EMPTY = 8


class Ranges(io.RawIOBase):
    """An object as a file. Reads raise what `Stores.call` does."""

    def __init__(self, stores: Stores, uri: str, meta: Meta) -> None:
        assert meta.size is not None
        self._stores, self._uri, self._etag, self._size, self._at = stores, uri, meta.etag, meta.size, 0

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def seekable(self) -> bool:
        """Return that it is."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position, for no request."""
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


class Stream(io.RawIOBase):
    """An object read forward in one request. When that fails, another one goes on where it ended."""

    def __init__(self, stores: Stores, uri: str, meta: Meta, start: int, retries: int) -> None:
        self._stores, self._uri, self._etag = stores, uri, meta.etag
        self._size = sys.maxsize if meta.size is None else meta.size
        self._at, self._retries = start, retries
        self._chunks: Iterator[bytes] | None = None
        self._buffer = memoryview(b"")
        self._empty = 0

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes, often fewer than asked for; none at the end.

        Raises:
            StoreError: the store stayed away, or holds another version of the object now.
            EOFError: nothing is left, and that was said several times.
        """
        if not self._buffer and not self._fill():
            self._empty += 1
            if self._empty > _MOST_EMPTY:  # `tarfile` would skip a petabyte that a header claims, block by block
                raise EOFError("end of data")
        end = len(self._buffer) if size is None or size < 0 else size
        data, self._buffer = self._buffer[:end], self._buffer[end:]
        return bytes(data)

    def _fill(self) -> bool:
        """Get the next bytes; return whether there are any."""
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
                    raise Unreachable(f"read {self._uri}: it ended after {self._at} of {self._size} bytes")
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

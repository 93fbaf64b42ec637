"""Values: a stream of chunks as a file that is read forward, for `tarfile`; and the decompression of gzip streams.

`tarfile` has stream modes too ("r|", "r|gz"), but they stop after the first archive in a file and the first gzip member.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from tarfile import StreamError
from typing import Any, cast

_CHUNK = 1 << 16


class ForwardReader:
    """A file whose position can only increase.

    Args:
        chunks: the content from position `at` on.
        at: the position of its first byte.
    """

    def __init__(self, chunks: Iterator[bytes], at: int = 0) -> None:
        self._chunks, self._at = chunks, at
        self._chunk = memoryview(b"")

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, position: int) -> int:
        """Move forward to a position, or to the end if the content is shorter.

        Raises:
            StreamError: the position has already been passed.
        """
        if position < self._at:
            raise StreamError("seeking backwards is not allowed")
        while self._at < position and self._fill():
            self._take(position - self._at)
        return self._at

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        if len(self._chunk) >= size:
            return bytes(self._take(size))
        data = bytearray()
        while len(data) < size and self._fill():
            data += self._take(size - len(data))
        return bytes(data)

    def skip_zeros(self) -> bool:
        """Move to the next byte that is not zero; return False if there is none."""
        while self._fill():
            left = len(bytes(self._chunk).lstrip(b"\0"))
            self._take(len(self._chunk) - left)
            if left:
                return True
        return False

    def _fill(self) -> bool:
        """Load the next chunk if the current one is used up; return False at the end."""
        while not self._chunk:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._chunk = memoryview(chunk)
        return True

    def _take(self, max_bytes: int) -> memoryview:
        taken, self._chunk = self._chunk[:max_bytes], self._chunk[max_bytes:]
        self._at += len(taken)
        return taken


def read_chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield the results of `read`, up to the end."""
    while chunk := read(_CHUNK):
        yield chunk


def peek(chunks: Iterator[bytes], min_bytes: int) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes of a stream, at least `min_bytes` if it has as many, and the whole stream again.

    >>> start, chunks = peek(iter([b"ab", b"cd", b"ef"]), 3)
    >>> start, b"".join(chunks)
    (b'abcd', b'abcdef')
    """
    start = b""
    while len(start) < min_bytes and (chunk := next(chunks, b"")):
        start += chunk
    return start, chain([start] if start else [], chunks)


def gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield decompressed gzip data: one member or several in a row, with or without zeros after them.

    Raises:
        zlib.error: the data are damaged, or something else follows.
        EOFError: the data end early.
    """
    file = ForwardReader(chunks)
    with gzip.GzipFile(fileobj=cast(Any, file)) as members:
        try:
            yield from read_chunks(members.read1)  # `read` would drop the bytes before a damaged place
        except gzip.BadGzipFile as error:
            start = file.tell()
            while file.read(_CHUNK):
                pass
            raise zlib.error(f"{error}, with {file.tell() - start:,} bytes after it") from error

"""Values: a stream as a file that is read forward, as `tarfile` wants it; and gzip data as such a stream.

`tarfile` has both as well ("r|", "r|gz"), but ends with the first archive of a file, and with the first member of gzip data.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from tarfile import StreamError
from typing import Any, cast

_CHUNK = 1 << 16


class Forward:
    """A file with a position that only goes forward.

    Args:
        chunks: the content from `at` on.
        at: the position of its first byte.
    """

    def __init__(self, chunks: Iterator[bytes], at: int = 0) -> None:
        self._chunks, self._at = chunks, at
        self._chunk = memoryview(b"")

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, position: int) -> int:
        """Go forward to a position, or to the end if that comes before it.

        Raises:
            StreamError: it lies behind.
        """
        if position < self._at:
            raise StreamError("seeking backwards is not allowed")
        while self._at < position and self._fill():
            self._take(position - self._at)
        return self._at

    def read(self, size: int) -> bytes:
        """Return the next bytes, fewer than asked for only at the end."""
        if len(self._chunk) >= size:
            return bytes(self._take(size))
        found = bytearray()
        while len(found) < size and self._fill():
            found += self._take(size - len(found))
        return bytes(found)

    def skip_zeros(self) -> bool:
        """Go to the next byte that is not zero; return whether there is one."""
        while self._fill():
            left = len(bytes(self._chunk).lstrip(b"\0"))
            self._take(len(self._chunk) - left)
            if left:
                return True
        return False

    def _fill(self) -> bool:
        """Return whether there is a next byte."""
        while not self._chunk:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._chunk = memoryview(chunk)
        return True

    def _take(self, most: int) -> memoryview:
        taken, self._chunk = self._chunk[:most], self._chunk[most:]
        self._at += len(taken)
        return taken


def plain(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield what `read` gives, up to the end."""
    while chunk := read(_CHUNK):
        yield chunk


def looked_at(chunks: Iterator[bytes], least: int) -> tuple[bytes, Iterator[bytes]]:
    """Return how data begin, in `least` bytes or more if there are so many, and the data from their beginning.

    >>> start, chunks = looked_at(iter([b"ab", b"cd", b"ef"]), 3)
    >>> start, b"".join(chunks)
    (b'abcd', b'abcdef')
    """
    start = b""
    while len(start) < least and (chunk := next(chunks, b"")):
        start += chunk
    return start, chain([start] if start else [], chunks)


def unpacked(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield what gzip data hold: one member, or several behind each other; zeros may follow them.

    Raises:
        zlib.error: they are damaged, or something else follows.
        EOFError: they end early.
    """
    file = Forward(chunks)
    with gzip.GzipFile(fileobj=cast(Any, file)) as members:
        try:
            yield from plain(members.read1)  # `read` would lose what it has of a member that turns out to be damaged
        except gzip.BadGzipFile as error:
            begun = file.tell()
            while file.read(_CHUNK):
                pass
            raise zlib.error(f"{error}, with {file.tell() - begun:,} bytes behind it") from error

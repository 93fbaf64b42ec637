"""Effects: a walk through local folders, in the order of their names."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.storage.local_names import MISSING, readable

_BATCH = 10_000
_MAX_LINKS_INTO = 1_000
"""Maximum number of links that lead into one folder. Without it, folders that link to each other would be walked for ever."""

Identity = tuple[int, int]
"""Device and inode of a folder."""


@dataclass(frozen=True, slots=True)
class _OpenFolder:
    path: bytes
    ancestors: frozenset[Identity]
    """The folder itself and those above it."""
    names: Iterator[bytes]
    """What is left of its sorted names."""


def walk(top: bytes) -> Iterator[tuple[bytes, os.stat_result | None]]:
    """Return the regular files below `top` with their status, and the broken links with None.

    Raises:
        InputError: while the result is iterated: too many links lead into one folder.
        OSError: `top` cannot be opened, or while the result is iterated, a folder below it.
    """
    return _walk([_open_folder(top, frozenset())])


def _walk(stack: list[_OpenFolder]) -> Iterator[tuple[bytes, os.stat_result | None]]:
    """Yield the files of the folder on the stack. A stack, not recursion: trees may be deep."""
    links_into: Counter[Identity] = Counter()
    while stack:
        folder = stack[-1]
        name = next(folder.names, None)
        if name is None:
            stack.pop()
            continue
        path = os.path.join(folder.path, name)
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno not in MISSING:
                raise
            if os.path.islink(path):  # a file that was removed after its folder was read is not listed
                yield path, None
            continue
        identity = (status.st_dev, status.st_ino)
        if stat.S_ISREG(status.st_mode):
            yield path, status
        elif stat.S_ISDIR(status.st_mode) and identity not in folder.ancestors:
            if os.path.islink(path):
                links_into[identity] += 1
                if links_into[identity] > _MAX_LINKS_INTO:
                    raise InputError(
                        f"more than {_MAX_LINKS_INTO:,} links lead into one folder, for example {readable(path)}: the "
                        "folders may link to each other without end. Remove the links, or give each folder as an --input"
                    )
            with suppress(FileNotFoundError):
                stack.append(_open_folder(path, folder.ancestors))


def _open_folder(path: bytes, ancestors: frozenset[Identity]) -> _OpenFolder:
    status = os.stat(path)
    chunks: list[pa.Array] = []
    with os.scandir(
        path
    ) as entries:  # a folder may have millions of names: they are kept as bytes in Arrow, not as objects
        while names := [entry.name for entry in islice(entries, _BATCH)]:
            chunks.append(pa.array(names, pa.large_binary()))
    all_names = pa.chunked_array(chunks, pa.large_binary())
    return _OpenFolder(path, ancestors | {(status.st_dev, status.st_ino)}, _sorted(all_names))


def _sorted(names: pa.ChunkedArray) -> Iterator[bytes]:
    joined = pa.concat_arrays(names.chunks) if names.num_chunks else pa.array([], pa.large_binary())
    del names
    order = pc.array_sort_indices(joined)
    for start in range(0, len(order), _BATCH):
        yield from joined.take(order.slice(start, _BATCH)).to_pylist()

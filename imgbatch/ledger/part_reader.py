"""Effects: Parquet files of an output, opened one by one for random access: only footers and the columns that are needed are
fetched.

A reader of whole tables uses `Log.read`, which makes one request for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.prefetch import prefetch_calls
from imgbatch.errors import NotFound, OutputError
from imgbatch.ledger.common_columns import CommonColumns
from imgbatch.ledger.part_file import footer_of
from imgbatch.storage.stores import Folder, Meta
from imgbatch.storage.uris import is_local

Entry = tuple[str, Meta]
"""The name of a file in its folder, and its metadata."""

_THREADS = 16
_LOCAL_THREADS, _LOCAL_GROUP = 2, 32
_READ_WHOLE = 256 << 10
"""A file in a store that is not larger is fetched as a whole, which takes one request instead of two or three."""

T = TypeVar("T")


def parquet_files(folder: Folder) -> list[Entry]:
    """Return the Parquet files in a folder that readers do not ignore."""
    return [
        entry for entry in folder.entries() if entry[0].endswith(".parquet") and not entry[0].startswith((".", "_"))
    ]


def read_each(folder: Folder, entries: Sequence[Entry], read: Callable[[str, pq.ParquetFile], T]) -> Iterator[T]:
    """Yield `read(uri, file)` for each file, in order, while the next files are read in other threads.

    A file that is gone is omitted: a run may have ended since the folder was listed.

    Raises:
        OutputError: a file is not Parquet, or is truncated.
    """

    def opened(group: Sequence[Entry]) -> list[T]:
        results = []
        for name, meta in group:
            uri = folder.at(name)
            try:
                results.append(read(uri, _open(folder, uri, meta)))
            except (NotFound, FileNotFoundError):
                continue
            except (pa.ArrowException, OSError) as error:
                raise OutputError(f"{uri} is not a complete Parquet file ({error}): move it away") from error
        return results

    # A local file takes 0.2 ms, about as long as handing it to another thread does.
    threads, size = (_LOCAL_THREADS, _LOCAL_GROUP) if is_local(folder.uri) else (_THREADS, 1)
    groups = (entries[start : start + size] for start in range(0, len(entries), size))
    with ThreadPoolExecutor(threads, "parts") as pool:
        for _, results in prefetch_calls(pool, opened, groups, max_pending=2 * threads):
            tick()
            yield from results


def common_columns(folder: Folder) -> tuple[CommonColumns, dict[str, Any]]:
    """Return the union of the columns of all parts in a folder, and the fingerprint of the first part.

    Raises:
        OutputError: a file is no part.
    """

    def columns_of(uri: str, file: pq.ParquetFile) -> tuple[pa.Schema, dict[str, Any]]:
        footer = footer_of(file.metadata.metadata or {}, uri)
        return file.schema_arrow.remove_metadata(), dict(footer.fingerprint)

    columns, fingerprint = CommonColumns(), None
    for schema, its_fingerprint in read_each(folder, parquet_files(folder), columns_of):
        columns.add(schema)
        fingerprint = its_fingerprint if fingerprint is None else fingerprint
    return columns, fingerprint or {}


def _open(folder: Folder, uri: str, meta: Meta) -> pq.ParquetFile:
    if is_local(uri):
        return pq.ParquetFile(pa.memory_map(folder.stores.resolve(uri)[1]))  # a path takes 0.03 ms more
    if meta.size is None or meta.size <= _READ_WHOLE:
        return pq.ParquetFile(pa.BufferReader(folder.stores.read(uri)[0]))
    return pq.ParquetFile(folder.stores.ranges(uri, meta), pre_buffer=True)

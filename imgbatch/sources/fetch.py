"""Effects: images fetched ahead of decoding: while one image is decoded, the next dozens of GETs are in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.concurrency.prefetch import prefetch_calls, prefetch_items, prefetch_streams
from imgbatch.config.sections import FetchConfig, SourceConfig
from imgbatch.config.worker import ReadOptions, WorkerConfig
from imgbatch.errors import InputError, StoreError
from imgbatch.rejects import Refusal
from imgbatch.schema import PARQUET
from imgbatch.sources.parquet import ImageTable
from imgbatch.sources.tar_reader import End, TarReader
from imgbatch.storage.stores import Meta, Stores

_ASSUMED_BYTES = 1 << 20
_GROUPS_AT_ONCE, _IMAGES_AHEAD = 2, 64
_MEMBERS_AHEAD = 16


@dataclass(frozen=True, slots=True)
class TarRead:
    """How the reading of a tar ended."""

    number: int
    """The tar's number in the listing."""
    last_offset: int
    """The offset of the last row."""
    whole: bool
    """Whether nothing is left to read: false where the store failed."""
    ignored: int
    """Members that are no image candidates."""
    unpaired: int
    """Sidecars that are not next to an image with their key."""
    unpaired_example: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of one image, or the reason why there are none; and the metadata of the version that was read."""

    content: bytes | Refusal
    size: int | None
    etag: str | None
    last_modified: datetime | None


class Fetcher:
    """Fetches images with a pool of threads that lives as long as the process."""

    def __init__(self, stores: Stores, config: FetchConfig, source: SourceConfig | ReadOptions) -> None:
        self._stores, self._config = stores, config
        self._pool = ThreadPoolExecutor(config.concurrency, "fetch")
        self._table = lru_cache(maxsize=2)(lambda uri: _open(stores, uri, source.image_column))

    def __call__(self, listed: pa.Table) -> Iterator[Fetched]:
        """Yield one Fetched for each row of a listing, in order."""
        rows = listed.select(["uri", "size", "etag", "last_modified", "container"]).to_pylist()
        for container, group in groupby(rows, key=lambda row: row["container"]):
            in_container = list(group)
            if container not in (None, PARQUET):
                raise ValueError(f"container {container!r}")
            yield from self._objects(in_container) if container is None else self._table_rows(in_container)

    def _objects(self, rows: list[dict[str, Any]]) -> Iterator[Fetched]:
        calls = prefetch_calls(
            self._pool,
            self._fetch,
            rows,
            max_pending=self._config.concurrency,
            cost=lambda row: row["size"] or _ASSUMED_BYTES,
            max_cost=self._config.max_inflight_bytes,
        )
        return (fetched for _, fetched in calls)

    def _table_rows(self, rows: list[dict[str, Any]]) -> Iterator[Fetched]:
        """Yield rows of Parquet files, while the next row group is read."""
        groups = []
        for uri, group in groupby(rows, key=lambda row: row["uri"].rpartition("#")[0]):
            in_file = list(group)
            try:
                table = self._table(uri)
                numbers = np.array([int(row["uri"].rpartition("#")[2]) for row in in_file])
                table.require_unchanged(in_file[0]["etag"], in_file[0]["last_modified"], int(numbers.max()))
                row_groups = np.searchsorted(table.starts, numbers, side="right") - 1
                edges = [0, *(np.flatnonzero(np.diff(row_groups)) + 1).tolist(), len(row_groups)]
                for start, end in pairwise(edges):
                    row_group = int(row_groups[start])
                    in_row_group = numbers[start:end] - table.starts[row_group]
                    groups.append(partial(self._row_group, table.images(row_group, in_row_group), in_file[start:end]))
            except (StoreError, InputError) as error:
                groups.append(partial(_refused, in_file, error))
        yield from prefetch_streams(groups, concurrency=_GROUPS_AT_ONCE, max_pending=_IMAGES_AHEAD)

    def _row_group(self, contents: Iterator[bytes | Refusal], rows: list[dict[str, Any]]) -> Iterator[Fetched]:
        remaining = list(reversed(rows))
        try:
            for content in contents:
                yield self._table_row(content, remaining.pop())
        except (StoreError, pa.ArrowException, OSError) as error:
            yield from _refused(remaining[::-1], error)
            return
        if remaining:
            damage = InputError("its row group has fewer rows than the footer of the file says")
            yield from _refused(remaining[::-1], damage)

    def _table_row(self, content: bytes | Refusal, row: dict[str, Any]) -> Fetched:
        size = None if isinstance(content, Refusal) else len(content)
        meta = Meta(size, row["etag"], row["last_modified"])
        if size is not None and size > self._config.max_bytes:
            message = f"{size} bytes are more than fetch.max_bytes={self._config.max_bytes}"
            return _fetched(Refusal("fetch", "too_large", message), meta, meta)
        return _fetched(content, meta, meta)

    def _fetch(self, row: dict[str, Any]) -> Fetched:
        listed = Meta(row["size"], row["etag"], row["last_modified"])
        if listed.size is not None and listed.size > self._config.max_bytes:
            message = f"{listed.size} bytes are more than fetch.max_bytes={self._config.max_bytes}"
            return _fetched(Refusal("fetch", "too_large", message), listed, listed)
        try:
            content, read = self._stores.read(row["uri"], self._config.max_bytes, listed)
        except StoreError as error:
            return _fetched(Refusal("fetch", error.reason, str(error), error.attempts), listed, listed)
        return _fetched(content, read, listed)


def members_of_tar(
    stores: Stores,
    number: int,
    tar: dict[str, Any],
    config: WorkerConfig,
    resume_offset: int,
    last_offset: int,
    keep: Callable[[Mapping[str, Mapping[str, str]]], None] | None = None,
) -> Iterator[tuple[dict[str, Any], Fetched] | TarRead]:
    """Yield (row, image) for the images of a tar after the one at `last_offset`, while the next are read; then a TarRead.

    A row has `uri`, the position in the tar and the sidecars.

    Args:
        keep: receives the sidecars that are not next to their image, by key, at the end; None: they are only counted.
    """  # fmt: skip
    meta = Meta(tar["size"], tar["etag"], tar["last_modified"])
    limit = config.fetch.max_bytes
    reader = TarReader(stores, tar["uri"], meta, config.source.suffixes, limit, collect=keep is not None)
    place = {"offset": last_offset, "previous_offset": last_offset, "resume_offset": resume_offset}
    refusal, whole, end = None, True, End(0, 0)
    try:
        for member in prefetch_items(partial(reader.members, resume_offset, last_offset), _MEMBERS_AHEAD):
            if isinstance(member, End):
                refusal, end = member.damage, member
                if keep is not None:
                    keep(member.sidecars)
                break
            place = {"offset": member.offset, "previous_offset": place["offset"], "resume_offset": member.resume_offset}
            size = None if isinstance(member.content, Refusal) else len(member.content)
            version = Meta(size, meta.etag, meta.last_modified)
            yield (
                {"uri": f"{tar['uri']}#{member.name}", **place, **member.sidecars},
                _fetched(member.content, version, version),
            )
    except StoreError as error:
        refusal, whole = Refusal("fetch", error.reason, str(error)[:300], error.attempts), False
    if refusal is not None:
        place = {
            "offset": place["offset"] + 1,
            "previous_offset": place["offset"],
            "resume_offset": place["resume_offset"],
        }
        yield {"uri": tar["uri"], **place}, _fetched(refusal, meta, meta)
    example = f"{tar['uri']}#{end.unpaired_example}"
    yield TarRead(number, place["offset"], whole, end.ignored, end.unpaired, example)


def _open(stores: Stores, uri: str, image_column: str | None) -> ImageTable:
    return ImageTable(stores, uri, stores.call("look at", uri, lambda store, path: store.head(path)), image_column)


def _refused(rows: list[dict[str, Any]], error: Exception) -> Iterator[Fetched]:
    """Yield a refusal for each row: the store failed, or the Parquet file is damaged."""
    reason, attempts = (error.reason, error.attempts) if isinstance(error, StoreError) else ("corrupt", 1)
    for row in rows:
        listed = Meta(row["size"], row["etag"], row["last_modified"])
        yield _fetched(Refusal("fetch", reason, str(error)[:300], attempts), listed, listed)


def _fetched(content: bytes | Refusal, read: Meta, listed: Meta) -> Fetched:
    # If the store returns no version with the bytes, that of the listing is used. If it is outdated, the next run labels the
    # image again, which is safe. Without a version, the next run could not see the change.
    size = listed.size if read.size is None else read.size
    if read.etag is None and read.last_modified is None:
        return Fetched(content, size, listed.etag, listed.last_modified)
    return Fetched(content, size, read.etag, read.last_modified)

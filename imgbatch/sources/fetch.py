"""Effects: objects read ahead: while one image is decoded, the next dozens of GETs are under way."""

from __future__ import annotations

import json
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
from imgbatch.config.sections import Config, FetchConfig, SourceConfig
from imgbatch.errors import InputError, StoreError
from imgbatch.rejects import Refusal
from imgbatch.sources.parquet import ImageTable
from imgbatch.sources.tars import End, Tar
from imgbatch.storage.stores import Meta, Stores

_ASSUMED_BYTES = 1 << 20
_GROUPS_AT_ONCE, _IMAGES_AHEAD = 2, 64
_MEMBERS_AHEAD = 16


@dataclass(frozen=True, slots=True)
class Fetched:
    """One image's bytes, or why there are none; and what of the object was read."""

    content: bytes | Refusal
    size: int | None
    etag: str | None
    last_modified: datetime | None


class Fetcher:
    """Reads images with a pool of threads that lives as long as its process."""

    def __init__(self, stores: Stores, config: FetchConfig, source: SourceConfig) -> None:
        self._stores, self._config = stores, config
        self._pool = ThreadPoolExecutor(config.concurrency, "fetch")
        self._table = lru_cache(maxsize=2)(lambda uri: _open(stores, uri, source.image_column))

    def __call__(self, listed: pa.Table) -> Iterator[Fetched]:
        """Yield one Fetched for each row of a listing, in order."""
        rows = listed.select(["uri", "size", "etag", "last_modified", "container"]).to_pylist()
        for container, few in groupby(rows, key=lambda row: row["container"]):
            of_kind = list(few)
            yield from self._objects(of_kind) if container is None else self._table_rows(of_kind)

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
        for uri, few in groupby(rows, key=lambda row: row["uri"].rpartition("#")[0]):
            of_file = list(few)
            try:
                table = self._table(uri)
                numbers = np.array([int(row["uri"].rpartition("#")[2]) for row in of_file])
                table.require_unchanged(of_file[0]["etag"], of_file[0]["last_modified"], int(numbers.max()))
                places = np.searchsorted(table.starts, numbers, side="right") - 1
                edges = [0, *(np.flatnonzero(np.diff(places)) + 1).tolist(), len(places)]
                for start, end in pairwise(edges):
                    group = int(places[start])
                    chosen = numbers[start:end] - table.starts[group]
                    groups.append(partial(self._group, table.images(group, chosen), of_file[start:end]))
            except (StoreError, InputError) as error:
                groups.append(partial(_refused, of_file, error))
        yield from prefetch_streams(groups, concurrency=_GROUPS_AT_ONCE, max_pending=_IMAGES_AHEAD)

    def _group(self, contents: Iterator[bytes | Refusal], rows: list[dict[str, Any]]) -> Iterator[Fetched]:
        left = list(reversed(rows))
        try:
            for content in contents:
                yield self._of_row(content, left.pop())
        except (StoreError, pa.ArrowException, OSError) as error:
            yield from _refused(left[::-1], error)
            return
        if left:
            yield from _refused(left[::-1], InputError("its row group has fewer rows than the file's footer says"))

    def _of_row(self, content: bytes | Refusal, row: dict[str, Any]) -> Fetched:
        size = None if isinstance(content, Refusal) else len(content)
        known = Meta(size, row["etag"], row["last_modified"])
        if isinstance(content, Refusal):
            return _fetched(content, known, known)
        if len(content) > self._config.max_bytes:
            message = f"{len(content)} bytes are more than fetch.max_bytes={self._config.max_bytes}"
            return _fetched(Refusal("fetch", "too_large", message), known, known)
        return _fetched(content, known, known)

    def _fetch(self, listed: dict[str, Any]) -> Fetched:
        known = Meta(listed["size"], listed["etag"], listed["last_modified"])
        if known.size is not None and known.size > self._config.max_bytes:
            message = f"{known.size} bytes are more than fetch.max_bytes={self._config.max_bytes}"
            return _fetched(Refusal("fetch", "too_large", message), known, known)
        try:
            content, read = self._stores.read(listed["uri"], self._config.max_bytes, known)
        except StoreError as error:
            return _fetched(Refusal("fetch", error.reason, str(error), error.attempts), known, known)
        return _fetched(content, read, known)


def members_of_tar(
    stores: Stores,
    number: int,
    tar: dict[str, Any],
    config: Config,
    resume_offset: int,
    last_offset: int,
    keep: Callable[[Mapping[str, Mapping[str, str]]], None] | None = None,
) -> Iterator[tuple[dict[str, Any], Fetched]]:
    """Yield (row, image) for the images of a tar behind the one at `last_offset`, while the next ones are read.

    A row holds `uri`, the place and the sidecars. At last comes a row `read`, whose refusal tells as JSON how it ended:
    number, offset of the last row, whether nothing is left to read, and how many members were passed over, or are sidecars
    without an image beside them.

    Args:
        keep: is given the sidecars that do not lie beside their image, by key, when the end is reached; None: they are counted.
    """  # fmt: skip
    meta = Meta(tar["size"], tar["etag"], tar["last_modified"])
    limit = config.fetch.max_bytes
    reader = Tar(stores, tar["uri"], meta, config.source.suffixes, limit, collect=keep is not None)
    place = {"offset": last_offset, "previous_offset": last_offset, "resume_offset": resume_offset}
    refusal, whole, end = None, True, End(0, 0)
    try:
        for found in prefetch_items(partial(reader.members, resume_offset, last_offset), _MEMBERS_AHEAD):
            if isinstance(found, End):
                refusal, end = found.tear, found
                if keep is not None:
                    keep(found.sidecars)
                break
            place = {"offset": found.offset, "previous_offset": place["offset"], "resume_offset": found.resume_offset}
            size = None if isinstance(found.content, Refusal) else len(found.content)
            known = Meta(size, meta.etag, meta.last_modified)
            yield (
                {"uri": f"{tar['uri']}#{found.name}", **place, **found.sidecars},
                _fetched(found.content, known, known),
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
    told = {
        "number": number, "last_offset": place["offset"], "whole": whole, "ignored": end.ignored,
        "unpaired": end.unpaired, "unpaired_example": f"{tar['uri']}#{end.unpaired_example}",
    }  # fmt: skip
    yield {"uri": tar["uri"], "read": True}, _fetched(Refusal("list", "read", json.dumps(told)), meta, meta)


def _open(stores: Stores, uri: str, image_column: str | None) -> ImageTable:
    return ImageTable(stores, uri, stores.call("look at", uri, lambda store, path: store.head(path)), image_column)


def _refused(rows: list[dict[str, Any]], error: Exception) -> Iterator[Fetched]:
    """Yield rows that could not be read: the store's fault, or that of a file that is no sound Parquet any more."""
    reason, attempts = (error.reason, error.attempts) if isinstance(error, StoreError) else ("corrupt", 1)
    for row in rows:
        known = Meta(row["size"], row["etag"], row["last_modified"])
        yield _fetched(Refusal("fetch", reason, str(error)[:300], attempts), known, known)


def _fetched(content: bytes | Refusal, read: Meta, known: Meta) -> Fetched:
    # What the store does not tell with the bytes is taken from the listing: an ETag that is too old makes the next run
    # label the image once more, which is safe; none at all would hide a change.
    size = known.size if read.size is None else read.size
    if read.etag is None and read.last_modified is None:
        return Fetched(content, size, known.etag, known.last_modified)
    return Fetched(content, size, read.etag, read.last_modified)

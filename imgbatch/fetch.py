"""Objects read ahead: while one image is decoded, the next dozens of GETs are under way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from imgbatch.ahead import ahead
from imgbatch.config import FetchConfig
from imgbatch.errors import StoreError
from imgbatch.rejects import Refusal
from imgbatch.storage import Meta, Stores

_ASSUMED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Fetched:
    """One image's bytes, or why there are none; and what of the object was read."""

    content: bytes | Refusal
    size: int | None
    etag: str | None
    last_modified: datetime | None


class Fetcher:
    """Reads images with a pool of threads that lives as long as its process."""

    def __init__(self, stores: Stores, config: FetchConfig) -> None:
        self._stores, self._config = stores, config
        self._pool = ThreadPoolExecutor(config.ahead, "fetch")

    def __call__(self, listed: pa.Table) -> Iterator[Fetched]:
        """Yield one Fetched for each row of a listing, in order."""
        rows = listed.select(["uri", "size", "etag", "last_modified"]).to_pylist()
        calls = ahead(
            self._pool,
            self._fetch,
            rows,
            most=self._config.ahead,
            cost=lambda row: row["size"] or _ASSUMED_BYTES,
            most_cost=self._config.ahead_bytes,
        )
        return (fetched for _, fetched in calls)

    def _fetch(self, listed: dict[str, Any]) -> Fetched:
        known = Meta(listed["size"], listed["etag"], listed["last_modified"])
        if known.size is not None and known.size > self._config.max_bytes:
            message = f"{known.size} bytes are more than fetch.max_bytes={self._config.max_bytes}"
            return _fetched(Refusal("fetch", "too_large", message), known, known)
        try:
            content, read = self._stores.read(listed["uri"], self._config.max_bytes)
        except StoreError as error:
            return _fetched(Refusal("fetch", error.reason, str(error), error.attempts), known, known)
        return _fetched(content, read, known)


def _fetched(content: bytes | Refusal, read: Meta, known: Meta) -> Fetched:
    # What the store does not tell with the bytes is taken from the listing: an ETag that is too old makes the next run
    # label the image once more, which is safe; none at all would hide a change.
    size = known.size if read.size is None else read.size
    if read.etag is None and read.last_modified is None:
        return Fetched(content, size, known.etag, known.last_modified)
    return Fetched(content, size, read.etag, read.last_modified)

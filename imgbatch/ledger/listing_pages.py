"""Effects: the pages of a listing: numbered Parquet files below the run, from which workers read.

The number of an image in the listing identifies it within the run: page `number // PAGE_ROWS`, row `number % PAGE_ROWS`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.storage.stores import Folder

PAGE_ROWS = 8_192


class PageFolder(Protocol):
    """Where workers read the pages of a listing."""

    @property
    def uri(self) -> str:
        """The name of the folder, which is different for each listing."""

    def read(self, name: str) -> bytes:
        """Return the content of a page."""


@dataclass(frozen=True, slots=True)
class PackedPages:
    """The pages of a short listing, in memory: they are sent to the workers, and no store is needed.

    The repr has no content: Ray shows the arguments of operators, and a URI may hold a signature.
    """

    uri: str
    _pages: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def of(cls, uri: str, rows: pa.Table) -> PackedPages:
        """Return the pages of these rows, numbered from 0."""
        pages = {}
        for number, name in enumerate(page_names(len(rows))):
            sink = io.BytesIO()
            pq.write_table(rows.slice(number * PAGE_ROWS, PAGE_ROWS), sink, compression="zstd")
            pages[name] = sink.getvalue()
        return cls(uri, pages)

    def read(self, name: str) -> bytes:
        """Return the content of a page."""
        return self._pages[name]


def page_names(rows: int) -> list[str]:
    """Return the names of the pages of a listing with this number of rows."""
    return [page_name(number) for number in range(-(-rows // PAGE_ROWS))]


def page_name(number: int) -> str:
    """Return the name of a page in the listing's folder."""
    return f"page-{number:06d}.parquet"


def read_page(folder: PageFolder, number: int) -> pa.Table:
    """Return one page of a listing."""
    return pq.ParquetFile(pa.BufferReader(folder.read(page_name(number)))).read(use_threads=False)


def pages(folder: Folder) -> Iterator[pa.Table]:
    """Yield the pages of a listing, in order."""
    for number in range(len([name for name in folder.names() if name.endswith(".parquet")])):
        yield read_page(folder, number)


class Pages:
    """The listing's pages as a worker reads them: the last four are cached."""

    def __init__(self, folder: PageFolder) -> None:
        self._page = lru_cache(maxsize=4)(lambda number: read_page(folder, number))

    def rows(self, numbers: npt.NDArray[np.int64]) -> pa.Table:
        """Return the listing's rows of ascending image numbers."""
        pages = numbers // PAGE_ROWS
        return pa.concat_tables(
            self._page(page).take(pa.array(numbers[pages == page] - page * PAGE_ROWS))
            for page in np.unique(pages).tolist()
        )

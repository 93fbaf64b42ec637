"""Effects: the search for the row of one image in Parquet files.

Row groups whose statistics exclude the URI are skipped. Of the others, only the column `uri` is read, and of the row group
with the image also its row. Images are listed in the order of their names and labelled in about that order, so that in most
outputs few row groups are read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.errors import closest
from imgbatch.ledger.part_reader import Entry, parquet_files, read_each
from imgbatch.storage.stores import Folder

_BATCH = 1 << 16
_NEIGHBOURS = 200
"""Number of URIs before and after a missing one, in order, among which similar ones are searched."""
_SHOWN = 3
_SIMILAR = 0.9
"""Minimum similarity of two URIs: most URIs of an output have a long prefix in common."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that was found."""

    uri: str
    """Of the file."""
    number: int
    """Of the row in the file, from 0."""
    rows: int
    """The number of rows in the file."""
    row: Mapping[str, Any]
    metadata: Mapping[bytes, bytes]
    """The key-value metadata of the file."""


@dataclass(frozen=True, slots=True)
class _Range:
    """The smallest and the largest URI of a file."""

    entry: Entry
    first: str
    last: str


class ImageSearch:
    """The search in one folder of Parquet files with a column `uri`."""

    def __init__(self, folder: Folder, uris: Sequence[str]) -> None:
        """Prepare to search.

        Args:
            folder: of the files.
            uris: the spellings of the URI, any of which counts.
        """
        self._folder, self._uris = folder, uris
        self._entries: list[Entry] = []
        self._ranges: list[_Range] = []

    def find(self) -> Hit | None:
        """Return the first row of the image, None if there is none."""
        self._entries = parquet_files(self._folder)
        for entry, (uris, hit) in zip(
            self._entries, read_each(self._folder, self._entries, self._search), strict=False
        ):
            if uris is not None:
                self._ranges.append(_Range(entry, *uris))
            if hit is not None:
                return hit
        return None

    def similar(self) -> list[str]:
        """Return URIs like a missing one, most similar first: those next to it in order, or with the same name.

        Reads the column of one file: the one in which the URI would be, by the statistics.
        """
        if not self._ranges:
            return []
        wanted = self._uris[0]
        before = [entry for entry in self._ranges if entry.first <= wanted]
        chosen = (
            max(before, key=lambda entry: entry.first) if before else min(self._ranges, key=lambda entry: entry.first)
        )
        for uris in read_each(self._folder, [chosen.entry], _all_uris):
            at = bisect_left(uris, wanted)
            name = wanted.rpartition("/")[2]
            candidates = uris[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS]
            found = [uri for uri in uris if uri.rpartition("/")[2] == name][:1]
            while len(found) < _SHOWN:
                match = closest(wanted, sorted(set(candidates) - set(found)), cutoff=_SIMILAR)
                if match is None:
                    break
                found.append(match)
            return found
        return []

    def _search(self, uri: str, file: pq.ParquetFile) -> tuple[tuple[str, str] | None, Hit | None]:
        """Return the smallest and largest URI of a file, if it has statistics, and the row of the image."""
        metadata, first, bounds = file.metadata, 0, None
        column = next(at for at in range(metadata.num_columns) if metadata.schema.column(at).path == "uri")
        for group in range(metadata.num_row_groups):
            info = metadata.row_group(group)
            statistics = info.column(column).statistics
            known = (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None
            if known is not None:
                bounds = (min(bounds[0], known[0]), max(bounds[1], known[1])) if bounds is not None else known
            if known is None or any(known[0] <= wanted <= known[1] for wanted in self._uris):
                at = self._row_in_group(file, group)
                if at is not None:
                    row = file.read_row_group(group, use_threads=False).slice(at, 1).to_pylist()[0]
                    return bounds, Hit(uri, first + at, metadata.num_rows, row, metadata.metadata or {})
            first += info.num_rows
        return bounds, None

    def _row_in_group(self, file: pq.ParquetFile, group: int) -> int | None:
        first = 0
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=["uri"], use_threads=False):
            for wanted in self._uris:
                at = pc.index(batch.column(0), pa.scalar(wanted, batch.column(0).type)).as_py()
                if at >= 0:
                    return first + int(at)
            first += len(batch)
        return None


def _all_uris(uri: str, file: pq.ParquetFile) -> list[str]:
    return sorted(file.read(columns=["uri"], use_threads=False)["uri"].to_pylist())

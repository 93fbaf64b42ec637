"""Effects: the search for the row of one image in Parquet files.

Row groups whose statistics exclude the URI are skipped. Of the others, only the column `uri` is read, and of the row group
with the image also its row. Images are listed in the order of their names and labelled in about that order, so that in most
outputs few row groups are read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.errors import OutputError, closest
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


class ImageSearch:
    """The search in one folder of Parquet files with a column `uri`."""

    def __init__(self, folder: Folder, uris: Sequence[str]) -> None:
        """Prepare to search.

        Args:
            folder: of the files.
            uris: the spellings of the URI, any of which counts.
        """
        self._folder, self._uris = folder, uris
        self._ranges: dict[str, tuple[str, str]] = {}
        """The smallest and the largest URI of each file that was read, by the URI of the file."""

    def find(self) -> Hit | None:
        """Return the row of the image, None if there is none.

        A few files, evenly spaced, are read first. Their smallest and largest URIs show between which of them the image lies
        if all files are in the order of the names; only if it is not there, the others are read.
        """
        entries = parquet_files(self._folder)
        stride = max(1, isqrt(len(entries)))
        return self._find_in(entries[::stride]) or self._find_in(self._by_probability(entries, stride))

    def _find_in(self, entries: Sequence[Entry]) -> Hit | None:
        """Return the row of the image in some of the files, and keep their smallest and largest URIs."""
        for file, uris, hit in read_each(self._folder, entries, self._search):
            if uris is not None:
                self._ranges[file] = uris
            if hit is not None:
                return hit
        return None

    def _by_probability(self, entries: Sequence[Entry], stride: int) -> list[Entry]:
        """Return the files that were not read, those first that lie between two files around the URI."""
        likely: list[Entry] = []
        others: list[Entry] = []
        for start in range(0, len(entries), stride):
            around = [self._folder.at(name) for name, _ in entries[start : start + stride + 1 : stride]]
            ranges = [self._ranges[file] for file in around if file in self._ranges]
            is_last = start + stride >= len(entries)
            is_likely = bool(ranges) and any(
                min(ranges)[0] <= wanted and (is_last or wanted <= max(last for _, last in ranges))
                for wanted in self._uris
            )
            (likely if is_likely else others).extend(entries[start + 1 : start + stride])
        return likely + others

    def similar(self) -> list[str]:
        """Return URIs like a missing one, most similar first: those next to it in order, or with the same name.

        Reads the column of one file: the one in which the URI would be, by the statistics.
        """
        if not self._ranges:
            return []
        wanted = self._uris[0]
        before = [(first, file) for file, (first, _) in self._ranges.items() if first <= wanted]
        _, chosen = max(before) if before else min((first, file) for file, (first, _) in self._ranges.items())
        entries = [entry for entry in parquet_files(self._folder) if self._folder.at(entry[0]) == chosen]
        for uris in read_each(self._folder, entries, _all_uris):
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

    def _search(self, uri: str, file: pq.ParquetFile) -> tuple[str, tuple[str, str] | None, Hit | None]:
        """Return the URI of a file, its smallest and largest URI if it has statistics, and the row of the image."""
        metadata, first, bounds = file.metadata, 0, None
        column = next((at for at in range(metadata.num_columns) if metadata.schema.column(at).path == "uri"), None)
        if column is None:
            raise OutputError(f"{uri} has no column uri, so imgbatch did not write it: move it away")
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
                    return uri, bounds, Hit(uri, first + at, metadata.num_rows, row, metadata.metadata or {})
            first += info.num_rows
        return uri, bounds, None

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

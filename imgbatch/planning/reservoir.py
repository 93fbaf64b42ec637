"""Values: a seeded sample of the images that will be labelled, which is kept while the listing streams by.

Each image has a key, a hash of the seed and its URI. A stratum keeps the images with the smallest keys: a uniform sample
without replacement, which depends neither on the order of the listing nor on how it is cut into batches.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.planning.strata import CELLS, FOLDERS, STRATA, Codes, Population, strata_of
from imgbatch.schema import LISTING, PARQUET, single_chunk
from imgbatch.sources.base import is_stream
from imgbatch.uri_index import hash_strings

_KEPT, _MIN_KEPT, _MAX_KEPT = 32_768, 64, 1_024  # images in all, and in each stratum
_CLUSTERS, _CLUSTER_ROWS = 8, 512
_STREAMS = 8
_BUFFERED = 4_096

_LARGEST = np.uint64(2**64 - 1)
Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


@dataclass
class Reservoir:
    """The images of which a sample is taken, and the counts of all."""

    seed: int = 0
    population: Population = field(default_factory=Population)
    stream_bytes: dict[int, int] = field(default_factory=dict)
    """The sizes of the streams that will be read, by their numbers in the listing."""
    streams: list[tuple[int, int, pa.RecordBatch]] = field(default_factory=list)
    """(negated key, number in the listing, row) of some streams, as a heap."""
    clusters: list[tuple[int, int, pa.RecordBatch]] = field(default_factory=list)
    """The same for runs of rows of a Parquet file that are read together."""
    _rows: list[pa.RecordBatch] = field(default_factory=list)
    _keys: list[Keys] = field(default_factory=list)
    _strata: list[Codes] = field(default_factory=list)
    _buffered: int = 0
    _bounds: Keys = field(default_factory=lambda: np.full(STRATA, _LARGEST))

    def add(self, first: int, batch: pa.RecordBatch, pending: Mask) -> None:
        """Take a batch of the listing; see `Listing.on_listed`."""
        if not len(batch):
            return
        strata = strata_of(batch)
        self.population.add(strata, batch, pending)
        keys = hash_strings(single_chunk(batch["uri"]), np.uint64(self.seed * 2 + 1))
        wanted = pending & (keys < self._bounds[strata])
        streams = np.asarray(is_stream(batch))
        batch = batch.select(LISTING.names)
        if streams.any():
            self._add_streams(first, batch, np.flatnonzero(streams & pending), keys)
            wanted &= ~streams
        if batch["container"][0].as_py() == PARQUET:
            self._add_cluster(first, batch, np.flatnonzero(pending), keys)
            return
        self._rows.append(batch.filter(pa.array(wanted)))
        self._keys.append(keys[wanted])
        self._strata.append(strata[wanted])
        self._buffered += int(wanted.sum())
        if self._buffered >= _BUFFERED:
            self._shrink()

    def images(self) -> tuple[pa.Table, Codes, Keys]:
        """Return the rows that were kept, with their strata and keys, in the order of strata and keys."""
        self._shrink()
        if not self._rows:
            return pa.schema(LISTING).empty_table(), np.zeros(0, np.int64), np.zeros(0, np.uint64)
        return pa.Table.from_batches(self._rows), self._strata[0], self._keys[0]

    def _shrink(self) -> None:
        """Keep the rows with the smallest keys of each stratum: the more strata there are, the fewer of each."""
        if not self._rows:
            return
        strata_in_use = max(1, int(np.count_nonzero(self.population.pending)))
        kept_of_each = max(_MIN_KEPT, min(_MAX_KEPT, _KEPT // strata_in_use))
        keys, strata = np.concatenate(self._keys), np.concatenate(self._strata)
        order = np.lexsort((keys, strata))
        strata = strata[order]
        starts = np.searchsorted(strata, strata)
        rank = np.arange(len(strata)) - starts
        kept = order[rank < kept_of_each]
        last = order[rank == kept_of_each - 1]
        table = pa.Table.from_batches(self._rows).take(pa.array(kept)).combine_chunks()
        all_strata = np.concatenate(self._strata)
        self._bounds[all_strata[last]] = keys[last]
        self._rows, self._keys, self._strata = table.to_batches(), [keys[kept]], [all_strata[kept]]
        self._buffered = 0

    def _add_streams(self, first: int, batch: pa.RecordBatch, rows: npt.NDArray[np.int64], keys: Keys) -> None:
        for row in rows.tolist():
            self.stream_bytes[first + row] = batch["size"][row].as_py() or 0
            _push(self.streams, _STREAMS, (-int(keys[row]), first + row, batch.slice(row, 1)))

    def _add_cluster(self, first: int, batch: pa.RecordBatch, rows: npt.NDArray[np.int64], keys: Keys) -> None:
        """Take some consecutive rows of a row group: reading single rows would cost as much as reading the row group."""
        if len(rows):
            part = rows[:_CLUSTER_ROWS]
            taken = pa.Table.from_batches([batch.take(pa.array(part))]).combine_chunks().to_batches()[0]
            _push(self.clusters, _CLUSTERS, (-int(keys[part[0]]), first + int(part[0]), taken))


def _push(heap: list[tuple[int, int, pa.RecordBatch]], size: int, item: tuple[int, int, pa.RecordBatch]) -> None:
    if len(heap) < size:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def allocate(population: Population, kept: Codes, total: int) -> Codes:
    """Return how many images of each stratum to draw.

    Half of the sample is divided by the number of images, half by bytes: large images decide about the cost. Each cell gets
    at least some images, and the folders of a cell get theirs by the number of their images.

    Args:
        population: the counts of the listing.
        kept: the number of images that the reservoir has, by stratum.
        total: the number of images to draw.
    """
    images, bytes_ = population.by_cell(population.pending), population.by_cell(population.pending_bytes)
    available = population.by_cell(kept)
    images, bytes_ = np.where(available, images, 0), np.where(available, bytes_, 0)
    weight = images / max(1, images.sum()) + bytes_ / max(1, bytes_.sum())
    of_cell = np.minimum(np.maximum(np.round(total * weight / max(weight.sum(), 1e-9)), _MIN_OF_CELL), available)
    draws = np.zeros(STRATA, np.int64)
    for cell in np.flatnonzero(of_cell).tolist():
        part = slice(cell * FOLDERS, (cell + 1) * FOLDERS)
        draws[part] = _divide(int(of_cell[cell]), population.pending[part], kept[part])
    return draws


_MIN_OF_CELL = 6
assert CELLS * FOLDERS == STRATA


def _divide(count: int, weights: Codes, limits: Codes) -> Codes:
    """Divide a number among parts by their weights, up to a limit each.

    >>> _divide(10, np.array([90, 10, 0]), np.array([5, 20, 0])).tolist()
    [5, 5, 0]
    """
    drawn: Codes = np.minimum(np.floor(count * weights / max(1, weights.sum())).astype(np.int64), limits)
    while drawn.sum() < min(count, limits.sum()):
        share = np.where(drawn < limits, weights * count / max(1, weights.sum()) - drawn, -np.inf)
        drawn[int(np.argmax(share))] += 1
    return drawn

"""Values: the sample: a short listing of its own, in a random order, and the images of it that are pending."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.ledger.streams import Stream
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.planning.reservoir import Reservoir, allocate
from imgbatch.planning.strata import FOLDERS, FORMATS, STRATA, Codes, cell_of, strata_of
from imgbatch.schema import LISTING, PARQUET, TAR


@dataclass(frozen=True, slots=True)
class Sample:
    """The images and streams of a sample, numbered from 0."""

    rows: pa.Table
    """LISTING."""
    cells: Codes
    """The cell of each row."""
    ranges: npt.NDArray[np.int64]
    """(first, end) of rows that are read together."""
    streams: Mapping[int, Stream]
    """By number."""
    stream_bytes: Sequence[float]
    """The bytes that are left to read of each pending stream of the listing."""

    def __len__(self) -> int:
        return len(self.rows)

    def work_plan(self, first: int = 0, end: int | None = None) -> WorkPlan:
        """Return a plan for the rows from `first` to `end`."""
        pending = np.zeros(len(self.rows), bool)
        pending[first:end] = True
        return WorkPlan(pending, self.ranges, {n: stream for n, stream in self.streams.items() if pending[n]})


def draw(reservoir: Reservoir, streams: Mapping[int, Stream], count: int) -> Sample:
    """Draw a sample.

    The order is random, so that a measurement which ends early has a sample as well. Rows of one Parquet row group stay
    together.

    Args:
        reservoir: what was kept of the listing.
        streams: the pending streams, by their numbers in the listing.
        count: the number of images to draw, without those in containers.
    """
    random = np.random.default_rng(reservoir.seed)
    table, strata, _ = reservoir.images()
    draws = allocate(reservoir.population, np.bincount(strata, minlength=STRATA), count)
    rank = np.arange(len(strata)) - np.searchsorted(strata, strata)
    drawn = np.flatnonzero(rank < draws[strata])
    images = table.take(pa.array(random.permutation(drawn)))
    tables, ranges, opened = [images], [], {}
    rows = len(images)
    for _, _, batch in sorted(reservoir.clusters, key=lambda item: item[:2]):
        tables.append(pa.Table.from_batches([batch]))
        ranges.append((rows, rows + len(batch)))
        rows += len(batch)
    for _, number, batch in sorted(reservoir.streams, key=lambda item: item[:2]):
        if number in streams:
            tables.append(pa.Table.from_batches([batch]))
            opened[rows] = streams[number]
            rows += 1
    left = [max(0, reservoir.stream_bytes[number] - _position(stream)) for number, stream in streams.items()]
    all_rows = pa.concat_tables([part.cast(LISTING) for part in tables]).combine_chunks()
    return Sample(all_rows, _cells(all_rows), np.array(ranges, np.int64).reshape(-1, 2), opened, left)


def _position(stream: Stream) -> int:
    return max(0, *stream.position)


def _cells(rows: pa.Table) -> Codes:
    return strata_of(rows) // FOLDERS if len(rows) else np.zeros(0, np.int64)


def container_cells() -> dict[str, int]:
    """Return the first cell of each kind of container: their images have no size in the listing."""
    return {name: cell_of(name, 0) for name in (PARQUET, TAR) if name in FORMATS}

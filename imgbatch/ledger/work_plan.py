"""Values: the work plan of a run: the images and streams of the listing without a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.ledger.streams import Stream, StreamCounts
from imgbatch.sources.base import StreamEnd

Mask = npt.NDArray[np.bool_]
RowRanges = npt.NDArray[np.int64]


class WorkPlan:
    """The images and streams whose rows are pending, by their numbers in the listing.

    The plan owns the mask: other modules read `pending`, and report arrivals to `accept` or `mark_arrived`.

    Args:
        pending: by number, whether the row is missing; the plan takes ownership of the array, one byte per image.
        row_group_ranges: (first, end) of images that are read together, such as a row group of a Parquet file; ascending, n×2.
        streams: the streams among them.
    """

    __slots__ = ("_changed", "_pending", "found", "row_group_ranges", "streams")

    def __init__(self, pending: Mask, row_group_ranges: RowRanges, streams: Mapping[int, Stream]) -> None:
        self._pending = pending
        self.row_group_ranges = row_group_ranges
        self.streams = streams
        self.found = StreamCounts()
        """What this run found in streams so far."""
        self._changed: set[int] = set()
        """The streams whose progress the next commit records."""

    @property
    def pending(self) -> Mask:
        """A read-only view of the mask."""
        view = self._pending.view()
        view.flags.writeable = False
        return view

    @property
    def remaining(self) -> int:
        """How many images and streams are pending."""
        return int(np.count_nonzero(self._pending))

    @property
    def total(self) -> int | None:
        """How many images are pending; None: unknown, since there are streams."""
        return None if self.streams else self.remaining

    def in_streams(self, numbers: npt.NDArray[np.integer]) -> Mask:
        """Return a mask of the numbers that are those of streams."""
        return np.isin(numbers, list(self.streams)) if self.streams else np.zeros(len(numbers), bool)

    def accept(self, rows: pa.Table, ends: Sequence[StreamEnd] = (), limit: int | None = None) -> pa.Table:
        """Return the rows that are new, and mark what they complete as arrived.

        Args:
            rows: RESULTS with carried columns.
            ends: how readers reached the ends of streams.
            limit: the maximum number of rows of streams to accept; None: no limit.
        """
        if not self.streams:
            return self._first_rows(rows)
        # Only rows of images in streams have a place. A reject of a whole stream that has none is a row like that of an image.
        in_stream = pc.is_valid(rows["offset"])
        tables = [self._first_rows(rows.filter(pc.invert(in_stream)))]
        rows = rows.filter(in_stream)
        numbers = rows["index"].to_numpy()
        arrived = set(np.unique(numbers).tolist())
        for number in sorted(arrived):
            stream = self.streams[number]
            before = stream.position
            accepted = stream.accept(rows.filter(pa.array(numbers == number)), limit)
            if stream.position != before:  # even if all rows before the new position are in the tables already
                self._changed.add(number)
            limit = None if limit is None else limit - len(accepted)
            self.found = self.found.with_rows(len(accepted))
            tables.append(accepted)
        for end in ends:
            self.streams[end.number].note_end(end)
        self._close_streams(arrived | {end.number for end in ends})
        return pa.concat_tables(tables)

    def mark_arrived(self, numbers: npt.NDArray[np.integer] | Iterable[int]) -> Mask:
        """Mark images, and streams that are read to their end, as done; return a mask of those that were pending before."""
        at = np.asarray(numbers if isinstance(numbers, np.ndarray) else list(numbers), np.int64)
        was_pending = self._pending[at]
        self._pending[at] = False
        return was_pending

    def stop_streams(self) -> None:
        """Read no stream any further, since the limit of the run is reached."""
        for number, stream in self.streams.items():
            # A reject of an earlier run counts as long as this run has no row in its place.
            if self._pending[number] and stream.was_rejected:
                self.found = self.found.with_rows(1)
        self.mark_arrived(self.streams)

    def take_lost(self) -> npt.NDArray[np.int64]:
        """Return the numbers of what is pending after the last attempt; the caller gives each one reject.

        A stream that was left at a reject of its own has it already.
        """
        self.mark_arrived(number for number, stream in self.streams.items() if stream.is_rejected)
        lost = np.flatnonzero(self._pending)
        self.found = self.found.with_rows(int(np.count_nonzero(self.in_streams(lost))))
        return lost

    @property
    def has_progress(self) -> bool:
        """Whether streams were read further since `take_progress`, even if none of their rows is new."""
        return bool(self._changed)

    def take_progress(self) -> dict[str, Mapping[str, Any]]:
        """Return how far streams are read with all rows accepted so far, by URI: of those that changed since the last call."""
        numbers, self._changed = sorted(self._changed), set()
        return {self.streams[number].uri: self.streams[number].entry() for number in numbers}

    def restricted(self, pending: Mask) -> WorkPlan:
        """Return a plan for other images of the same listing."""
        return WorkPlan(pending, self.row_group_ranges, self.streams)

    def _first_rows(self, rows: pa.Table) -> pa.Table:
        """Return the rows of images that did not arrive before."""
        new = self.mark_arrived(rows["index"].to_numpy())
        return rows if new.all() else rows.filter(pa.array(new))

    def _close_streams(self, numbers: Iterable[int]) -> None:
        """Close those of the streams whose readers reached the end, and of which no row is missing."""
        for number in sorted(numbers):
            if self._pending[number] and (end := self.streams[number].close()) is not None:
                self.mark_arrived([number])
                self._changed.add(number)
                self.found = self.found.with_end(end)

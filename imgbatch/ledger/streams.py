"""Values: the interface of streams: units of work that are read in one go, and whose images only reading them shows.

A stream, such as a tar, is one row of the listing. A worker reads it in its order, and sends its rows with their place in it
(`schema.PLACE_COLUMNS`). Ray may deliver rows twice, late, or not at all: the stream says which of them are accepted, from
where the next worker continues to read, and when nothing is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from imgbatch.sources.base import StreamEnd

UNIT_COLUMNS = ("resume_offset", "last_offset")
"""The columns of a unit that say where a worker continues to read a stream; null in units of images."""


class Stream(Protocol):
    """What a run does with a stream whose rows are pending."""

    @property
    def uri(self) -> str:
        """Its name in the footers of parts."""

    @property
    def position(self) -> tuple[int, int]:
        """The values of UNIT_COLUMNS for a worker that reads what is left."""

    @property
    def is_rejected(self) -> bool:
        """Whether this run has a reject of the stream itself, which says why its end was not reached."""

    @property
    def was_rejected(self) -> bool:
        """Whether the tables have such a reject of an earlier run, and this run has none in its place."""

    def accept(self, rows: pa.Table, limit: int | None) -> pa.Table:
        """Return the rows that go into the tables now: they continue the accepted ones, and are in no table yet.

        Args:
            rows: RESULTS of this stream, in its order.
            limit: the maximum number of rows to return; None: no limit.
        """

    def note_end(self, end: StreamEnd) -> None:
        """Note how a reader reached the end. The note may overtake the last rows."""

    def close(self) -> StreamEnd | None:
        """Close the stream if all rows before a noted end have arrived; return that end, None while rows are missing."""

    def entry(self) -> Mapping[str, Any]:
        """Return the entry in the footers of the next commit: how far it is read with all rows accepted so far."""


@dataclass(frozen=True, slots=True)
class OpenedStream:
    """A listed stream, as the tables know it."""

    rows: int
    """The number of its rows in the tables, with a reject of the stream itself that stays."""
    status: int
    """DONE: nothing is left to read; else that of the row of the stream itself."""
    stream: Stream | None = None
    """What is left to read; None: nothing."""


@dataclass(frozen=True, slots=True)
class ListedRows:
    """The rows of a listed stream, as the audit counts them."""

    labelled: int
    rejected: int
    complete: bool
    """Whether there are as many as a complete reading gives, and the end was reached."""
    description: str
    """Names the stream and its rows, for messages."""


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """What was found in streams, which the listing did not know."""

    rows: int = 0
    """Rows of their images, and of streams that could not be read."""
    ignored: int = 0
    """Members that are no images."""
    unpaired: int = 0
    """Sidecars that do not lie beside an image of their name."""
    unpaired_example: str = ""

    def with_rows(self, rows: int) -> StreamCounts:
        """Return the counts with more rows."""
        return StreamCounts(self.rows + rows, self.ignored, self.unpaired, self.unpaired_example)

    def with_end(self, end: StreamEnd) -> StreamCounts:
        """Return the counts with what a reader found beside images."""
        example = self.unpaired_example or (end.unpaired_example if end.unpaired else "")
        return StreamCounts(self.rows, self.ignored + end.ignored, self.unpaired + end.unpaired, example)

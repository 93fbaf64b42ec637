"""Values: cursors of tars that are being read: which rows have arrived, and how they are written into the tables.

A tar is read in its order, by one worker at a time, but Ray may deliver rows twice, late, or not at all. So rows are accepted
only where they continue the last ones, and a footer never records an offset with rows missing before it (`tar_progress`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.ledger.status import DONE, DUPLICATE, NEW
from imgbatch.ledger.tar_progress import TarProgress
from imgbatch.schema import CARRIED, LISTING, PLACE_COLUMNS, single_chunk
from imgbatch.sources.base import StreamEnd
from imgbatch.uri_index import UriIndex, uri_keys

_KEPT_COLUMNS = {"index", "size", "etag", "last_modified", "container", *PLACE_COLUMNS}
"""The columns of a member's row that a reject `duplicate` keeps, in addition to carried columns."""
_MAX_WAITING = 16_384  # rows of a tar that wait for rows before them; those beyond are read again


@dataclass(slots=True)
class TarCursor:
    """The position of this run in a tar, and facts about the rows before it. It is a `Stream`."""

    uri: str
    version: str
    mark_seen: Callable[[pa.RecordBatch], npt.NDArray[np.uint8]]
    """Returns the status in the ledger of images that are listed now; see `RowIndex.mark_seen`."""
    last_offset: int = -1
    """The offset of the last image whose row has arrived, with all rows before it."""
    resume_offset: int = 0
    """An offset at which a reader can resume."""
    rows: int = 0
    """The number of rows up to there, in the tables or about to be committed."""
    unbroken: bool = True
    """Whether no row was missing before the last image that was ever read."""
    closed: bool = False
    was_rejected: bool = False
    """An earlier run left a reject of the tar itself, which this run replaces."""
    is_rejected: bool = False
    """A reject of the tar itself has arrived in this run: it is truncated, or could not be read."""
    arrived: UriIndex = field(default_factory=UriIndex)
    """The members whose rows arrived in this run: a tar may hold two members of one name."""
    _end: StreamEnd | None = None
    """The report of its reader at the end. It may arrive before the last rows."""
    _waiting: pa.Table | None = None

    @classmethod
    def of(
        cls,
        uri: str,
        version: str,
        progress: TarProgress,
        mark_seen: Callable[[pa.RecordBatch], npt.NDArray[np.uint8]],
    ) -> TarCursor:
        """Return a cursor that resumes at the offset up to which no row is missing."""
        reached = progress.reached
        return cls(
            uri,
            version,
            mark_seen,
            reached.last_offset,
            reached.resume_offset,
            reached.rows,
            unbroken=progress.unbroken,
        )

    @property
    def position(self) -> tuple[int, int]:
        """Where a worker continues to read: the values of UNIT_COLUMNS."""
        return self.resume_offset, self.last_offset

    def accept(self, rows: pa.Table, limit: int | None) -> pa.Table:
        """Return the rows that go into the tables now, up to `limit`, and advance; see `Stream.accept`."""
        accepted, offered = [], rows
        # Up to a limit they are taken step by step: rows that are in the tables already do not count. `_next_rows` keeps what
        # it does not return, so that nothing is offered in the later steps.
        while limit != 0 and len(following := self._next_rows(offered, limit)):
            accepted.append(self._deduplicated(following))
            if limit is None:
                break
            limit -= len(accepted[-1])
            offered = rows.slice(0, 0)
        return pa.concat_tables(accepted) if accepted else rows.slice(0, 0)

    def note_end(self, end: StreamEnd) -> None:
        """Note how a reader reached the end. The note may overtake the last rows."""
        self._end = end

    def close(self) -> StreamEnd | None:
        """Close the tar if all rows before a noted end have arrived; return that end, None while rows are missing."""
        if self._end is None or self._end.last_offset != self.last_offset:
            return None
        self.closed = self._end.whole
        return self._end

    def entry(self) -> dict[str, Any]:
        """Return the entry of this tar in the footers of the next commit. Its keys are a format: do not rename them."""
        entry: dict[str, Any] = {
            "version": self.version,
            "through": self.last_offset,
            "group": self.resume_offset,
            "rows": self.rows,
        }
        if self.closed:
            entry |= {"images": self.rows}
        return entry | ({"torn": True} if self.closed and self.is_rejected else {})

    def _next_rows(self, rows: pa.Table, limit: int | None) -> pa.Table:
        """Return the rows of this tar that continue where the last ones ended, up to `limit`, and advance to their end.

        Rows that arrived before are dropped. Rows after a gap, and rows beyond `limit`, wait for a later call, up to a
        maximum number: the missing rows may arrive later.
        """
        if self._waiting is not None:
            rows = pa.concat_tables([self._waiting, rows], promote_options="default").sort_by("offset")
        offsets, previous = rows["offset"].to_numpy(), rows["previous_offset"].to_numpy()
        fresh = (offsets > self.last_offset) & (np.diff(offsets, prepend=-1) > 0)
        rows, offsets, previous = rows.filter(pa.array(fresh)), offsets[fresh], previous[fresh]
        # Each row has the offset of the row before it: if the previous row here has another offset, rows are missing.
        expected = np.concatenate([[self.last_offset], offsets[:-1]]) if len(offsets) else offsets
        gaps = np.flatnonzero(previous != expected)
        following = int(gaps[0]) if len(gaps) else len(rows)
        following = following if limit is None else min(following, limit)
        # The row of the tar itself does not wait: it records that this reader did not reach the end.
        waiting = rows.slice(following, _MAX_WAITING)
        self._waiting = waiting.filter(pc.not_equal(waiting["uri"], self.uri)) if len(waiting) else None
        rows = rows.slice(0, following)
        if len(rows):
            self.last_offset, self.resume_offset = int(offsets[len(rows) - 1]), rows["resume_offset"][-1].as_py()
        return rows

    def _deduplicated(self, rows: pa.Table) -> pa.Table:
        """Return the rows as they go into the tables, and count them: a second member of a name becomes a reject of its own.

        Args:
            rows: RESULTS that follow the last ones.
        """
        of_tar = np.asarray(pc.equal(rows["uri"], self.uri))  # rows of the tar itself: why its end was not reached
        keys = uri_keys(pa.concat_arrays(rows["uri"].chunks))
        first = self.arrived.add(keys) & ~of_tar
        status = np.full(len(rows), NEW, np.uint8)

        def look_up(which: npt.NDArray[np.bool_], named: pa.Table) -> None:
            if which.any():
                (batch,) = named.select(LISTING.names[:4]).combine_chunks().to_batches()
                status[which] = self.mark_seen(batch)

        look_up(first, rows.filter(pa.array(first)))
        # Members that are read again after a gap, or after a kill between the commits to the two logs, already have rows in
        # the tables. They count, and are not written again.
        written = first & (status == DONE)
        second = ~of_tar & (~first | (status == DUPLICATE))
        look_up(second, reject_duplicates(rows.filter(pa.array(second)), np.ones(int(second.sum()), bool)))
        written |= second & (status == DONE)
        if of_tar.any():  # the row of the tar arrives again if the tar is read again
            written |= of_tar & (self.is_rejected | (np.cumsum(of_tar) > 1))
            self.is_rejected, self.was_rejected = True, False
        self.rows += int(np.count_nonzero(~of_tar))
        return reject_duplicates(rows.filter(pa.array(~written)), second[~written])


def reject_duplicates(rows: pa.Table, second: npt.NDArray[np.bool_]) -> pa.Table:
    """Return rows of members of tars; the masked ones become rejects `duplicate`, with their offset in the URI."""
    if not second.any():
        return rows
    members = rows.filter(pa.array(second))
    uris, offsets = single_chunk(members["uri"]), single_chunk(members["offset"]).cast(pa.string())
    values = {
        "uri": pc.binary_join_element_wise(uris, offsets, "@"),
        "stage": "list", "reason": "duplicate", "passing": False, "attempts": 1,
        "message": pc.binary_join_element_wise("a second member with the name", uris, " "),
    }  # fmt: skip
    columns = []
    for column in rows.schema:
        if column.name in values:
            value = values[column.name]
            columns.append(
                value if isinstance(value, pa.Array) else pa.repeat(pa.scalar(value, column.type), len(members))
            )
        elif column.name in _KEPT_COLUMNS or column.name.startswith(CARRIED):
            columns.append(members[column.name])
        else:
            columns.append(pa.nulls(len(members), column.type))
    changed = pa.Table.from_arrays(columns, schema=rows.schema)
    return pa.concat_tables([rows.filter(pa.array(~second)), changed])

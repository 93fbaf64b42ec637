"""Values: a tar that is being read: which of its rows have arrived, and how they go into the tables.

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
from imgbatch.uri_index import UriIndex, uri_keys

_KEPT_COLUMNS = {"index", "size", "etag", "last_modified", "container", *PLACE_COLUMNS}
"""What a reject `duplicate` keeps of the row of its member, beside carried columns."""
_MAX_WAITING = 16_384  # rows of a tar that wait for rows before them; those beyond are read again


@dataclass(slots=True)
class TarCursor:
    """The position of this run in a tar, and what it knows of the rows before it."""

    uri: str
    version: str
    last_offset: int = -1
    """The offset of the last image whose row has arrived, with all rows before it."""
    resume_offset: int = 0
    """Where a reader that resumes may start."""
    rows: int = 0
    """The number of rows up to there, in the tables or about to be committed."""
    rows_before: int = 0
    """The number of rows in the tables before this run, including those after a gap."""
    unbroken: bool = True
    """Whether no row was missing before the last image that was ever read."""
    closed: bool = False
    refused: bool = False
    """An earlier run left a reject of the tar itself, which this run replaces."""
    truncated: bool = False
    """A reject of the tar itself has arrived in this run."""
    arrived: UriIndex = field(default_factory=UriIndex)
    """The members whose rows arrived in this run: a tar may hold two members of one name."""
    end_report: dict[str, Any] | None = None
    """What its reader reported at the end. It may arrive before the last rows do."""
    _waiting: pa.Table | None = None

    @classmethod
    def of(cls, uri: str, version: str, progress: TarProgress) -> TarCursor:
        """Return a cursor that resumes at the offset up to which no row is missing."""
        reached = progress.reached
        return cls(
            uri,
            version,
            reached.last_offset,
            reached.resume_offset,
            reached.rows,
            rows_before=progress.rows,
            unbroken=progress.unbroken,
        )

    def admit(self, rows: pa.Table, limit: int | None) -> pa.Table:
        """Return the rows of this tar that continue where the last ones ended, up to `limit`, and advance to their end.

        Rows that arrived before are dropped. Where rows are missing in between, which may still be on their way, some of
        the rows after them wait for a later call; so do the rows beyond `limit`.
        """
        if self._waiting is not None:
            rows = pa.concat_tables([self._waiting, rows], promote_options="default").sort_by("offset")
        offsets, previous = rows["offset"].to_numpy(), rows["previous_offset"].to_numpy()
        fresh = (offsets > self.last_offset) & (np.diff(offsets, prepend=-1) > 0)
        rows, offsets, previous = rows.filter(pa.array(fresh)), offsets[fresh], previous[fresh]
        # Each row names the offset of the row before it: where that is not the row here, rows are missing.
        expected = np.concatenate([[self.last_offset], offsets[:-1]]) if len(offsets) else offsets
        gaps = np.flatnonzero(previous != expected)
        admitted = int(gaps[0]) if len(gaps) else len(rows)
        admitted = admitted if limit is None else min(admitted, limit)
        # The row of the tar itself does not wait: it says that this reader did not reach the end.
        waiting = rows.slice(admitted, _MAX_WAITING)
        self._waiting = waiting.filter(pc.not_equal(waiting["uri"], self.uri)) if len(waiting) else None
        rows = rows.slice(0, admitted)
        if len(rows):
            self.last_offset, self.resume_offset = int(offsets[len(rows) - 1]), rows["resume_offset"][-1].as_py()
        return rows

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
        return entry | ({"torn": True} if self.closed and self.truncated else {})


def deduplicate(
    tar: TarCursor, rows: pa.Table, mark_seen: Callable[[pa.RecordBatch], npt.NDArray[np.uint8]]
) -> pa.Table:
    """Return the rows of members as they go into the tables: a second member of a name becomes a reject of its own.

    Args:
        tar: whose count is increased.
        rows: RESULTS that it admitted.
        mark_seen: `RowIndex.mark_seen`.
    """
    of_tar = np.asarray(pc.equal(rows["uri"], tar.uri))  # rows of the tar itself, which say why its end was not reached
    keys = uri_keys(pa.concat_arrays(rows["uri"].chunks))
    first = tar.arrived.add(keys) & ~of_tar
    status = np.full(len(rows), NEW, np.uint8)

    def look_up(which: npt.NDArray[np.bool_], named: pa.Table) -> None:
        if which.any():
            (batch,) = named.select(LISTING.names[:4]).combine_chunks().to_batches()
            status[which] = mark_seen(batch)

    look_up(first, rows.filter(pa.array(first)))
    # Members that are read again after a gap, or after a kill between the two logs: their rows are in the tables, and the
    # rows of others around them were not. They count, and are not written again.
    written = first & (status == DONE)
    second = ~of_tar & (~first | (status == DUPLICATE))
    look_up(second, reject_duplicates(rows.filter(pa.array(second)), np.ones(int(second.sum()), bool)))
    written |= second & (status == DONE)
    if of_tar.any():  # it arrives again where the tar is read again after it
        written |= of_tar & (tar.truncated | (np.cumsum(of_tar) > 1))
        tar.truncated, tar.refused = True, False
    tar.rows += int(np.count_nonzero(~of_tar))
    return reject_duplicates(rows.filter(pa.array(~written)), second[~written])


def reject_duplicates(rows: pa.Table, second: npt.NDArray[np.bool_]) -> pa.Table:
    """Return the rows of members of tars; those of the mask become rejects `duplicate`, with their offset in the URI."""
    if not second.any():
        return rows
    members = rows.filter(pa.array(second))
    uris, offsets = single_chunk(members["uri"]), single_chunk(members["offset"]).cast(pa.string())
    values = {
        "uri": pc.binary_join_element_wise(uris, offsets, "@"),
        "stage": "list", "reason": "duplicate", "passing": False, "attempts": 1,
        "message": pc.binary_join_element_wise("a second member of the name", uris, " "),
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

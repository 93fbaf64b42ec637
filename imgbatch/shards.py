"""Tars in the books. Which members a tar has, only reading it tells; so the parts say in their footers how far it is read.

A footer names each tar of which the part, or the one written just before it, holds rows: the version that was read, the
offset of the last image up to which all rows of this log are in it, and with the last ones how many rows there are in all.
Rejects are written first: a kill between the two logs leaves rejects whose neighbours are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.schema import CARRIED, LISTING, PLACE_COLUMNS, whole
from imgbatch.uris import UriIndex, uri_keys

NEW, DONE, STALE, DUPLICATE = range(4)
"""What the ledger says of a listed image: no row yet; a row that holds; one that must be replaced; listed before."""

LABELS_LOG, REJECTS_LOG = "labels", "rejects"

_OF_THE_PLACE = {"index", "size", "etag", "last_modified", "container", *PLACE_COLUMNS}
_MOST_AHEAD = 16_384  # rows of a tar that wait for others before them; beyond that they are read again


def version_of(etag: str | None, last_modified: datetime | None) -> str:
    """Return what tells versions of a tar apart."""
    return etag or (last_modified.isoformat() if last_modified is not None else "")


def members_of(uris: pa.Array | pa.ChunkedArray, tar: str) -> pa.Array | pa.ChunkedArray:
    """Return a mask of the URIs of a tar's members."""
    return pc.starts_with(uris, pattern=f"{tar}#")


@dataclass(slots=True)
class Progress:
    """How far one version of a tar is read, by the parts."""

    through: dict[str, int] = field(default_factory=lambda: {LABELS_LOG: -1, REJECTS_LOG: -1})
    """By log: all rows of images up to the one with this offset are in it."""
    group: int = 0
    """Where a reader that goes on may start."""
    rows: int = 0
    """Rows of its members."""
    images: int | None = None
    """How many rows there are in all, once it is read to its end."""
    parts: dict[tuple[str, int], int] = field(default_factory=dict)
    """Where its rows are: log and number of the part, and the offset up to which the log is written with it."""

    @property
    def closed(self) -> bool:
        """Whether it is read to its end."""
        return self.images is not None


class Shards:
    """What the parts say of tars: a few hundred bytes for each."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Progress]] = {}
        self._visited: dict[str, str] = {}
        self._loaded: set[str] = set()

    def take(self, log: str, number: int, table: pa.Table, told: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
        """Note what a part says of tars; return a mask of its rows that are members of them."""
        members = np.zeros(len(table), bool)
        for tar, entry in told.items():
            progress = self._known.setdefault(tar, {}).setdefault(entry["version"], Progress())
            if entry["through"] >= progress.through[log]:
                progress.through[log] = entry["through"]
                if log == LABELS_LOG:
                    progress.group = entry["group"]
            if log == LABELS_LOG:  # the one that is written last
                progress.images = entry.get("images", progress.images)
            progress.parts[log, number] = entry["through"]
            mine = np.asarray(members_of(table["uri"], tar))
            progress.rows += int(np.count_nonzero(mine))
            members |= mine
        return members

    def version(self, tar: str, listed: str) -> str:
        """Return which version a listing means; one that tells none, as of a link that leads nowhere, means the last known."""
        return listed or next(reversed(self._known.get(tar, {})), "")

    def visit(self, tar: str, version: str) -> Progress:
        """Return how far a listed tar is read."""
        version = self.version(tar, version)
        self._visited[tar] = version
        return self._known.get(tar, {}).get(version) or Progress()

    def parts_of(self, tar: str, version: str) -> list[tuple[str, int, bool]]:
        """Return the parts that hold rows of any version of a tar, whose rows are in the ledger's index from now on.

        With each: whether its rows are behind a reader that goes on with this version, who will not come by them.
        """
        self._loaded.add(tar)
        versions = self._known.get(tar, {})
        read = self.visit(tar, version)
        behind = {part for part, through in read.parts.items() if through <= read.through[LABELS_LOG]}
        parts = sorted({part for progress in versions.values() for part in progress.parts})
        return [(log, number, (log, number) in behind) for log, number in parts]

    def kept(self) -> Iterator[tuple[str, Progress]]:
        """Yield the tars, or older versions of them, whose rows no listed tar stands for."""
        for tar, versions in self._known.items():
            if tar not in self._loaded:
                listed = self._visited.get(tar)
                yield from ((tar, progress) for version, progress in versions.items() if version != listed)


@dataclass(slots=True)
class OpenShard:
    """A tar that is being read: which of its rows have arrived."""

    uri: str
    version: str
    through: int = -1
    """The offset of the last image whose row has arrived."""
    rejected_through: int = -1
    group: int = 0
    rows: int = 0
    """Rows in the tables, or about to be."""
    closed: bool = False
    refused: bool = False
    """A reject of the tar itself, of an earlier run, stands in the tables until this one has a row in its place."""
    torn: bool = False
    """A reject of the tar itself came in this run."""
    arrived: UriIndex = field(default_factory=UriIndex)
    """The members whose rows came in this run: a tar may hold two of one name."""
    told: dict[str, Any] | None = None
    """What its reader said at its end, which may come before the last rows do."""
    _ahead: pa.Table | None = None

    @classmethod
    def of(cls, uri: str, version: str, progress: Progress) -> OpenShard:
        """Go on where the parts say that reading ended."""
        through = progress.through
        return cls(uri, version, through[LABELS_LOG], through[REJECTS_LOG], progress.group, progress.rows)

    def admit(self, rows: pa.Table, most: int | None) -> pa.Table:
        """Return those of this tar's rows that go on where the last ones ended, up to `most`, and move on to their end.

        Ray may deliver rows again, which are dropped. Where rows are missing in between, which may have been overtaken, some
        of those behind them wait.
        """
        if self._ahead is not None:
            rows = pa.concat_tables([self._ahead, rows], promote_options="default").sort_by("offset")
        offsets, previous = rows["offset"].to_numpy(), rows["previous"].to_numpy()
        fresh = (offsets > self.through) & (np.diff(offsets, prepend=-1) > 0)
        rows, offsets, previous = rows.filter(pa.array(fresh)), offsets[fresh], previous[fresh]
        before = np.concatenate([[self.through], offsets[:-1]]) if len(offsets) else offsets
        gaps = np.flatnonzero(previous != before)
        there = int(gaps[0]) if len(gaps) else len(rows)
        # Its own row does not wait: it says that this time the end was not reached.
        waiting = rows.slice(there, _MOST_AHEAD)
        self._ahead = waiting.filter(pc.not_equal(waiting["uri"], self.uri)) if len(waiting) else None
        rows = rows.slice(0, there).slice(0, most)
        if len(rows):
            self.through, self.group = int(offsets[len(rows) - 1]), rows["group"][-1].as_py()
        return rows

    def entry(self) -> dict[str, Any]:
        """Return what the footers of the next commit say of this tar."""
        said: dict[str, Any] = {"version": self.version, "through": self.through, "group": self.group}
        return said | ({"images": self.rows} if self.closed else {})


def once(shard: OpenShard, rows: pa.Table, visit: Callable[[pa.RecordBatch], npt.NDArray[np.uint8]]) -> pa.Table:
    """Return the rows of members as they go into the tables: a second one of a name as a reject of its own.

    Args:
        shard: the tar, whose count goes up.
        rows: RESULTS that it admitted.
        visit: says of listed images with unique URIs what the ledger knows of them.
    """
    own = np.asarray(pc.equal(rows["uri"], shard.uri))  # the tar's, which says why its end was not reached
    keys = uri_keys(pa.concat_arrays(rows["uri"].chunks))
    double = ~shard.arrived.add(keys) & ~own
    known = np.full(len(rows), NEW, np.uint8)

    def ask(which: npt.NDArray[np.bool_], named: pa.Table) -> None:
        if which.any():
            (batch,) = named.select(LISTING.names[:4]).combine_chunks().to_batches()
            known[which] = visit(batch)

    ask(~double & ~own, rows.filter(pa.array(~double & ~own)))
    there = (known == DONE) | (known == DUPLICATE)
    # A kill between the two logs: these rejects are in, the labels beside them were not.
    again = there & (rows["offset"].to_numpy() <= shard.rejected_through)
    double |= there
    ask(double, doubles_rejected(rows.filter(pa.array(double)), np.ones(int(double.sum()), bool)))
    again |= double & (known == DONE)
    if own.any():  # which comes again where the tar is read again behind it
        again |= own & (shard.torn | (np.cumsum(own) > 1))
        shard.torn, shard.refused = True, False
    shard.rows += int(np.count_nonzero(~again & ~own))
    return doubles_rejected(rows.filter(pa.array(~again)), double[~again])


def doubles_rejected(rows: pa.Table, double: npt.NDArray[np.bool_]) -> pa.Table:
    """Return the rows with those of the mask, members of tars, made rejects `duplicate`, named by where they stand."""
    if not double.any():
        return rows
    given = rows.filter(pa.array(double))
    uris, offsets = whole(given["uri"]), whole(given["offset"]).cast(pa.string())
    said = {
        "uri": pc.binary_join_element_wise(uris, offsets, "@"),
        "stage": "list", "reason": "duplicate", "passing": False, "attempts": 1,
        "message": pc.binary_join_element_wise("a second member of the name", uris, " "),
    }  # fmt: skip
    columns = []
    for column in rows.schema:
        if column.name in said:
            value = said[column.name]
            columns.append(
                value if isinstance(value, pa.Array) else pa.repeat(pa.scalar(value, column.type), len(given))
            )
        elif column.name in _OF_THE_PLACE or column.name.startswith(CARRIED):
            columns.append(given[column.name])
        else:
            columns.append(pa.nulls(len(given), column.type))
    changed = pa.Table.from_arrays(columns, schema=rows.schema)
    return pa.concat_tables([rows.filter(pa.array(~double)), changed])

"""Values: tars in the books. Which members a tar has, only reading it tells; so the parts say in their footers how far
it is read.

The footer of a part names each tar of which its commit holds rows: the version that was read, the offset of the last image
up to which all rows are in the tables with this commit, and how many rows these are. How far a tar is read is not what the
last part says, but what all parts say together: the largest offset up to which the parts that are there hold as many rows as
were counted. If a part is lost, that is an offset before the gap, and reading resumes there; members after the gap
that have a row already keep it. Rejects are written first: a kill between the two logs leaves rejects whose neighbours are
read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.ledger.status import DONE, DUPLICATE, NEW
from imgbatch.schema import CARRIED, LISTING, PLACE_COLUMNS, single_chunk
from imgbatch.uri_index import UriIndex, uri_keys

_OF_THE_PLACE = {"index", "size", "etag", "last_modified", "container", *PLACE_COLUMNS}
_MOST_AHEAD = 16_384  # rows of a tar that wait for others before them; beyond that they are read again


def version_of(etag: str | None, last_modified: datetime | None) -> str:
    """Return what tells versions of a tar apart."""
    return etag or (last_modified.isoformat() if last_modified is not None else "")


def members_of(uris: pa.Array | pa.ChunkedArray, tar: str) -> pa.Array | pa.ChunkedArray:
    """Return a mask of the URIs of a tar's members."""
    return pc.starts_with(uris, pattern=f"{tar}#")


@dataclass(frozen=True, slots=True)
class Said:
    """What one part says of a version of a tar."""

    through: int
    """The offset of the last image up to which all rows are in the tables, with this part and those before it."""
    group: int
    """Where a reader that resumes may start."""
    total: int | None
    """How many rows these are, in both logs; None: not known, as version 0.1 did not write it for a tar that is half read."""
    closed: bool
    """The tar ends there."""
    rows: int
    """Rows of its members that are in this part now."""
    torn: bool = False
    """It ends there with a tear, for which there has to be a reject of the tar itself."""


_UNREAD = Said(through=-1, group=0, total=0, closed=False, rows=0)


@dataclass(slots=True)
class Progress:
    """How far one version of a tar is read, by the parts."""

    parts: dict[tuple[str, int], Said] = field(default_factory=dict)
    """By log and number of the part."""
    _reached: Said | None = None

    def note(self, log: str, number: int, said: Said) -> None:
        """Note what a part says."""
        self.parts[log, number] = said
        self._reached = None

    @property
    def reached(self) -> Said:
        """The furthest point up to which no row is missing; `rows` is the number of rows up to there."""
        if self._reached is None:
            self._reached, rows = _UNREAD, 0
            ordered = sorted(self.parts.values(), key=lambda said: (said.through, said.closed))
            for through, group in groupby(ordered, key=lambda said: said.through):
                there = list(group)
                rows += sum(said.rows for said in there)
                if whole := [said for said in there if said.total == rows]:
                    self._reached = replace(whole[-1], through=through, rows=rows)
        return self._reached

    @property
    def rows(self) -> int:
        """Rows of its members."""
        return sum(said.rows for said in self.parts.values())

    def rows_in(self, log: str) -> int:
        """Return how many of these are in one log."""
        return sum(said.rows for (name, _), said in self.parts.items() if name == log)

    @property
    def closed(self) -> bool:
        """Whether it is read to its end, and no row is missing."""
        return self.reached.closed

    @property
    def unbroken(self) -> bool:
        """Whether no row is missing up to the last image that was ever read."""
        return all(said.through <= self.reached.through for said in self.parts.values())

    @property
    def images(self) -> int | None:
        """How many rows there have to be, as far as a part is left that says so."""
        return next((said.total for said in self.parts.values() if said.closed), None)


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
            mine = np.asarray(members_of(table["uri"], tar)) if len(table) else members
            closed, rows = "images" in entry, int(np.count_nonzero(mine))
            total, torn = entry.get("rows", entry.get("images")), entry.get("torn", False)
            said = Said(entry["through"], entry["group"], total, closed, rows, torn)
            self._known.setdefault(tar, {}).setdefault(entry["version"], Progress()).note(log, number, said)
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

        With each: whether its rows are before the point where a reader goes on with this version, who will not come by them.
        """
        self._loaded.add(tar)
        versions = self._known.get(tar, {})
        read = self.visit(tar, version)
        behind = {part for part, said in read.parts.items() if said.through <= read.reached.through}
        parts = sorted({part for progress in versions.values() for part, said in progress.parts.items() if said.rows})
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
    group: int = 0
    rows: int = 0
    """Rows of images up to there, in the tables or about to be."""
    there: int = 0
    """Rows in the tables before this run, also of images behind a gap."""
    unbroken: bool = True
    """Whether no row was missing before the last image that was ever read."""
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
        """Go on from the point up to which no row is missing."""
        reached = progress.reached
        return cls(
            uri, version, reached.through, reached.group, reached.rows, there=progress.rows, unbroken=progress.unbroken
        )

    def admit(self, rows: pa.Table, most: int | None) -> pa.Table:
        """Return those of this tar's rows that go on where the last ones ended, up to `most`, and move on to their end.

        Ray may deliver rows again, which are dropped. Where rows are missing in between, which may have been overtaken, some
        of those behind them wait; so do those beyond `most`.
        """
        if self._ahead is not None:
            rows = pa.concat_tables([self._ahead, rows], promote_options="default").sort_by("offset")
        offsets, previous = rows["offset"].to_numpy(), rows["previous"].to_numpy()
        fresh = (offsets > self.through) & (np.diff(offsets, prepend=-1) > 0)
        rows, offsets, previous = rows.filter(pa.array(fresh)), offsets[fresh], previous[fresh]
        before = np.concatenate([[self.through], offsets[:-1]]) if len(offsets) else offsets
        gaps = np.flatnonzero(previous != before)
        there = int(gaps[0]) if len(gaps) else len(rows)
        there = there if most is None else min(there, most)
        # Its own row does not wait: it says that this time the end was not reached.
        waiting = rows.slice(there, _MOST_AHEAD)
        self._ahead = waiting.filter(pc.not_equal(waiting["uri"], self.uri)) if len(waiting) else None
        rows = rows.slice(0, there)
        if len(rows):
            self.through, self.group = int(offsets[len(rows) - 1]), rows["group"][-1].as_py()
        return rows

    def entry(self) -> dict[str, Any]:
        """Return what the footers of the next commit say of this tar."""
        said: dict[str, Any] = {
            "version": self.version,
            "through": self.through,
            "group": self.group,
            "rows": self.rows,
        }
        if self.closed:
            said |= {"images": self.rows}
        return said | ({"torn": True} if self.closed and self.torn else {})


def once(shard: OpenShard, rows: pa.Table, visit: Callable[[pa.RecordBatch], npt.NDArray[np.uint8]]) -> pa.Table:
    """Return the rows of members as they go into the tables: a second one of a name as a reject of its own.

    Args:
        shard: the tar, whose count goes up.
        rows: RESULTS that it admitted.
        visit: says of listed images with unique URIs what the ledger knows of them.
    """
    own = np.asarray(pc.equal(rows["uri"], shard.uri))  # the tar's, which says why its end was not reached
    keys = uri_keys(pa.concat_arrays(rows["uri"].chunks))
    first = shard.arrived.add(keys) & ~own
    known = np.full(len(rows), NEW, np.uint8)

    def ask(which: npt.NDArray[np.bool_], named: pa.Table) -> None:
        if which.any():
            (batch,) = named.select(LISTING.names[:4]).combine_chunks().to_batches()
            known[which] = visit(batch)

    ask(first, rows.filter(pa.array(first)))
    # Read again behind a gap, or behind a kill between the two logs: these rows are in, others around them were not.
    again = first & (known == DONE)
    double = ~own & (~first | (known == DUPLICATE))
    ask(double, doubles_rejected(rows.filter(pa.array(double)), np.ones(int(double.sum()), bool)))
    again |= double & (known == DONE)
    if own.any():  # which comes again where the tar is read again behind it
        again |= own & (shard.torn | (np.cumsum(own) > 1))
        shard.torn, shard.refused = True, False
    shard.rows += int(np.count_nonzero(~own))
    return doubles_rejected(rows.filter(pa.array(~again)), double[~again])


def doubles_rejected(rows: pa.Table, double: npt.NDArray[np.bool_]) -> pa.Table:
    """Return the rows with those of the mask, members of tars, made rejects `duplicate`, named by where they stand."""
    if not double.any():
        return rows
    given = rows.filter(pa.array(double))
    uris, offsets = single_chunk(given["uri"]), single_chunk(given["offset"]).cast(pa.string())
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

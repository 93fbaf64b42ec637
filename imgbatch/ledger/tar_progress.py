"""Values: the progress of reading tars, from the footers of the parts. The members of a tar are known only by reading it.

The footer of a part has an entry for each tar of which its commit holds rows: the version that was read, the offset of the
last image up to which all rows are in the tables with this commit, and the number of these rows. How far a tar is read
follows from all parts together, not from the last one: it is the largest offset up to which the existing parts hold as many
rows as were counted. If a part is lost, that is an offset before the gap, and reading resumes there. Members after the gap
that have a row keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.ledger.streams import ListedRows


def version_of(etag: str | None, last_modified: datetime | None) -> str:
    """Return the version of a tar as text: its ETag, or its time where there is no ETag."""
    return etag or (last_modified.isoformat() if last_modified is not None else "")


def members_of(uris: pa.Array | pa.ChunkedArray, tar: str) -> pa.Array | pa.ChunkedArray:
    """Return a mask of the URIs of a tar's members."""
    return pc.starts_with(uris, pattern=f"{tar}#")


def ended(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the entries, in the format of `TarCursor.entry`, of the tars that are read to their end."""
    return {tar: entry for tar, entry in entries.items() if "images" in entry}


@dataclass(frozen=True, slots=True)
class TarEntry:
    """The entry of one part about a version of a tar."""

    last_offset: int
    """The offset of the last image up to which all rows are in the tables, with this part and those before it."""
    resume_offset: int
    """An offset at which a reader can resume."""
    total: int | None
    """The number of these rows, in both logs; None: unknown, since version 0.1 did not write it for partly read tars."""
    closed: bool
    """Whether the tar ends there."""
    rows: int
    """The number of rows of its members that are in this part now."""
    truncated: bool = False
    """Whether the tar is truncated there. Then the tar itself has a reject."""

    @classmethod
    def read(cls, content: Mapping[str, Any], *, rows: int) -> TarEntry:
        """Read an entry of a footer, in the format of `TarCursor.entry`; `rows` rows of members are in the part now."""
        total = content.get("rows", content.get("images"))
        closed, truncated = "images" in content, content.get("torn", False)
        return cls(content["through"], content["group"], total, closed, rows, truncated)


_UNREAD = TarEntry(last_offset=-1, resume_offset=0, total=0, closed=False, rows=0)


@dataclass(slots=True)
class TarProgress:
    """The progress of reading one version of a tar, according to the parts."""

    parts: dict[tuple[str, int], TarEntry] = field(default_factory=dict)
    """By log and number of the part."""
    _reached: TarEntry | None = None

    def note(self, log: str, number: int, entry: TarEntry) -> None:
        """Note the entry of a part."""
        self.parts[log, number] = entry
        self._reached = None

    @property
    def reached(self) -> TarEntry:
        """The furthest offset up to which no row is missing; `rows` is the number of rows up to there."""
        if self._reached is None:
            self._reached, rows = _UNREAD, 0
            ordered = sorted(self.parts.values(), key=lambda entry: (entry.last_offset, entry.closed))
            for last_offset, group in groupby(ordered, key=lambda entry: entry.last_offset):
                entries = list(group)
                rows += sum(entry.rows for entry in entries)
                # A lost part, or one of which rows were removed, leaves fewer rows than the entries after it counted.
                if complete := [entry for entry in entries if entry.total == rows]:
                    self._reached = replace(complete[-1], last_offset=last_offset, rows=rows)
        return self._reached

    @property
    def rows(self) -> int:
        """The number of rows of its members."""
        return sum(entry.rows for entry in self.parts.values())

    def rows_in(self, log: str) -> int:
        """Return how many of its rows are in one log."""
        return sum(entry.rows for (name, _), entry in self.parts.items() if name == log)

    @property
    def closed(self) -> bool:
        """Whether it is read to its end, and no row is missing."""
        return self.reached.closed

    @property
    def unbroken(self) -> bool:
        """Whether no row is missing up to the last image that was ever read."""
        return all(entry.last_offset <= self.reached.last_offset for entry in self.parts.values())

    @property
    def member_count(self) -> int | None:
        """The number of rows of a complete reading; None: no existing part records it."""
        return next((entry.total for entry in self.parts.values() if entry.closed), None)


class TarIndex:
    """The entries of the parts about all tars: a few hundred bytes for each."""

    def __init__(self) -> None:
        self._progress: dict[str, dict[str, TarProgress]] = {}  # by tar and version
        self._listed_version: dict[str, str] = {}
        self._indexed: set[str] = set()

    def take(self, log: str, number: int, table: pa.Table, entries: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
        """Note the entries of a part; return a mask of its rows that are members of these tars."""
        members = np.zeros(len(table), bool)
        for tar, content in entries.items():
            of_tar = np.asarray(members_of(table["uri"], tar)) if len(table) else members
            entry = TarEntry.read(content, rows=int(np.count_nonzero(of_tar)))
            self._progress.setdefault(tar, {}).setdefault(content["version"], TarProgress()).note(log, number, entry)
            members |= of_tar
        return members

    def version(self, tar: str, listed: str) -> str:
        """Return the version of a listed tar; for an unknown one, as of a broken link, the last that was read."""
        return listed or next(reversed(self._progress.get(tar, {})), "")

    def mark_seen(self, tar: str, version: str) -> TarProgress:
        """Mark a tar as listed in this version; return how far it is read."""
        version = self.version(tar, version)
        self._listed_version[tar] = version
        return self._progress.get(tar, {}).get(version) or TarProgress()

    def parts_of(self, tar: str, version: str) -> list[tuple[str, int, bool]]:
        """Return the parts that hold rows of any version of a tar. From now on the ledger's index counts these rows.

        The last value is whether the rows of the part are before the offset at which reading of this version resumes.
        """
        self._indexed.add(tar)
        versions = self._progress.get(tar, {})
        read = self.mark_seen(tar, version)
        before = {part for part, entry in read.parts.items() if entry.last_offset <= read.reached.last_offset}
        parts = sorted({part for progress in versions.values() for part, entry in progress.parts.items() if entry.rows})
        return [(log, number, (log, number) in before) for log, number in parts]

    def unlisted(self) -> Iterator[tuple[str, TarProgress]]:
        """Yield the tars that are not listed, and the older versions of those that are."""
        for tar, versions in self._progress.items():
            if tar not in self._indexed:
                listed = self._listed_version.get(tar)
                yield from ((tar, progress) for version, progress in versions.items() if version != listed)

    def unlisted_rows(self) -> int:
        """Return the number of rows of these."""
        return sum(progress.rows for _, progress in self.unlisted())

    def removals(self) -> Iterator[tuple[str, dict[int, Callable[[pa.Table], pa.Table]]]]:
        """Yield what removes these rows, tar by tar: by log, the changes of its parts by their numbers."""
        for tar, progress in self.unlisted():
            change = partial(_without_members, tar)
            for name in (LABELS_LOG, REJECTS_LOG):
                yield name, {number: change for log, number in sorted(progress.parts) if log == name}

    def count_listed(self, row: Mapping[str, Any]) -> ListedRows:
        """Mark a tar of the listing as listed; return its rows."""
        progress = self.mark_seen(row["uri"], version_of(row["etag"], row["last_modified"]))
        members = "?" if progress.member_count is None else progress.member_count
        return ListedRows(
            progress.rows_in(LABELS_LOG),
            progress.rows_in(REJECTS_LOG),
            complete=progress.closed and not progress.reached.truncated,
            description=f"{row['uri']}#… ({progress.rows} rows of {members} members)",
        )


def _without_members(tar: str, table: pa.Table) -> pa.Table:
    return table.filter(pc.invert(members_of(table["uri"], tar)))

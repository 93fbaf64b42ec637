"""Effects: the ledger: what is done, and how it becomes so. The tables are the ledger; there is no second record.

Guarantees, given the assumption of `parts`:

- A row is in the store once `commit` returns, and never twice, whoever else writes and whenever a process is killed.
- The row of a changed image is taken out of its part before its new row is committed. A kill in between leaves the image
  without a row, and the next run labels it.
- Carried values are corrected row by row, by conditional replacement of the part. Doing it twice changes nothing more.
- `seal` takes the next number of both logs, so that no PUT of a dead run can land behind the books; `open` makes parts
  that a dead run was rewriting into other ones, so that what it sent for them cannot either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.monitor import tick
from imgbatch.ledger.carried import NewValues
from imgbatch.ledger.commit_log import Footer, Log, require_same
from imgbatch.ledger.duplicate_parts import Doubles
from imgbatch.ledger.status import DONE, DUPLICATE, LABELS_LOG, NEW, REJECTS_LOG, STALE
from imgbatch.ledger.tar_progress import OpenShard, Progress, Shards, members_of
from imgbatch.ledger.versions import VERSION_COLUMNS, Versions, changed_since
from imgbatch.schema import EMBEDDING, LABELS, REJECTS, carried_fields, single_chunk, with_carried
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import Keys, UriIndex, uri_keys

REJECT, _PASSING, _SEEN, _STALE = 1, 2, 4, 8

Status = npt.NDArray[np.uint8]
Corrections = Mapping[str, Mapping[int, NewValues]]
"""New carried values, by log and number of the part."""


@dataclass
class Ledger:
    """The two logs of an output, and in 37 bytes a row what they hold."""

    output: Folder
    fingerprint: Mapping[str, Any]
    retry: str = "transient"
    """Which rejects are tried again: passing, all."""
    read_only: bool = False
    label_columns: pa.Schema = LABELS
    """What stands in labels/, carried columns apart."""
    carried: Sequence[str] = ()
    """Which carried columns go into labels/; none named: all."""
    listed: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """The carried columns of this run's listing: those of the first part of a log if that is a seal."""
    labels: Log = field(init=False)
    rejects: Log = field(init=False)
    done: UriIndex = field(init=False)
    """Each row's image, version, part and state; `carried` is set by `corrections` where the input carries columns."""
    stale: int = field(init=False, default=0)
    absorbed: UriIndex = field(init=False)
    """Images that another writer labelled or rejected while this run went on."""
    shards: Shards = field(init=False)
    """Tars whose members are not in `done`, unless they are still to be read."""
    _closed: dict[str, Mapping[str, Any]] = field(init=False, default_factory=dict)
    """What was said of the tars that this run came to the end of."""

    def __post_init__(self) -> None:
        self.labels = Log(self.output.folder("labels"))
        self.rejects = Log(self.output.folder("rejects"))

    def open(self) -> Ledger:
        """Read what is done.

        Raises:
            OutputError: a part is foreign, torn, newer than this program, or of another fingerprint.
            AuditError: an image has two rows.
        """
        self.forget()
        for log in (self.labels, self.rejects):
            log.scan()
            log.warn_of_gaps()
            if not self.read_only:
                log.fence(self.fingerprint)
        doubles = Doubles(self.output)
        for number, table, footer in self._rows(self.labels, VERSION_COLUMNS):
            tick()
            table = self._without_tars(LABELS_LOG, number, table, footer)
            doubles.note(LABELS_LOG, number, table, ~self._add(number, table, 0))
        doubles.refuse()
        surplus: dict[int, pa.Table] = {}
        for number, table, footer in self._rows(self.rejects, [*VERSION_COLUMNS, "passing"]):
            tick()
            table = self._without_tars(REJECTS_LOG, number, table, footer)
            double = ~self._add(number, table, _rejected(table))
            if double.any():
                surplus[number] = table.filter(pa.array(double))
        self._drop_rejects_of_labelled(surplus)
        if not self.read_only:
            for log in (self.labels, self.rejects):
                log.drop_empty_groups()
        return self

    def visit(self, batch: pa.RecordBatch, keys: Keys | None = None) -> Status:
        """Say of each listed image whether it is NEW, DONE, STALE or a DUPLICATE of one visited before.

        URIs must be unique within the batch. NEW ones are not remembered here.
        """
        versions = Versions.of(batch, keys)
        status = np.full(len(batch), NEW, np.uint8)
        for columns, rows, positions in self.done.lookup(versions.keys):
            state, size, tag = (columns[name][positions] for name in ("state", "size", "tag"))
            tags = versions.tags[rows]
            changed = changed_since(size, versions.sizes[rows], tag, tags)
            again = (state & REJECT > 0) & ((state & _PASSING > 0) | (self.retry == "all"))
            seen = state & _SEEN > 0
            stale = (changed | again) & ~seen  # what a second row of an image says is compared by `visit_again`
            status[rows] = np.where(seen, DUPLICATE, np.where(stale, STALE, DONE))
            columns["state"][positions] |= np.where(stale, _STALE | _SEEN, _SEEN).astype(np.uint8)
        self.stale += int(np.count_nonzero(status == STALE))
        return status

    def visit_again(self, batch: pa.Table, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which images, visited and found DONE, are STALE by what is now known of their size and version."""
        versions = Versions.of(batch, keys)
        changed = np.zeros(len(batch), bool)
        for columns, rows, positions in self.done.lookup(keys):
            state, size, tag = (columns[name][positions] for name in ("state", "size", "tag"))
            stale = (state & _STALE == 0) & changed_since(size, versions.sizes[rows], tag, versions.tags[rows])
            columns["state"][positions] |= np.where(stale, _STALE, 0).astype(np.uint8)
            changed[rows] = stale
        self.stale += int(np.count_nonzero(changed))
        return changed

    def visit_tar(self, uri: str, version: str, *, again: bool, refused: bool = False) -> OpenShard | Progress:
        """Return how far a listed tar is read; an OpenShard if there is more to read.

        Args:
            uri: of the tar.
            version: of the tar, as it is listed.
            again: it is read even if it was read to its end.
            refused: it has a row itself.

        Raises:
            AuditError: a member has two rows.
        """
        version = self.shards.version(uri, version)
        progress = self.shards.visit(uri, version)
        if progress.closed and not again and (refused or not progress.reached.torn):
            return progress
        doubles = Doubles(self.output)
        surplus: dict[int, pa.Table] = {}
        for name, number, behind in self.shards.parts_of(uri, version):
            columns = [*VERSION_COLUMNS, *(["passing"] if name == REJECTS_LOG else [])]
            table, _ = self._log(name).part(number, columns)
            table = table.filter(members_of(table["uri"], uri))
            state = _rejected(table) if name == REJECTS_LOG else np.zeros(len(table), np.uint8)
            if behind:  # else `prune` would take out what no reader comes by again
                state |= np.uint8(_SEEN)
            double = ~self._add(number, table, state)
            if name == LABELS_LOG:
                doubles.note(name, number, table, double)
            elif double.any():
                surplus[number] = table.filter(pa.array(double))
        doubles.refuse()
        self._drop_rejects_of_labelled(surplus)
        shard = OpenShard.of(uri, version, progress)
        shard.there -= sum(map(len, surplus.values()))
        return shard

    def renew(self, uri: str) -> None:
        """Make the row of a tar itself STALE: it is read again, and says anew how it ended."""
        for columns, _, positions in self.done.lookup(uri_keys(pa.array([uri]))):
            columns["state"][positions] |= np.uint8(_STALE)
            self.stale += len(positions)

    def kept(self) -> int:
        """Return how many rows belong to images that were not visited."""
        alone = sum(int(np.count_nonzero(state & _SEEN == 0)) for state in self.done.columns("state"))
        return alone + sum(progress.rows for _, progress in self.shards.kept())

    def commit(
        self, rows: pa.Table, run_id: str, model: str, shards: Mapping[str, Mapping[str, Any]] | None = None
    ) -> int:
        """Write the rows into the two logs; return how many were written: not those that another writer was first with.

        Args:
            rows: RESULTS columns without `index`, and carried ones. No URI twice, none that was committed before.
            shards: how far tars are read with these rows.
        """
        keys = uri_keys(single_chunk(rows["uri"]))
        if self.stale:
            closed = [tar for tar, entry in (shards or {}).items() if "images" in entry]
            self._take_out(np.concatenate([keys, uri_keys(pa.array(closed, pa.string()))]))
        rows = self._without_absorbed(rows, keys)
        rows = rows.append_column("run_id", pa.repeat(run_id, len(rows)))
        rows = rows.append_column("model", pa.repeat(model, len(rows)))
        if EMBEDDING in self.label_columns.names and EMBEDDING not in rows.column_names:  # no image was labelled
            column = self.label_columns.field(EMBEDDING)
            rows = rows.append_column(column, pa.nulls(len(rows), column.type))
        footer = Footer(run_id, self.fingerprint, shards=shards or {})
        self._closed |= {tar: entry for tar, entry in (shards or {}).items() if "images" in entry}
        labelled = pc.is_null(rows["reason"])
        written = 0
        for log, mask in ((self.rejects, pc.invert(labelled)), (self.labels, labelled)):
            table = rows.filter(mask)
            if len(table) or (shards and log is self.labels):
                columns = self._columns(log, rows.schema)
                written += log.append(table.select(columns.names).cast(columns), footer, self._absorb)
        return written

    def correct(self, corrections: Corrections) -> None:
        """Write new carried values into the parts that hold the rows.

        A kill in between leaves parts with old values, which the next run finds and corrects.
        """
        for log, name in ((self.labels, LABELS_LOG), (self.rejects, REJECTS_LOG)):
            for _ in self._rewritten(log, {number: new.into for number, new in sorted(corrections[name].items())}):
                tick()

    def seal(self, run_id: str) -> None:
        """Take the next number of each log with an empty part.

        That of rejects/ says again how many members the tars have that this run came to the end of: what is known of a tar is
        not lost with one part.
        """
        for log, shards in ((self.labels, {}), (self.rejects, self._closed)):
            log.announced.take_back()
            footer = Footer(run_id, self.fingerprint, seal=True, shards=shards)
            log.append(self._empty(log), footer, self._absorb)

    def fill_gaps(self, run_id: str) -> None:
        """Take the numbers that are missing with empty parts, once what was in them has been made again.

        Then a missing number means that something is missing, and no late PUT of a dead run can have it.
        """
        footer = Footer(run_id, self.fingerprint, seal=True)
        for log in (self.labels, self.rejects):
            if log.missing:
                log.fill(self._empty(log), footer)

    def _empty(self, log: Log) -> pa.Table:
        """Return no rows, with all columns of a log: a reader of *.parquet may want the same ones in each file."""
        return self._columns(log, log.carried() if log.numbers else self.listed).empty_table()

    def _without_tars(self, name: str, number: int, table: pa.Table, footer: Footer) -> pa.Table:
        """Return the rows of a part that are no members of tars; those are counted."""
        members = self.shards.take(name, number, table, footer.shards)
        return table.filter(pa.array(~members)) if footer.shards else table

    def _log(self, name: str) -> Log:
        return self.labels if name == LABELS_LOG else self.rejects

    def _columns(self, log: Log, rows: pa.Schema) -> pa.Schema:
        """Return the columns of a log for rows that carry what these do."""
        if log is self.rejects:
            return with_carried(REJECTS, carried_fields(rows))
        return with_carried(self.label_columns, carried_fields(rows, self.carried))

    def sealed_by(self, run_id: str | None) -> bool:
        """Return whether both logs end with a seal of that run."""
        if run_id is None:
            return False
        for log in (self.labels, self.rejects):
            footer = log.footer(log.numbers[-1]) if log.numbers else None
            if footer is None or not footer.seal or footer.run_id != run_id:
                return False
        return True

    def forget(self) -> None:
        """Let go of what is known of the rows; the books are read from the store, and want the memory."""
        self.done = UriIndex(size=np.uint32, tag=np.uint64, part=np.int32, state=np.uint8, carried=np.uint32)
        self.absorbed = UriIndex()
        self.shards = Shards()
        self._closed = {}

    def prune(self, unread: Sequence[str] = ()) -> int:
        """Take out the rows of all images that were not visited; return how many went.

        Args:
            unread: Parquet files that were listed and could not be read: nobody knows which of their rows are there still.
        """
        gone = 0
        for tar, progress in self.shards.kept():
            for name in (LABELS_LOG, REJECTS_LOG):
                keep = partial(_without_members, tar)
                parts = {part: keep for log, part in sorted(progress.parts) if log == name}
                for rows in self._rewritten(self._log(name), parts):
                    gone += rows
                    tick()
        for log, kind in ((self.labels, 0), (self.rejects, REJECT)):
            gone_of = self._rows_where(_SEEN | REJECT, kind)
            rewrites = {number: partial(_without, keys, but=unread) for number, keys in gone_of.items()}
            for rows in self._rewritten(log, rewrites):
                gone += rows
                tick()
        return gone

    def _rows(self, log: Log, columns: list[str]) -> Iterator[tuple[int, pa.Table, Footer]]:
        for number, table, footer in log.read(columns):
            require_same(footer.fingerprint, self.fingerprint, log.uri(number))
            yield number, table, footer

    def _add(self, number: int, table: pa.Table, state: npt.NDArray[np.uint8] | int) -> npt.NDArray[np.bool_]:
        versions = Versions.of(table)
        states = np.broadcast_to(np.asarray(state, np.uint8), len(table))
        parts = np.full(len(table), number, np.int32)
        unknown = np.zeros(len(table), np.uint32)
        return self.done.add(
            versions.keys, size=versions.sizes, tag=versions.tags, part=parts, state=states, carried=unknown
        )

    def _drop_rejects_of_labelled(self, surplus: Mapping[int, pa.Table]) -> None:
        """Take out the rejects of images that another writer labelled: two writers share no transaction over two logs."""
        doubles = Doubles(self.output)
        keys_of = {number: uri_keys(single_chunk(table["uri"])) for number, table in surplus.items()}
        for number, keys in keys_of.items():
            rejected = np.ones(len(keys), bool)
            for columns, rows, positions in self.done.lookup(keys):
                rejected[rows] = columns["state"][positions] & REJECT > 0
            doubles.note(REJECTS_LOG, number, surplus[number], rejected)
        doubles.refuse()
        if not self.read_only:
            self._remove(self.rejects, keys_of)

    def _take_out(self, keys: Keys) -> None:
        """Take the old rows of these images out of their parts."""
        old: dict[tuple[int, int], list[Keys]] = {}
        for columns, rows, positions in self.done.lookup(keys):
            stale = columns["state"][positions] & _STALE > 0
            rows, positions = rows[stale], positions[stale]
            parts, kinds = columns["part"][positions], columns["state"][positions] & REJECT
            for number, kind in {*zip(parts.tolist(), kinds.tolist(), strict=True)}:
                chosen = (parts == number) & (kinds == kind)
                old.setdefault((number, kind), []).append(keys[rows[chosen]])
            columns["state"][positions] &= np.uint8(255 - _STALE)
            self.stale -= len(rows)
        for log, rejected in ((self.labels, 0), (self.rejects, REJECT)):
            self._remove(
                log, {number: np.concatenate(found) for (number, kind), found in old.items() if kind == rejected}
            )

    def _rows_where(self, mask: int, value: int) -> dict[int, Keys]:
        chosen: dict[int, list[Keys]] = {}
        for columns, keys in self.done.rows():
            matching = columns["state"] & mask == value
            parts = columns["part"][matching]
            for number in np.unique(parts).tolist():
                chosen.setdefault(number, []).append(keys[matching][parts == number])
        return {number: np.concatenate(found) for number, found in chosen.items()}

    def _remove(self, log: Log, keys_of: Mapping[int, Keys]) -> None:
        """Take the rows of these keys out of each part. A commit depends on it, so that no `tick` interrupts it."""
        for _ in self._rewritten(log, {number: partial(_without, keys) for number, keys in keys_of.items()}):
            pass

    def _rewritten(self, log: Log, change: Mapping[int, Callable[[pa.Table], pa.Table]]) -> Iterator[int]:
        """Replace parts by what is made of each; yield, after each part, how many rows were removed from it."""
        log.announced.add(change)  # all at once: `rewrite` would announce them one by one
        for number, changed in change.items():
            yield log.rewrite(number, changed)

    def _absorb(self, rows: pa.Table, theirs: pa.Table) -> pa.Table:
        if len(theirs):
            self.absorbed.add(uri_keys(single_chunk(theirs["uri"])))
        return self._without_absorbed(rows, uri_keys(single_chunk(rows["uri"])))

    def _without_absorbed(self, rows: pa.Table, keys: Keys) -> pa.Table:
        return rows.filter(pa.array(~self.absorbed.contains(keys))) if len(self.absorbed) else rows


def _rejected(table: pa.Table) -> npt.NDArray[np.uint8]:
    """Return the states of rejects."""
    passing = np.asarray(single_chunk(table["passing"]).fill_null(False)).astype(np.uint8)
    return passing * np.uint8(_PASSING) | np.uint8(REJECT)


def _without(keys: Keys, table: pa.Table, but: Sequence[str] = ()) -> pa.Table:
    """Return the rows without those of these keys; rows of the files `but` stay."""
    gone = UriIndex()
    gone.add(keys)
    keep = ~gone.contains(uri_keys(single_chunk(table["uri"])))
    for file in but:
        keep |= np.asarray(pc.starts_with(table["uri"], pattern=f"{file}#"))
    return table.filter(pa.array(keep))


def _without_members(tar: str, table: pa.Table) -> pa.Table:
    return table.filter(pc.invert(members_of(table["uri"], tar)))

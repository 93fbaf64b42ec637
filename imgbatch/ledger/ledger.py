"""Effects: the ledger: which images are done, and the commit of new rows. The tables themselves are the ledger; there is no
second record.

Guarantees, given the assumption of `commit_log`:

- A row is in the store once `commit` returns, and never twice, with any number of writers, even if processes are killed.
- The row of a changed image is removed from its part before its new row is committed. A kill in between leaves the image
  without a row, and the next run labels it.
- Carried values are corrected row by row, by conditional replacement of the part. A repeated correction has no effect.
- `seal` takes the next number of both logs, so that no late PUT of a dead run can create a part after the audit. `open`
  rewrites the parts that a dead run was rewriting (`Log.fence`), so that no late PUT of it can replace a part either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.monitor import tick
from imgbatch.ledger.carried import NewValues
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.duplicate_parts import DuplicateParts
from imgbatch.ledger.fingerprint import require_same
from imgbatch.ledger.part_file import Footer
from imgbatch.ledger.row_index import RowIndex, Status
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.ledger.streams import OpenedStream
from imgbatch.ledger.tar_progress import TarIndex, ended
from imgbatch.ledger.tars import open_tar
from imgbatch.ledger.versions import VERSION_COLUMNS
from imgbatch.schema import EMBEDDING, LABELS, REJECTS, carried_fields, single_chunk, with_carried
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import Keys, UriIndex, uri_keys

Corrections = Mapping[str, Mapping[int, NewValues]]
"""New carried values, by log and number of the part."""


@dataclass
class Ledger:
    """The two logs of an output, and an index of their rows in 37 bytes a row."""

    output: Folder
    fingerprint: Mapping[str, Any]
    retry: str = "transient"
    """Which rejects are retried: transient, all."""
    read_only: bool = False
    label_columns: pa.Schema = LABELS
    """The columns of labels/ without the carried ones."""
    carried: Sequence[str] = ()
    """Which carried columns go into labels/; empty: all."""
    labels: Log = field(init=False)
    rejects: Log = field(init=False)
    index: RowIndex = field(init=False)
    """The rows that existed when the ledger was opened. Its hashes of carried values are set by `corrections`."""
    written_by_others: UriIndex = field(init=False)
    """Images that another writer labelled or rejected during this run."""
    streams: TarIndex = field(init=False)
    """How far streams are read. Rows of their images are in `index` only where `open_stream` returned a Stream."""
    _ended: dict[str, Mapping[str, Any]] = field(init=False, default_factory=dict)
    """The footer entries of the streams that this run has read to their end."""

    def __post_init__(self) -> None:
        self.labels = Log(self.output.folder(LABELS_LOG))
        self.rejects = Log(self.output.folder(REJECTS_LOG))

    def open(self) -> Ledger:
        """Read which images are done.

        Raises:
            OutputError: a part is foreign, truncated, newer than this program, or of another fingerprint.
            AuditError: an image has two rows.
        """
        self.release_index()
        for log in (self.labels, self.rejects):
            log.scan()
            log.warn_of_gaps()
            if not self.read_only:
                log.fence(self.fingerprint)
        duplicates = DuplicateParts(self.output)
        for number, table, footer in self._rows(self.labels, VERSION_COLUMNS):
            tick()
            table = self._without_streams(LABELS_LOG, number, table, footer)
            duplicates.note(LABELS_LOG, number, table, ~self.index.add(number, table))
        duplicates.refuse()
        surplus: dict[int, pa.Table] = {}
        for number, table, footer in self._rows(self.rejects, [*VERSION_COLUMNS, "passing"]):
            tick()
            table = self._without_streams(REJECTS_LOG, number, table, footer)
            duplicated = ~self.index.add(number, table, rejects=True)
            if duplicated.any():
                surplus[number] = table.filter(pa.array(duplicated))
        self._drop_rejects_of_labelled(surplus)
        if not self.read_only:
            for log in (self.labels, self.rejects):
                log.drop_empty_groups()
        return self

    def open_stream(self, row: Mapping[str, Any], status: int) -> OpenedStream:
        """Return how many rows a listed stream has, and what is left to read of it.

        Args:
            row: of the listing.
            status: of the row of the stream itself.

        Raises:
            AuditError: an image in it has two rows.
        """
        return open_tar(self, row, status)

    def index_rows(
        self, parts: Iterable[tuple[str, int, bool]], of: Callable[[pa.ChunkedArray], pa.ChunkedArray]
    ) -> int:
        """Add rows of streams to the index, which `open` left out; return how many rejects of labelled images were dropped.

        Args:
            parts: log and number of each part, and whether a reader that resumes does not come to its rows.
            of: returns a mask of the URIs whose rows to add.

        Raises:
            AuditError: an image has two rows.
        """
        duplicates = DuplicateParts(self.output)
        surplus: dict[int, pa.Table] = {}
        for name, number, before_resume in parts:
            rejects = name == REJECTS_LOG
            table, _ = self._log(name).part(number, [*VERSION_COLUMNS, *(["passing"] if rejects else [])])
            table = table.filter(of(table["uri"]))
            # Images before the offset of a reader that resumes count as seen from the start; otherwise `prune` would remove
            # their rows.
            duplicated = ~self.index.add(number, table, rejects=rejects, seen=before_resume)
            if not rejects:
                duplicates.note(name, number, table, duplicated)
            elif duplicated.any():
                surplus[number] = table.filter(pa.array(duplicated))
        duplicates.refuse()
        self._drop_rejects_of_labelled(surplus)
        return sum(map(len, surplus.values()))

    def mark_seen(self, batch: pa.RecordBatch) -> Status:
        """Return the status of images that are listed now; see `RowIndex.mark_seen`."""
        return self.index.mark_seen(batch)

    def unlisted_rows(self) -> int:
        """Return the number of rows whose images were not listed."""
        return self.index.count_unseen() + self.streams.unlisted_rows()

    def commit(
        self, rows: pa.Table, run_id: str, model: str, progress: Mapping[str, Mapping[str, Any]] | None = None
    ) -> int:
        """Write the rows into the two logs; return the number written, without rows that another writer wrote first.

        Args:
            rows: RESULTS columns without `index`, and carried ones. No URI twice, none that was committed before.
            run_id: of this run.
            model: its name and digest.
            progress: how far streams are read with these rows.
        """
        progress = progress or {}
        just_ended = ended(progress)
        keys = uri_keys(single_chunk(rows["uri"]))
        if self.index.stale:
            self._remove_stale(np.concatenate([keys, uri_keys(pa.array(list(just_ended), pa.string()))]))
        rows = self._not_yet_written(rows, keys)
        rows = rows.append_column("run_id", pa.repeat(run_id, len(rows)))
        rows = rows.append_column("model", pa.repeat(model, len(rows)))
        if EMBEDDING in self.label_columns.names and EMBEDDING not in rows.column_names:  # no image was labelled
            column = self.label_columns.field(EMBEDDING)
            rows = rows.append_column(column, pa.nulls(len(rows), column.type))
        footer = Footer(run_id, self.fingerprint, streams=progress)
        self._ended |= just_ended
        labelled = pc.is_null(rows["reason"])
        written = 0
        # Rejects first, labels last. The footers count the rows of both parts, so that after a kill in between the count of a
        # stream is not reached: its images are read again, and the rejects that exist are kept.
        for log, mask in ((self.rejects, pc.invert(labelled)), (self.labels, labelled)):
            table = rows.filter(mask)
            if len(table) or (progress and log is self.labels):
                columns = self._columns(log, rows.schema)
                written += log.append(table.select(columns.names).cast(columns), footer, self._drop_written)
        return written

    def correct(self, corrections: Corrections) -> None:
        """Write new carried values into the parts that hold the rows.

        A kill in between leaves parts with old values, which the next run finds and corrects.
        """
        for log, name in ((self.labels, LABELS_LOG), (self.rejects, REJECTS_LOG)):
            for _ in self._rewritten(
                log, {number: values.into for number, values in sorted(corrections[name].items())}
            ):
                tick()

    def seal(self, run_id: str, carried: pa.Schema | None = None) -> None:
        """Take the next number of each log with an empty part.

        The seal of rejects/ repeats the entries of all streams that this run has read to their end, so that a single lost part
        does not lose how many images a stream has.

        Args:
            carried: the carried columns of the listing. A log without other parts than the seal gets these columns.
        """
        for log, streams in ((self.labels, {}), (self.rejects, self._ended)):
            log.intents.withdraw()
            footer = Footer(run_id, self.fingerprint, seal=True, streams=streams)
            log.append(self._empty(log, carried), footer, self._drop_written)

    def fill_gaps(self, run_id: str) -> None:
        """Take the missing numbers with empty parts, once the rows that were in them have been written again.

        After that a missing number always means lost rows, and no late PUT of a dead run can take one.
        """
        footer = Footer(run_id, self.fingerprint, seal=True)
        for log in (self.labels, self.rejects):
            if log.missing:
                log.fill_gaps(self._empty(log), footer)

    def sealed_by(self, run_id: str | None) -> bool:
        """Return whether both logs end with a seal of that run."""
        if run_id is None:
            return False
        for log in (self.labels, self.rejects):
            footer = log.footer(log.numbers[-1]) if log.numbers else None
            if footer is None or not footer.seal or footer.run_id != run_id:
                return False
        return True

    def release_index(self) -> None:
        """Release the index of the rows: the audit reads the tables from the store, and needs the memory."""
        self.index = RowIndex(self.retry)
        self.written_by_others = UriIndex()
        self.streams = TarIndex()
        self._ended = {}

    def prune(self, unread: Sequence[str] = ()) -> int:
        """Remove the rows of all images that were not listed; return how many were removed.

        Args:
            unread: Parquet files that were listed and could not be read. Their rows are kept, since it is unknown which
                of their images still exist.
        """
        removed = 0
        for name, parts in self.streams.removals():
            for rows in self._rewritten(self._log(name), parts):
                removed += rows
                tick()
        for name in (LABELS_LOG, REJECTS_LOG):
            rewrites = {
                number: partial(_without, keys, unread=unread) for number, keys in self.index.unseen(name).items()
            }
            for rows in self._rewritten(self._log(name), rewrites):
                removed += rows
                tick()
        return removed

    def _empty(self, log: Log, carried: pa.Schema | None = None) -> pa.Table:
        """Return an empty table with all columns of a log: a reader of *.parquet may require the same columns in each file."""
        return self._columns(log, log.carried() if log.numbers else carried or pa.schema([])).empty_table()

    def _without_streams(self, name: str, number: int, table: pa.Table, footer: Footer) -> pa.Table:
        """Return the rows of a part that are not of images in streams; rows in streams are counted in `streams`."""
        in_stream = self.streams.take(name, number, table, footer.streams)
        return table.filter(pa.array(~in_stream)) if footer.streams else table

    def _log(self, name: str) -> Log:
        return self.labels if name == LABELS_LOG else self.rejects

    def _columns(self, log: Log, rows: pa.Schema) -> pa.Schema:
        """Return the columns of a log for rows with these carried columns."""
        if log is self.rejects:
            return with_carried(REJECTS, carried_fields(rows))
        return with_carried(self.label_columns, carried_fields(rows, self.carried))

    def _rows(self, log: Log, columns: list[str]) -> Iterator[tuple[int, pa.Table, Footer]]:
        for number, table, footer in log.read(columns):
            require_same(footer.fingerprint, self.fingerprint, log.uri(number))
            yield number, table, footer

    def _drop_rejects_of_labelled(self, surplus: Mapping[int, pa.Table]) -> None:
        """Remove the rejects of images that another writer labelled: two writers share no transaction over two logs."""
        duplicates = DuplicateParts(self.output)
        keys_of = {number: uri_keys(single_chunk(table["uri"])) for number, table in surplus.items()}
        for number, keys in keys_of.items():
            # Two writers never cause a second reject of an image. It is refused, like a second label.
            duplicates.note(REJECTS_LOG, number, surplus[number], self.index.are_rejects(keys))
        duplicates.refuse()
        if not self.read_only:
            self._remove(self.rejects, keys_of)

    def _remove_stale(self, keys: Keys) -> None:
        """Remove the old rows of these images from their parts."""
        for name, keys_of in self.index.take_stale(keys).items():
            self._remove(self._log(name), keys_of)

    def _remove(self, log: Log, keys_of: Mapping[int, Keys]) -> None:
        """Remove the rows of these keys from each part. A commit depends on it, so no `tick` may interrupt it."""
        for _ in self._rewritten(log, {number: partial(_without, keys) for number, keys in keys_of.items()}):
            pass

    def _rewritten(self, log: Log, change: Mapping[int, Callable[[pa.Table], pa.Table]]) -> Iterator[int]:
        """Rewrite parts; yield, after each part, how many rows were removed from it."""
        log.intents.add(change)  # in one request: `rewrite` would announce them one by one
        for number, change_part in change.items():
            yield log.rewrite(number, change_part)

    def _drop_written(self, rows: pa.Table, theirs: pa.Table) -> pa.Table:
        """Note the images of another writer's part; return the rows of all other images."""
        if len(theirs):
            self.written_by_others.add(uri_keys(single_chunk(theirs["uri"])))
        return self._not_yet_written(rows, uri_keys(single_chunk(rows["uri"])))

    def _not_yet_written(self, rows: pa.Table, keys: Keys) -> pa.Table:
        return rows.filter(pa.array(~self.written_by_others.contains(keys))) if len(self.written_by_others) else rows


def _without(keys: Keys, table: pa.Table, unread: Sequence[str] = ()) -> pa.Table:
    """Return the rows without those of these keys; rows of the files `unread` are kept."""
    removed = UriIndex()
    removed.add(keys)
    is_kept = ~removed.contains(uri_keys(single_chunk(table["uri"])))
    for file in unread:
        is_kept |= np.asarray(pc.starts_with(table["uri"], pattern=f"{file}#"))
    return table.filter(pa.array(is_kept))

"""Effects: a merged copy of the tables of a finished output: few large files in place of many small parts.

Each run of an output adds parts, so that a year of nights is ten thousand small files. The copy has the same rows in the same
order, in large row groups. The output stays as it is, and remains the ledger. The copy is for readers: no run can continue it,
since its files are not named like parts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from imgbatch.concurrency.monitor import tick
from imgbatch.errors import AuditError, InputError, OutputChangedError, UsageError
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.fingerprint import require_same
from imgbatch.ledger.part_file import open_writer
from imgbatch.ledger.part_reader import common_columns, parquet_files, read_each
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.ledger.success_marker import SUCCESS, read_success
from imgbatch.schema import FORMAT_VERSION
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted

GROUP_ROWS, GROUP_BYTES = 131_072, 64 << 20
"""Maximum number of rows in a row group, and about how many bytes they have in memory. DuckDB reads 122,880 rows at a time."""
FILE_BYTES = 128 << 20
"""A file that has become larger than this ends with its row group."""


@dataclass(frozen=True, slots=True)
class CompactionSummary:
    """The counts of a merged copy."""

    output: str
    copy: str
    rows: Mapping[str, int]
    """The number of rows by table."""
    parts: int
    """The number of parts that were read."""
    files: int
    """The number of files that were written."""

    def __str__(self) -> str:
        return (
            f"{counted(self.rows[LABELS_LOG], 'label')} and {counted(self.rows[REJECTS_LOG], 'reject')} of {self.output} "
            f"copied from {counted(self.parts, 'part')} into {counted(self.files, 'file')}: {self.copy}"
        )


def compact(output_uri: str, to: str, stores: Stores) -> CompactionSummary:
    """Write a merged copy of the tables of a finished output.

    Args:
        output_uri: the output of a classification that has `_SUCCESS`.
        to: an empty folder outside the output.
        stores: the stores of both.

    Raises:
        InputError: the output is not finished.
        UsageError: `to` is in the output, or is not empty.
        OutputChangedError: a run has changed the output meanwhile.
        AuditError: the copy does not have as many rows as `_SUCCESS` says.
    """
    output, copy = Folder(stores, absolute(output_uri)), Folder(stores, absolute(to))
    success = read_success(output)
    if success is None:
        raise InputError(
            f"{output.uri} has no _SUCCESS: no run has finished there, or one is running; run classify to its end first"
        )
    _require_free(output, copy)
    tables = [_Table(output, copy, name, str(success.get("run_id"))) for name in (LABELS_LOG, REJECTS_LOG)]
    for table in tables:
        table.write()
    if read_success(output) != success:
        raise OutputChangedError(
            f"a run has changed {output.uri} meanwhile, so that {copy.uri} may mix two states: delete it, and compact again "
            "when that run has ended"
        )
    rows = {table.name: table.rows for table in tables}
    _require_counts(output, copy, success, rows)
    parts, files = sum(table.parts for table in tables), sum(len(table.file_rows) for table in tables)
    summary = CompactionSummary(output.uri, copy.uri, rows, parts, files)
    copy.create(SUCCESS, json.dumps({**asdict(summary), "run_id": success.get("run_id")}, indent=2).encode())
    return summary


def _require_free(output: Folder, copy: Folder) -> None:
    if f"{copy.uri}/".startswith(f"{output.uri}/"):
        raise UsageError(f"--to {copy.uri} is in the output {output.uri}: choose a folder outside of it")
    existing = next((batch["path"][0].as_py() for batch in copy.list_objects() if len(batch)), None)
    if existing is not None:
        raise UsageError(f"--to {copy.uri} is not empty, it has {existing}: choose another folder, or delete this one")


def _require_counts(output: Folder, copy: Folder, success: Mapping[str, Any], rows: Mapping[str, int]) -> None:
    counts = success.get("counts")
    expected = (
        counts["listed"] + counts["kept"] if isinstance(counts, dict) and {"listed", "kept"} <= counts.keys() else -1
    )
    if sum(rows.values()) != expected:
        raise AuditError(
            f"{sum(rows.values()):,} rows in {output.uri}, but its _SUCCESS counts {expected:,}: run `imgbatch verify "
            f"{output.uri}`, and delete {copy.uri}, which is incomplete"
        )


@dataclass
class _Table:
    """One table and its copy."""

    output: Folder
    copy: Folder
    name: str
    run_id: str
    """The run that `_SUCCESS` names."""
    rows: int = 0
    """The number of rows that were read."""
    parts: int = 0
    """The number of parts that were read."""
    file_rows: list[int] = field(default_factory=list)
    """The number of rows in each file of the copy."""

    def write(self) -> None:
        """Write the copy, and count its rows in the files.

        Raises:
            AuditError: a file in the store has another number of rows than were written.
        """
        console.step(f"copying {self.name}")
        log = Log(self.output.folder(self.name))
        log.scan()
        self.parts = len(log.numbers)
        columns, fingerprint = common_columns(log.folder)
        if not self.parts:
            return
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "run_id": self.run_id,
            "fingerprint": json.dumps(fingerprint, sort_keys=True),
            "compacted_from": self.output.uri,
        }
        writer = _Writer(columns.schema, metadata, self._put)
        others = [name for name in columns.schema.names if name != "uri"]
        for _, table, footer in log.read(["uri"], others):
            tick()
            require_same(footer.fingerprint, fingerprint, log.folder.uri)
            self.rows += len(table)
            writer.add(columns.cast(table))
        writer.close()
        self._require_written()

    def _put(self, data: bytes, rows: int) -> None:
        self.file_rows.append(rows)
        self.copy.folder(self.name).create(f"{len(self.file_rows):06d}.parquet", data)

    def _require_written(self) -> None:
        folder = self.copy.folder(self.name)
        found = list(read_each(folder, parquet_files(folder), lambda uri, file: file.metadata.num_rows))
        if found != self.file_rows or sum(found) != self.rows:
            raise AuditError(
                f"{folder.uri} has files of {found} rows, but {self.rows:,} rows were written, {self.file_rows}: did another "
                f"command write there? Delete {self.copy.uri}, and run the same command again"
            )


class _Writer:
    """Collects rows into row groups, and row groups into files."""

    def __init__(self, schema: pa.Schema, metadata: Mapping[str, str], put: Callable[[bytes, int], None]) -> None:
        """Prepare to write.

        Args:
            schema: of the rows.
            metadata: the key-value metadata of each file.
            put: receives each file and its number of rows.
        """
        self._schema, self._metadata, self._put = schema, metadata, put
        self._tables: list[pa.Table] = []
        self._buffered = self._buffered_bytes = self._rows = self._files = 0
        self._open()

    def _open(self) -> None:
        self._sink = io.BytesIO()
        self._file = open_writer(self._sink, self._schema, self._metadata)
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        while len(table):
            row_bytes = max(1, table.nbytes // len(table))
            free = min(GROUP_ROWS - self._buffered, max(1, (GROUP_BYTES - self._buffered_bytes) // row_bytes))
            rows, table = table.slice(0, free), table.slice(free)
            self._tables.append(rows)
            self._buffered += len(rows)
            self._buffered_bytes += len(rows) * row_bytes
            if self._buffered >= GROUP_ROWS or self._buffered_bytes + row_bytes > GROUP_BYTES:
                self._write_group()
            if self._rows and self._sink.tell() >= FILE_BYTES:
                self._end_file()
                self._open()

    def close(self) -> None:
        """Write the remaining rows; a table without rows is one file without rows, so that readers find its columns."""
        self._write_group()
        if self._rows or not self._files:
            self._end_file()

    def _write_group(self) -> None:
        if self._buffered:
            group = pa.concat_tables(self._tables).replace_schema_metadata(self._file.schema.metadata)
            self._file.write_table(group, row_group_size=self._buffered)
            self._rows += self._buffered
            self._tables, self._buffered, self._buffered_bytes = [], 0, 0

    def _end_file(self) -> None:
        self._file.close()
        self._put(self._sink.getvalue(), self._rows)
        self._files += 1

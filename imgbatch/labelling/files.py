"""Effects: the file of an export, written row by row to a temporary file of this machine, and then created in a store."""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from imgbatch.errors import Exists, UsageError
from imgbatch.labelling.json_values import plain
from imgbatch.ledger.common_columns import as_text
from imgbatch.schema import single_chunk
from imgbatch.storage.stores import Folder, Stores

MANIFESTS = (".csv", ".jsonl", ".parquet")
TASKS = (".json", ".jsonl")
"""The suffixes of the two formats."""

_JSON_ROWS = 1_000


class RowWriter(Protocol):
    """Writes tables to a file, one after the other."""

    def add(self, rows: pa.Table) -> None:
        """Write rows; all tables have the same columns."""

    def close(self) -> None:
        """Write the end of the file, which stays open."""


class _Csv:
    def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
        fields = [field.with_type(pa.string()) if _is_odd(field.type) else field for field in schema]
        self._schema = pa.schema(fields)
        self._writer = pa_csv.CSVWriter(file, self._schema)

    def add(self, rows: pa.Table) -> None:
        """Write rows; lists, structs and bytes as JSON."""
        columns = [
            as_text(single_chunk(rows[field.name]))
            if rows.schema.field(field.name).type != field.type
            else rows[field.name]
            for field in self._schema
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        """Write the rows that are buffered."""
        self._writer.close()


def _is_odd(type_: pa.DataType) -> bool:
    """Return whether a CSV cannot hold values of a type."""
    return bool(pa.types.is_nested(type_) or pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


class _Parquet:
    def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")

    def add(self, rows: pa.Table) -> None:
        """Write rows as a row group."""
        if len(rows):
            self._writer.write_table(rows)

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()


class JsonWriter:
    """Writes one JSON value for each row, on a line of its own: as an array, or as JSON Lines."""

    def __init__(self, file: BinaryIO, convert: Callable[[dict[str, Any]], Any], *, array: bool) -> None:
        self._file, self._convert, self._array, self._count = file, convert, array, 0

    def add(self, rows: pa.Table) -> None:
        """Write rows."""
        for batch in rows.to_batches(max_chunksize=_JSON_ROWS):
            for row in batch.to_pylist():
                text = json.dumps(self._convert(row), ensure_ascii=False, allow_nan=False)
                separator = ",\n" if self._count else "[\n"
                self._file.write((f"{separator}{text}" if self._array else f"{text}\n").encode())
                self._count += 1

    def close(self) -> None:
        """End the array."""
        if self._array:
            self._file.write(b"\n]\n" if self._count else b"[]\n")


def manifest_writer(file: BinaryIO, suffix: str, schema: pa.Schema) -> RowWriter:
    """Return a writer of a manifest.

    Args:
        suffix: one of MANIFESTS.
        schema: of the rows.
    """
    if suffix == ".jsonl":
        return JsonWriter(file, plain, array=False)
    return _Csv(file, schema) if suffix == ".csv" else _Parquet(file, schema)


def suffix_of(uri: str, accepted: tuple[str, ...], what: str) -> str:
    """Return the suffix of a file.

    Raises:
        UsageError: it is none of the accepted ones.
    """
    lower = uri.lower()
    for suffix in accepted:
        if lower.endswith(suffix):
            return suffix
    raise UsageError(f"--to {uri}: the name of {what} ends with {', '.join(accepted[:-1])} or {accepted[-1]}")


def require_absent(stores: Stores, uri: str) -> None:
    """Refuse a file that exists.

    Raises:
        UsageError: it exists.
    """
    folder, name = _place(stores, uri)
    if folder.exists(name):
        raise _exists(uri)


def write_file(stores: Stores, uri: str, fill: Callable[[BinaryIO], None]) -> None:
    """Create a file in a store from what `fill` writes into a temporary file.

    Raises:
        UsageError: it exists. It is never overwritten.
    """
    folder, name = _place(stores, uri)
    with tempfile.TemporaryFile(prefix="imgbatch-") as file:
        fill(file)
        file.flush()
        with _mapped(file) as content:
            try:
                folder.create(name, content)
            except Exists as error:
                raise _exists(uri) from error


@contextmanager
def _mapped(file: BinaryIO) -> Iterator[bytes]:
    """Provide the content of a file without reading it into memory."""
    if not file.seek(0, 2):  # an empty file cannot be mapped
        yield b""
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield cast(bytes, content)  # stores write any buffer


def _place(stores: Stores, uri: str) -> tuple[Folder, str]:
    folder, _, name = uri.rpartition("/")
    return Folder(stores, folder), name


def _exists(uri: str) -> UsageError:
    return UsageError(f"{uri} exists, and is not overwritten: choose another name, or delete it")

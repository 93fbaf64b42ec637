"""Images that a manifest names: a CSV, Parquet or JSON Lines file with a `uri` column, read as a stream.

Relative URIs resolve against the manifest's place. `size` and `etag` are used where they are there; every further column
travels along as `input_NAME`: with its type from Parquet, as text from CSV and JSON Lines, which have no types.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from imgbatch.errors import InputError
from imgbatch.listing import Found
from imgbatch.schema import CARRIED, LISTING
from imgbatch.storage import Stores, join, scheme
from imgbatch.storage.base import unquoted_all

SUFFIXES = (".csv", ".parquet", ".jsonl", ".ndjson")
_OWN = ("uri", "size", "etag")
_ROWS = 10_000
_ANYWHERE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "http", "https")


class Manifest:
    """One manifest file.

    Raises:
        InputError: it has no `uri` column, or is not what its name says.
    """

    def __init__(self, stores: Stores, uri: str, schemes: str = "auto") -> None:
        self._stores, self._uri = stores, uri
        # Whoever wrote a manifest in a bucket has no business with the files of the machine that reads it.
        chosen = (*_ANYWHERE, scheme(uri)) if schemes == "auto" else (part.strip() for part in schemes.split(","))
        self._schemes = frozenset(chosen)
        self._folder = uri.rpartition("/")[0]
        first = next(self._rows(), None)
        self.carried: pa.Schema = pa.schema([])
        if first is None:
            return
        names = first.schema.names
        if "uri" not in names:
            raise InputError(f"{uri} has no column 'uri'; it has: {', '.join(names) or 'none'}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{uri} has more than one column {', '.join(map(repr, twice))}")
        self.carried = pa.schema(
            [(CARRIED + entry.name, _plain(entry.type)) for entry in first.schema if _travels(entry)]
        )

    def found(self) -> Iterator[Found]:
        """Yield the rows that name an image; those with an empty `uri` are counted as ignored."""
        for rows in self._rows():
            try:
                named = rows.filter(pc.fill_null(pc.not_equal(rows["uri"].cast(pa.string()), ""), False))
                listed = [self._listed(batch) for batch in named.combine_chunks().to_batches()]
            except pa.ArrowException as error:
                raise InputError(f"{self._uri}: {error}") from error
            yield from map(Found, listed)
            if len(named) < len(rows):
                yield Found(_nothing(), ignored=len(rows) - len(named))

    def _listed(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        uris = [self._joined(name) for name in rows["uri"].cast(pa.string()).to_pylist()]
        columns = {
            "uri": pa.array(uris, pa.string()),
            "size": self._sizes(rows),
            "etag": unquoted_all(_text(rows, "etag")),
            "last_modified": pa.nulls(len(rows), LISTING.field("last_modified").type),
            "container": pa.nulls(len(rows), pa.string()),
        }
        for entry in self.carried:
            columns[entry.name] = rows[entry.name.removeprefix(CARRIED)].cast(entry.type)
        return pa.record_batch(columns, schema=pa.schema([*LISTING, *self.carried]))

    def _joined(self, name: str) -> str:
        uri = join(self._folder, name)
        if scheme(uri) not in self._schemes:
            raise InputError(
                f"{self._uri} names {uri[:200]!r}; it may name {', '.join(sorted(self._schemes))}. If it is to be trusted, "
                f"--set source.schemes={','.join(sorted({*self._schemes, scheme(uri)}))}"
            )
        return uri

    def _sizes(self, rows: pa.RecordBatch) -> pa.Array:
        text = pc.utf8_trim_whitespace(_text(rows, "size"))
        # Tables that know no integer without a value write 123.0 and nan.
        text = pc.replace_substring_regex(text, pattern=r"\.0+$", replacement="")
        unknown = pc.fill_null(pc.match_substring_regex(text, pattern=r"^(-.*|nan|NaN|)$"), True)
        try:
            return pc.if_else(unknown, None, text).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{self._uri}: column 'size' holds something that is no number of bytes: {error}"
            ) from error

    def _rows(self) -> Iterator[pa.Table]:
        suffix = self._uri.rpartition(".")[2].lower()
        read = {"csv": _csv, "parquet": _parquet}.get(suffix, _json_lines)
        with self._stores.open(self._uri) as file:
            try:
                yield from read(file)
            except (ValueError, RecursionError, pa.ArrowException) as error:  # JSON and Unicode errors are ValueErrors
                raise InputError(f"{self._uri} cannot be read as {suffix}: {error}") from error


def _nothing() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=LISTING)


def _text(rows: pa.RecordBatch, name: str) -> pa.Array:
    return rows[name].cast(pa.string()) if name in rows.schema.names else pa.nulls(len(rows), pa.string())


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _travels(entry: pa.Field) -> bool:
    """Return whether a column is carried: pixels are not."""
    kind = entry.type
    holds_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)
    return entry.name not in _OWN and not holds_bytes


def _csv(file: BinaryIO) -> Iterator[pa.Table]:
    newlines = pa_csv.ParseOptions(newlines_in_values=True)
    header = file.readline()
    if not header.strip():
        return
    file.seek(0)
    names = pa_csv.read_csv(pa.BufferReader(header), parse_options=newlines).schema.names
    # Types guessed from the first rows would fail on a later one: everything stays text.
    as_text = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    counted = _CountedQuotes(file)
    with pa_csv.open_csv(pa.PythonFile(counted, "r"), parse_options=newlines, convert_options=as_text) as batches:
        for batch in batches:
            yield pa.Table.from_batches([batch])
    if counted.quotes % 2:  # all lines behind it would be one value of one row
        raise ValueError("a quote is not closed, or stands in a value without quotes around it")


class _CountedQuotes:
    """A file that counts the quotes that are read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.quotes, self.closed = file, 0, False

    def read(self, size: int = -1) -> bytes:
        """Read as the file does."""
        data = self._file.read(size)
        self.quotes += data.count(b'"')
        return data

    def close(self) -> None:
        """Leave closing to whoever opened the file."""
        self.closed = True


def _parquet(file: BinaryIO) -> Iterator[pa.Table]:
    parquet = pq.ParquetFile(file)
    columns = [entry.name for entry in parquet.schema_arrow if entry.name in _OWN or _travels(entry)]
    if "uri" not in columns:
        yield parquet.schema_arrow.empty_table()
        return
    for batch in parquet.iter_batches(_ROWS, columns=columns, use_threads=False):
        yield pa.Table.from_batches([batch])


def _json_lines(file: BinaryIO) -> Iterator[pa.Table]:
    names: list[str] | None = None
    while lines := list(islice(file, _ROWS)):
        rows = [json.loads(line) for line in lines if line.strip()]
        if any(not isinstance(row, dict) for row in rows):
            raise ValueError("a line is not an object")
        if not rows:
            continue
        # The columns are those of the first rows; a key that appears later alone cannot become one any more.
        names = names or list(dict.fromkeys(name for row in rows for name in row))
        yield pa.table({name: pa.array([_as_text(row.get(name)) for row in rows], pa.string()) for name in names})


def _as_text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)

"""Effects: lists of images as streams of rows: JSON Lines, a JSON array or Parquet; `csv_rows` has CSV and TSV.

Text is UTF-8, or UTF-16 with a byte order mark. It may be compressed with gzip, whatever its name.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.decode.other_kinds import describe_placeholder
from imgbatch.errors import InputError
from imgbatch.sources import label_studio, spelling
from imgbatch.sources.columns import TableColumns
from imgbatch.sources.csv_rows import MAX_LINE, Rows, csv_rows
from imgbatch.sources.naming import Naming

FORMS = {
    **{".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"},
    **{".csv.gz": "csv", ".tsv.gz": "tsv", ".jsonl.gz": "jsonl", ".ndjson.gz": "jsonl", ".json.gz": "json"},
    ".parquet": "parquet",
}
SUFFIXES = tuple(FORMS)
READABLE = ".csv, .tsv, .jsonl, .ndjson and .json (an array of objects), also with .gz, and .parquet"
"""The suffixes of lists, for messages."""

UNREADABLE = (
    *(".txt", ".lst", ".list", ".dat", ".log", ".xlsx", ".xls", ".xlsm", ".ods", ".xml", ".yaml", ".yml", ".toml", ".html"),
    *(".arrow", ".feather", ".ipc", ".avro", ".orc", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".rec", ".idx"),
    *(".tfrecord", ".tfrecords", ".mdb", ".lmdb", ".db", ".sqlite", ".sqlite3", ".duckdb", ".psv"),
)  # fmt: skip
"""Suffixes of lists and tables in other formats, none of which are images."""

MAX_JSON_CHARS = 256 << 20
"""Maximum size of a JSON array, which is parsed as a whole."""

_ROWS, _BATCH_CHARS = 10_000, 8 << 20
_BUFFER = 1 << 20


def form_by_name(uri: str) -> str | None:
    """Return the form of a list according to its suffix, None if the suffix is unknown.

    >>> form_by_name("s3://b/list.CSV.gz"), form_by_name("list.txt")
    ('csv', None)
    """
    lower = uri.lower()
    return next((form for suffix, form in FORMS.items() if lower.endswith(suffix)), None)


def read_rows(file: BinaryIO, uri: str, naming: Naming) -> Iterator[Rows]:
    """Yield the rows of a list in batches. For CSV and Parquet, the first batch is empty and has the columns.

    A batch has the columns of its rows, under trimmed names.

    Raises:
        InputError: naming the file and, if possible, the line.
        ValueError, EOFError, OSError: the file is damaged.
    """
    form = form_by_name(uri)
    if form == "parquet":
        yield from _parquet(file, uri)
        return
    buffered = io.BufferedReader(_Unclosed(file), _BUFFER)
    if form is None and buffered.peek(4).startswith(b"PAR1"):
        file.seek(0)
        yield from _parquet(file, uri)
        return
    text, first = _text(buffered)
    if kind := describe_placeholder(first.encode(errors="replace")):
        raise InputError(f"{uri} is not a list of images, but {kind}")
    if form is None or form == "json":
        first_char = first.lstrip()[:1]
        if first_char == "[":
            yield from _json_array(text, uri, naming)
            return
        if form is None:
            form = "jsonl" if first_char == "{" else "csv"
    if form in ("csv", "tsv"):
        yield from csv_rows(text, "\t" if form == "tsv" else ",", uri, naming)
    elif form == "jsonl":
        yield from _json_lines(text, uri, naming)
    else:
        yield from _json_lines(_objects_in_lines(text, uri), uri, naming)


class _Unclosed(io.RawIOBase):
    """A file that stays open when the buffers around it are closed. The code that opened it closes it."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file = file

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer and return the number of bytes."""
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _text(file: io.BufferedReader[Any]) -> tuple[io.TextIOWrapper, str]:
    """Return a file as text, and its first characters. Invalid bytes become lone surrogates, so that messages can name the
    line."""
    if file.peek(2)[:2] == b"\x1f\x8b":
        file = io.BufferedReader(_Unclosed(gzip.GzipFile(fileobj=file)), _BUFFER)
    head = file.peek(4)
    encoding = "utf-8-sig"
    if head[:4] in (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"):
        encoding = "utf-32"
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    first = head[:4096].decode(encoding, "replace")
    return io.TextIOWrapper(file, encoding, "surrogateescape", newline=""), first


def _parquet(file: BinaryIO, uri: str) -> Iterator[Rows]:
    parquet = pq.ParquetFile(file)
    columns = TableColumns(parquet.metadata, uri)
    if columns.binary:
        parquet = pq.ParquetFile(file, metadata=parquet.metadata, read_dictionary=columns.binary)
    kinds = columns.carried()
    schema = pa.schema(list(kinds.items()))
    yield Rows(pa.RecordBatch.from_pylist([], schema=schema))
    first = 1
    for rows in parquet.iter_batches(_ROWS, columns=[columns.raw[name] for name in kinds], use_threads=False):
        values = [columns.values(rows, name, kind) for name, kind in kinds.items()]
        yield Rows(pa.RecordBatch.from_arrays(values, schema=schema), _numbered("row", first))
        first += len(rows)


def _numbered(what: str, first: int) -> Callable[[int], str]:
    return lambda at: f"{what} {first + at:,}"


def _json_lines(text: io.TextIOBase | Iterator[str], uri: str, naming: Naming) -> Iterator[Rows]:
    objects = _Objects(uri, naming)
    number = 0
    lines = iter(lambda: text.readline(MAX_LINE), "") if isinstance(text, io.TextIOBase) else text
    for line in lines:
        number += 1
        if len(line) >= MAX_LINE and not line.endswith(("\n", "\r")):
            raise InputError(
                f"{uri}, line {number:,} is longer than {MAX_LINE >> 20} MB. JSON Lines has one object per line"
            )
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{uri} cannot be read as JSON Lines: line {number:,}: {error}") from error
        objects.add(value, f"line {number:,}", len(line))
        if objects.full:
            yield objects.batch()
    if not objects.empty:
        yield objects.batch()


def _json_array(text: io.TextIOBase, uri: str, naming: Naming) -> Iterator[Rows]:
    content = text.read(MAX_JSON_CHARS + 1)
    if len(content) > MAX_JSON_CHARS:
        raise InputError(
            f"{uri} is a JSON array of more than {MAX_JSON_CHARS >> 20} MB, which would have to be in memory as a whole. Write "
            "JSON Lines, with one object per line (.jsonl)"
        )
    try:
        values = json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{uri} cannot be read as JSON: {error}") from error
    objects = _Objects(uri, naming)
    for number, value in enumerate(values, 1):
        objects.add(value, f"entry {number:,}", 0)
        if objects.full:
            yield objects.batch()
    if not objects.empty:
        yield objects.batch()


def _objects_in_lines(text: io.TextIOBase, uri: str) -> Iterator[str]:
    """Yield the lines of a .json file that is not an array but JSON Lines, as BigQuery and Spark write it."""
    first = text.readline(MAX_LINE)
    try:
        is_object = not first.strip() or isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise InputError(
            f"{uri} is not a list of images: a .json file must have an array of objects, or one object per line. Supported "
            f"lists are {READABLE}"
        )
    while first:
        yield first
        first = text.readline(MAX_LINE)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
        raise ValueError(f"an object has the key {repeated!r} more than once")
    return value


class _Objects:
    """Collects JSON objects into batches of text columns. Each key is a column of its batch and of all later ones."""

    def __init__(self, uri: str, naming: Naming) -> None:
        self._uri, self._naming = uri, naming
        self._first = True
        self._names: dict[str, str] = {}
        """The trimmed names by the keys."""
        self._rows: list[dict[str, Any]] = []
        self._places: list[str] = []
        self._annotated = False
        self._chars = 0

    @property
    def full(self) -> bool:
        """Whether the batch is large enough."""
        # The first batch has one row, so that the columns are known without parsing more.
        return self._first or len(self._rows) >= _ROWS or self._chars >= _BATCH_CHARS

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last batch."""
        return not self._rows

    def add(self, value: Any, place: str, chars: int) -> None:
        """Add one object."""
        if not isinstance(value, dict):
            raise InputError(f"{self._uri} cannot be read as a list of images: {place} is not an object")
        if label_studio.is_task(value):
            try:
                value, self._annotated = label_studio.row_of(value, self._naming.label), True
            except ValueError as error:
                raise InputError(f"{self._uri}, {place} (task {value.get('id')}): {error}") from error
        for key in value:
            if key not in self._names:
                self._names[key] = spelling.normalise(key)
        self._rows.append(value)
        self._places.append(place)
        self._chars += chars

    def batch(self) -> Rows:
        """Return the objects that were added since the last batch."""
        columns: dict[str, list[str]] = {}
        for key, name in self._names.items():
            if name:
                columns.setdefault(name, []).append(key)
        places = self._places
        naming = self._naming.resolve(list(columns))
        if naming.template is None and naming.column in columns:
            self._require_text(naming.column, columns[naming.column])
        arrays = {name: self._column(name, keys) for name, keys in columns.items()}
        count, self._first = len(self._rows), False
        self._rows, self._places, self._chars = [], [], 0
        if not arrays:  # a record batch without columns has no length
            arrays = {"": pa.nulls(count, pa.string())}
        return Rows(pa.record_batch(arrays), places.__getitem__, annotated=self._annotated)

    def _require_text(self, name: str, keys: Sequence[str]) -> None:
        for at, row in enumerate(self._rows):
            value = self._value(row, keys, at)
            if value is not None and not isinstance(value, str):
                raise InputError(
                    f"{self._uri}, {self._places[at]}: {name!r} is {json.dumps(value)[:100]}, but must be text"
                )

    def _column(self, name: str, keys: Sequence[str]) -> pa.Array:
        values = [self._value(row, keys, at) for at, row in enumerate(self._rows)]
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        try:
            return pa.array(texts, pa.string())
        except UnicodeEncodeError as error:
            at = next(at for at, text in enumerate(texts) if text is not None and not _is_unicode(text))
            raise InputError(
                f"{self._uri} cannot be read as JSON: {self._places[at]}: the value of {name!r} is not Unicode text. Save "
                "the file as UTF-8"
            ) from error

    def _value(self, row: dict[str, Any], keys: Sequence[str], at: int) -> Any:
        if len(keys) == 1:
            return row.get(keys[0])
        present = [key for key in keys if key in row]
        if len(present) > 1:
            raise InputError(
                f"{self._uri}, {self._places[at]}: the keys {present[0]!r} and {present[1]!r} are the same name, apart from "
                "spaces around it and the Unicode form: rename one"
            )
        return row[present[0]] if present else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

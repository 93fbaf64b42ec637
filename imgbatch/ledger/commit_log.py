"""Effects: a log of numbered parts: Parquet files that are created one after the other, each exactly once.

Assumption: `Store.create` is atomic (If-None-Match on the server, a hard link on disks). Then two writers can never both
hold a number, and whoever finds one taken has to read that part before he tries the next: every writer knows all rows
before his own. Where a store has no conditional creation, one writer at a time is the user's duty.
"""

from __future__ import annotations

import io
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.concurrency.prefetch import prefetch_calls
from imgbatch.errors import Conflict, Exists, NotFound, OutputChangedError, OutputError
from imgbatch.ledger.rewrite_intents import Announced
from imgbatch.schema import EMBEDDING, FORMAT_VERSION, carried_fields
from imgbatch.storage.stores import Folder

_NAME = re.compile(r"part-(\d{8})\.parquet")
_READS_AHEAD = 4
_MOST_CONFLICTS = 1000
_MOST_VANISHED, _VANISHED_WAIT_S = 20, 0.5
_MOST_MISSING, _SHOWN = 1000, 3
_COUNTED = {
    "uri",
    "label",
    "label_id",
    "score",
    "width",
    "height",
    "run_id",
    "model",
    "stage",
    "reason",
    "passing",
    "attempts",
}
"""Columns whose row groups have statistics, which tell of nulls without the column being read: some 600 bytes a part."""

log = logging.getLogger(__name__)

DEFAULTS: Mapping[str, Any] = {
    "top_k": 5,
    "answer.min_score": 0.5,
    "output.embeddings": False,
    "output.columns": [],
}
"""What a fingerprint means that lacks one of these keys; of all other keys, null. It describes files that exist: a value
stays as it is if the default of the option changes, and a new option needs an entry only if null does not mean "as before"."""


@dataclass(frozen=True, slots=True)
class Footer:
    """What a part says of itself, in the Parquet file's key-value metadata."""

    run_id: str
    fingerprint: Mapping[str, Any]
    nonce: str = ""
    """Drawn for each attempt to create a part: it tells our own retried PUT from another writer's."""
    seal: bool = False
    """An empty part that takes a number, so that a late PUT of a dead run cannot have it."""
    shards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """How far tars are read (see `shards`)."""

    def metadata(self) -> dict[str, str]:
        """Return the footer as key-value metadata."""
        return {
            "format_version": str(FORMAT_VERSION),
            "run_id": self.run_id,
            "fingerprint": json.dumps(self.fingerprint, sort_keys=True),
            "nonce": self.nonce,
            "seal": json.dumps(self.seal),
            "shards": json.dumps(self.shards),
        }


def encode(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """Return a part as Parquet bytes."""
    sink = io.BytesIO()
    plain = [name for name in ("uri", "etag") if name in table.column_names]
    # 47,000 rows/s of 1,280 numbers, where zstd gives 27,000. BYTE_STREAM_SPLIT is smaller, but DuckDB cannot read it.
    quick = {name: "snappy" if name.startswith(f"{EMBEDDING}.") else "zstd" for name in _leaves(table.schema)}
    table = table.replace_schema_metadata(dict(metadata))
    counted = [name for name in table.column_names if name in _COUNTED]
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression=quick,
        use_dictionary=[name for name in _leaves(table.schema) if name not in plain and quick[name] == "zstd"],
        write_statistics=counted,
    ) as writer:
        if len(table):  # a row group of 0 rows is valid Parquet, but Hugging Face's `datasets` fails on it
            writer.write_table(table)
    return sink.getvalue()


def decode(
    data: bytes, uri: str, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> tuple[pa.Table, Footer]:
    """Return the rows of a part, all columns or some, with those of the optional ones that it has, and its footer.

    Raises:
        OutputError: the bytes are no part of ours, are torn, or come from a newer version.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        footer = _footer(file.metadata.metadata or {}, uri)
        if missing := set(columns or ()) - set(file.schema_arrow.names):
            raise OutputError(f"{uri} lacks the columns {', '.join(sorted(missing))}: move it away, then run again")
        if columns is not None:
            columns = [*columns, *(name for name in optional if name in file.schema_arrow.names)]
        return file.read(columns=columns, use_threads=False), footer
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"{uri} is not a whole Parquet file ({error}); it is not counted as done: move it away, then run again"
        ) from error


def _footer(metadata: Mapping[bytes, bytes], uri: str) -> Footer:
    foreign = f"{uri} was not written by imgbatch: move it away, or choose another --output"
    try:
        version = int(metadata[b"format_version"])
        if version > FORMAT_VERSION:  # before anything else, since that may have changed
            raise OutputError(
                f"{uri} has format version {version}, this imgbatch knows {FORMAT_VERSION}: use a newer imgbatch"
            )
        fingerprint = json.loads(metadata[b"fingerprint"])
        footer = Footer(
            run_id=metadata[b"run_id"].decode(),
            fingerprint=fingerprint,
            nonce=metadata[b"nonce"].decode(),
            seal=json.loads(metadata[b"seal"]),
            shards=json.loads(metadata[b"shards"]),
        )
    except (KeyError, ValueError) as error:
        raise OutputError(foreign) from error
    if not isinstance(fingerprint, dict):
        raise OutputError(foreign)
    return footer


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the paths of the leaf columns, as Parquet names them."""
    names: list[str] = []

    def visit(path: str, kind: pa.DataType) -> None:
        if pa.types.is_struct(kind):
            for field in kind:
                visit(f"{path}.{field.name}", field.type)
        elif pa.types.is_list(kind):
            visit(f"{path}.list.element", kind.value_type)
        else:
            names.append(path)

    for each in schema:
        visit(each.name, each.type)
    return names


class Log:
    """The parts of one table, in the order of their numbers."""

    def __init__(self, folder: Folder, numbers: Sequence[int] = ()) -> None:
        self.folder = folder
        self.numbers: list[int] = [*numbers]
        self._empty_groups: list[int] = []
        output, _, table = folder.uri.rpartition("/")
        self.announced = Announced(Folder(folder.stores, f"{output}/runs"), f"rewriting-{table}.json")

    @property
    def next(self) -> int:
        """The number that the next part would take."""
        return self.numbers[-1] + 1 if self.numbers else 1

    @property
    def names(self) -> list[str]:
        """The names of the parts."""
        return [_name(number) for number in self.numbers]

    def uri(self, number: int) -> str:
        """Return the URI of a part."""
        return self.folder.at(_name(number))

    def scan(self) -> None:
        """Look which parts there are.

        Raises:
            OutputError: something that is no part of ours lies among them; hidden files are passed over.
            OutputChangedError: parts are gone that were there before.
        """
        numbers, others = [], []
        for name in self.folder.names():
            if match := _NAME.fullmatch(name):
                numbers.append(int(match[1]))
            else:
                others.append(name)
        self.refuse(others)
        if gone := sorted(set(self.numbers) - set(numbers)):
            raise OutputChangedError(
                f"{len(gone):,} of the {len(self.numbers):,} parts in {self.folder.uri} that this run has seen are gone, "
                f"{_name(gone[0])} for one: they were deleted while it was at work. Run the same command again"
            )
        self.numbers = sorted(numbers)

    def refuse(self, others: Sequence[str]) -> None:
        """Refuse what lies among the parts and is none; hidden files are passed over.

        Raises:
            OutputError: naming the first one.
        """
        for name in others:
            if not is_hidden(name):
                raise OutputError(
                    f"{self.folder.at(name)} is not a part of ours: move it away, or choose another --output"
                )

    def inspect(self, number: int, data: bytes, footer: Footer) -> None:
        """Do nothing; `read` calls it with the bytes of each part, in the order of their numbers."""

    @property
    def missing(self) -> list[int]:
        """The numbers that are missing among those of the parts: every run takes the next one, and none is ever given up."""
        return sorted({*range(1, self.next)}.difference(self.numbers))

    def warn_of_gaps(self) -> None:
        """Say which parts are missing.

        Raises:
            OutputError: more than anybody loses; then the last part has a number that no run gave it.
        """
        if self.next - 1 - len(self.numbers) > _MOST_MISSING:
            before = max((first for first, last in pairwise([0, *self.numbers]) if last - first > 1), default=0)
            raise OutputError(
                f"{self.uri(self.numbers[-1])}: {self.next - 1 - len(self.numbers):,} numbers of parts are missing before it, "
                f"from {before + 1} on, which no run leaves: move it away, then run again"
            )
        if self.missing:
            names = ", ".join(self.uri(number) for number in self.missing[:_SHOWN])
            log.warning(
                "missing: %s%s. Rows of images that are still in the input are made again",
                names,
                f", and {len(self.missing) - _SHOWN} more parts" if len(self.missing) > _SHOWN else "",
            )

    def fill(self, table: pa.Table, footer: Footer) -> None:
        """Create the parts that are missing with these rows."""
        for number in self.missing:
            with suppress(Exists):  # another run does the same
                signed = replace(footer, nonce=uuid.uuid4().hex)
                self.folder.create(_name(number), encode(table, signed.metadata()))
        self.numbers = [*range(1, self.next)]  # no `scan`: parts that another writer added behind are still to be read

    def read(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, pa.Table, Footer]]:
        """Yield (number, the columns and those of the optional ones that it has, footer) of every part, a few read ahead."""

        def load(number: int) -> bytes:
            return self.folder.read(_name(number))

        with ThreadPoolExecutor(_READS_AHEAD, "parts") as pool:
            for number, data in prefetch_calls(pool, load, iter(self.numbers), max_pending=_READS_AHEAD):
                table, footer = decode(data, self.uri(number), columns, optional)
                if not len(table) and pq.ParquetFile(pa.BufferReader(data)).num_row_groups:
                    self._empty_groups.append(number)
                self.inspect(number, data, footer)
                yield number, table, footer

    def part(self, number: int, columns: Sequence[str] | None = None) -> tuple[pa.Table, Footer]:
        """Return the columns, or all, and the footer of one part."""
        return decode(self.folder.read(_name(number)), self.uri(number), columns)

    def footer(self, number: int) -> Footer:
        """Return the footer of one part."""
        return self.part(number, [])[1]

    def carried(self) -> pa.Schema:
        """Return the carried columns of the last part, as `scan` and `append` know it."""
        if not self.numbers:
            return pa.schema([])
        table, _ = self.part(self.numbers[-1])
        return carried_fields(table.schema.remove_metadata())

    def append(self, table: pa.Table, footer: Footer, absorb: Callable[[pa.Table, pa.Table], pa.Table]) -> int:
        """Create the next part with these rows; return how many were left to write.

        Where the number is taken by another writer, `absorb(rows, theirs)` returns the rows that are still to be
        written, and the next number is tried. A part that turns out to be our own, whose PUT succeeded though its
        answer was lost, is taken as written.
        """
        vanished = 0
        for _ in range(_MOST_CONFLICTS):
            number, nonce = self.next, uuid.uuid4().hex
            signed = replace(footer, nonce=nonce)
            try:
                self.folder.create(_name(number), encode(table, signed.metadata()))
                written = True
            except Exists:
                try:
                    theirs, their_footer = decode(self.folder.read(_name(number)), self.uri(number))
                except NotFound:  # S3 also refuses a PUT while another to the same name is under way, which may fail
                    vanished += 1
                    if vanished > _MOST_VANISHED:
                        raise
                    time.sleep(_VANISHED_WAIT_S)
                    continue
                written = their_footer.nonce == nonce
            self.numbers.append(number)
            if written:
                return len(table)
            require_same(their_footer.fingerprint, footer.fingerprint, self.uri(number))
            table = absorb(table, theirs)
            if not len(table) and not footer.seal and not footer.shards:
                return 0
        raise OutputError(f"{self.folder.uri}: {_MOST_CONFLICTS} numbers in a row were taken by another writer")

    def rewrite(self, number: int, change: Callable[[pa.Table], pa.Table]) -> int:
        """Replace a part by what `change` makes of its rows, if that is anything else; return how many rows went.

        The replacement is conditional on the part being the one that was read, so that a late one of a dead run cannot
        bring rows, or old values, back; and it is announced, so that the next run can see to it that it takes none away
        either. Each replacement has a nonce of its own: values that are corrected and then corrected back would otherwise
        give a part its old ETag again, and a late replacement would be accepted.
        """
        for _ in range(_MOST_CONFLICTS):
            data, tag = self.folder.read_tagged(_name(number))
            table, footer = decode(data, self.uri(number))
            kept = change(table)
            if len(kept) == len(table) and kept.equals(table):
                return 0
            self.announced.add([number])
            signed = replace(footer, nonce=uuid.uuid4().hex)
            try:
                self.folder.replace(_name(number), encode(kept, signed.metadata()), tag)
            except Conflict:
                self.announced.doubt(number)
                continue
            return len(table) - len(kept)
        raise OutputError(f"{self.uri(number)} keeps changing under another writer")

    def drop_empty_groups(self) -> None:
        """Write the parts again that `read` found to have a row group but no rows, as 0.1.0 wrote seals: see `encode`."""
        for number in self._empty_groups:
            data, tag = self.folder.read_tagged(_name(number))
            table, footer = decode(data, self.uri(number))
            with suppress(Conflict):  # then another run does the same
                self.folder.replace(_name(number), encode(table, footer.metadata()), tag)
        self._empty_groups = []

    def fence(self, fingerprint: Mapping[str, Any]) -> None:
        """Let what dead runs have sent to rewrite parts come too late: write these parts again, with the same rows.

        To be called behind `scan`, and before the rows are read.

        Raises:
            OutputError: the parts are of another fingerprint.
        """
        left = self.announced.left() if self.numbers else {}
        for number in sorted({number for parts in left.values() for number in parts} & set(self.numbers)):
            data, tag = self.folder.read_tagged(_name(number))
            table, footer = decode(data, self.uri(number))
            require_same(footer.fingerprint, fingerprint, self.uri(number))
            signed = replace(footer, nonce=uuid.uuid4().hex)
            with suppress(Conflict):  # then it is another one already
                self.folder.replace(_name(number), encode(table, signed.metadata()), tag)
        if left:
            self.announced.take_back(left)


def is_hidden(name: str) -> bool:
    """Return whether most readers of a folder pass over a file of this name."""
    return name.rpartition("/")[2].startswith((".", "_"))


def _name(number: int) -> str:
    return f"part-{number:08d}.parquet"


def require_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    """Refuse rows that were made by another model or with other answers than ours.

    A key that is absent, null or has its value of `DEFAULTS` is the same in all three forms, so that an option that is
    added later does not invalidate outputs that were written before it.

    Raises:
        OutputError: naming the keys that differ, and the way out.
    """
    if different := differences(theirs, ours):
        shown = "; ".join(f"{key}: {there} there, {here} here" for key, (there, here) in different.items())
        raise OutputError(
            f"{where} was written with another fingerprint ({shown}). Labels of two fingerprints do not belong in one "
            "table: give this run an --output of its own, e.g. with {model} in it"
        )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the keys in which two fingerprints differ, with both values as a message shows them.

    >>> differences({"top_k": 3}, {"answer.min_score": 0.5})
    {'top_k': ('3', 'default (5)')}
    """
    different = sorted(key for key in theirs.keys() | ours.keys() if _value(theirs, key) != _value(ours, key))
    return {key: (_short(theirs, key), _short(ours, key)) for key in different}


def _value(fingerprint: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, the default if it is absent."""
    value = fingerprint.get(key)
    return DEFAULTS.get(key) if value is None else value


def _short(fingerprint: Mapping[str, Any], key: str) -> str:
    value = fingerprint.get(key)
    if value is None:
        return "default" if DEFAULTS.get(key) is None else f"default ({json.dumps(DEFAULTS[key])})"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Effects: a log of numbered parts: Parquet files that are created one after the other, each exactly once.

Each commit creates the next numbered part with a conditional PUT. If that number already exists, the writer reads the part,
drops the rows it already contains, and tries the next number. So every writer has read all parts before its own, and no row
is written twice, by any number of writers, even if processes are killed.

This needs an atomic `Store.create`: If-None-Match on the server, a hard link on disks. On other stores, run only one writer
per output.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.concurrency.prefetch import prefetch_calls
from imgbatch.errors import Conflict, Exists, NotFound, OutputChangedError, OutputError
from imgbatch.ledger.fingerprint import require_same
from imgbatch.ledger.part_file import Footer, decode, encode
from imgbatch.ledger.rewrite_intents import RewriteIntents
from imgbatch.schema import carried_fields
from imgbatch.storage.stores import Folder

_NAME = re.compile(r"part-(\d{8})\.parquet")
_PREFETCHED_PARTS = 4
_MAX_CONFLICTS = 1000
_MAX_VANISHED, _VANISHED_WAIT_S = 20, 0.5
_MAX_MISSING, _SHOWN = 1000, 3

log = logging.getLogger(__name__)


class Log:
    """The parts of one table, in the order of their numbers."""

    def __init__(self, folder: Folder, numbers: Sequence[int] = ()) -> None:
        self.folder = folder
        self.numbers: list[int] = [*numbers]
        self._with_empty_groups: list[int] = []
        output, _, table = folder.uri.rpartition("/")
        self.intents = RewriteIntents(Folder(folder.stores, f"{output}/runs"), f"rewriting-{table}.json")

    @property
    def next(self) -> int:
        """The number of the next part."""
        return self.numbers[-1] + 1 if self.numbers else 1

    @property
    def names(self) -> list[str]:
        """The names of the parts."""
        return [_name(number) for number in self.numbers]

    def uri(self, number: int) -> str:
        """Return the URI of a part."""
        return self.folder.at(_name(number))

    def scan(self) -> None:
        """List the parts.

        Raises:
            OutputError: the folder holds a file that is not a part; hidden files are ignored.
            OutputChangedError: parts that existed before were deleted.
        """
        numbers, foreign = [], []
        for name in self.folder.names():
            if match := _NAME.fullmatch(name):
                numbers.append(int(match[1]))
            else:
                foreign.append(name)
        self.refuse_foreign(foreign)
        if deleted := sorted(set(self.numbers) - set(numbers)):
            raise OutputChangedError(
                f"{len(deleted):,} of the {len(self.numbers):,} parts in {self.folder.uri} that this run has seen are gone, "
                f"such as {_name(deleted[0])}: they were deleted during this run. Run the same command again"
            )
        self.numbers = sorted(numbers)

    def refuse_foreign(self, names: Sequence[str]) -> None:
        """Refuse files in the folder that are not parts; hidden files are ignored.

        Raises:
            OutputError: naming the first one.
        """
        for name in names:
            if not is_hidden(name):
                raise OutputError(
                    f"{self.folder.at(name)} was not written by imgbatch: move it away, or choose another --output"
                )

    def inspect(self, number: int, data: bytes, footer: Footer) -> None:
        """Do nothing; `read` calls it with the bytes of each part, in the order of their numbers."""

    @property
    def missing(self) -> list[int]:
        """The numbers below that of the last part without a part. No run skips a number, so these parts were lost."""
        return sorted({*range(1, self.next)}.difference(self.numbers))

    def warn_of_gaps(self) -> None:
        """Log which parts are missing.

        Raises:
            OutputError: so many are missing that no run can have numbered the last part.
        """
        missing = self.next - 1 - len(self.numbers)
        if missing > _MAX_MISSING:
            pairs = pairwise([0, *self.numbers])
            before_gap = max((previous for previous, number in pairs if number - previous > 1), default=0)
            raise OutputError(
                f"{self.uri(self.numbers[-1])}: {missing:,} numbers of parts are missing before it, from {before_gap + 1} on, "
                "and no run skips a number: move it away, then run again"
            )
        if self.missing:
            names = ", ".join(self.uri(number) for number in self.missing[:_SHOWN])
            log.warning(
                "missing: %s%s. Rows of images that are still in the input are written again",
                names,
                f", and {len(self.missing) - _SHOWN} more parts" if len(self.missing) > _SHOWN else "",
            )

    def fill_gaps(self, table: pa.Table, footer: Footer) -> None:
        """Create the missing parts with these rows."""
        for number in self.missing:
            with suppress(Exists):  # another run does the same
                signed = replace(footer, nonce=uuid.uuid4().hex)
                self.folder.create(_name(number), encode(table, signed.metadata()))
        # The folder is not listed again: `append` has still to read the parts that another writer added at the end.
        self.numbers = [*range(1, self.next)]

    def read(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, pa.Table, Footer]]:
        """Yield number, rows and footer of each part, while the next parts are fetched.

        Args:
            columns: which columns to read.
            optional: columns that are read as well if a part has them.

        Raises:
            OutputError: a part was not written by imgbatch, is truncated, or comes from a newer version.
        """

        def load(number: int) -> bytes:
            return self.folder.read(_name(number))

        with ThreadPoolExecutor(_PREFETCHED_PARTS, "parts") as pool:
            for number, data in prefetch_calls(pool, load, iter(self.numbers), max_pending=_PREFETCHED_PARTS):
                table, footer = decode(data, self.uri(number), columns, optional)
                if not len(table) and pq.ParquetFile(pa.BufferReader(data)).num_row_groups:
                    self._with_empty_groups.append(number)
                self.inspect(number, data, footer)
                yield number, table, footer

    def part(self, number: int, columns: Sequence[str] | None = None) -> tuple[pa.Table, Footer]:
        """Return rows and footer of one part; `columns`: which columns to read; None: all."""
        return decode(self.folder.read(_name(number)), self.uri(number), columns)

    def footer(self, number: int) -> Footer:
        """Return the footer of one part."""
        return self.part(number, [])[1]

    def carried(self) -> pa.Schema:
        """Return the carried columns of the last part in `numbers`."""
        if not self.numbers:
            return pa.schema([])
        table, _ = self.part(self.numbers[-1])
        return carried_fields(table.schema.remove_metadata())

    def append(self, table: pa.Table, footer: Footer, drop_written: Callable[[pa.Table, pa.Table], pa.Table]) -> int:
        """Create the next part with these rows; return how many rows were written.

        Args:
            table: the rows.
            footer: of the part.
            drop_written: called as `drop_written(rows, theirs)` with the rows of a part that another writer has created
                under our number; it returns the rows that are still to be written.

        Raises:
            OutputError: other writers took too many numbers in a row, or have another fingerprint.
        """
        vanished = 0
        for _ in range(_MAX_CONFLICTS):
            number, nonce = self.next, uuid.uuid4().hex
            signed = replace(footer, nonce=nonce)
            try:
                self.folder.create(_name(number), encode(table, signed.metadata()))
                written = True
            except Exists:
                try:
                    theirs, their_footer = decode(self.folder.read(_name(number)), self.uri(number))
                except NotFound:
                    # S3 also refuses a PUT while another PUT to the same name is in progress. That one may still fail, and
                    # then the number stays free: try it again.
                    vanished += 1
                    if vanished > _MAX_VANISHED:
                        raise
                    time.sleep(_VANISHED_WAIT_S)
                    continue
                # The number may be taken by our own PUT: it succeeded, its response was lost, and the store's client sent it
                # again. The nonce shows this, and the rows are not written a second time.
                written = their_footer.nonce == nonce
            self.numbers.append(number)
            if written:
                return len(table)
            require_same(their_footer.fingerprint, footer.fingerprint, self.uri(number))
            table = drop_written(table, theirs)
            if not len(table) and not footer.seal and not footer.streams:
                return 0
        raise OutputError(f"{self.folder.uri}: {_MAX_CONFLICTS} numbers in a row were taken by another writer")

    def rewrite(self, number: int, change: Callable[[pa.Table], pa.Table]) -> int:
        """Replace the rows of a part by `change(rows)`, if they differ; return how many rows were removed.

        The PUT is conditional on the ETag that was read (If-Match). So a late PUT of a dead run cannot bring back rows, or
        old values, that a later run has removed. The rewrite is recorded in `intents` before it is sent, so that the next
        run can fence it off (see `fence`).

        Each replacement has a nonce of its own. Without it, values that are corrected and then corrected back would give the
        part its old content and so its old ETag again, and a late PUT with that ETag would be accepted.
        """
        for _ in range(_MAX_CONFLICTS):
            data, tag = self.folder.read_tagged(_name(number))
            table, footer = decode(data, self.uri(number))
            changed = change(table)
            if len(changed) == len(table) and changed.equals(table):
                return 0
            self.intents.add([number])
            signed = replace(footer, nonce=uuid.uuid4().hex)
            try:
                self.folder.replace(_name(number), encode(changed, signed.metadata()), tag)
            except Conflict:
                self.intents.invalidate(number)
                continue
            return len(table) - len(changed)
        raise OutputError(f"{self.uri(number)} keeps changing under another writer")

    def drop_empty_groups(self) -> None:
        """Rewrite the parts in which `read` found a row group without rows, as 0.1.0 wrote seals (see `encode`)."""
        for number in self._with_empty_groups:
            data, tag = self.folder.read_tagged(_name(number))
            table, footer = decode(data, self.uri(number))
            with suppress(Conflict):  # another run does the same
                self.folder.replace(_name(number), encode(table, footer.metadata()), tag)
        self._with_empty_groups = []

    def fence(self, fingerprint: Mapping[str, Any]) -> None:
        """Fence: rewrite every announced part unchanged, so that its ETag changes and a pending conditional PUT of a dead run
        fails.

        Call it after `scan` and before the rows are read: a pending PUT that arrives in between is then read as well.

        Raises:
            OutputError: the parts have another fingerprint.
        """
        pending = self.intents.pending() if self.numbers else {}
        for number in sorted({number for parts in pending.values() for number in parts} & set(self.numbers)):
            data, tag = self.folder.read_tagged(_name(number))
            table, footer = decode(data, self.uri(number))
            require_same(footer.fingerprint, fingerprint, self.uri(number))
            signed = replace(footer, nonce=uuid.uuid4().hex)
            with suppress(Conflict):  # its ETag has changed already
                self.folder.replace(_name(number), encode(table, signed.metadata()), tag)
        if pending:
            self.intents.withdraw(pending)


def is_hidden(name: str) -> bool:
    """Return whether most readers of a folder ignore a file of this name."""
    return name.rpartition("/")[2].startswith((".", "_"))


def _name(number: int) -> str:
    return f"part-{number:08d}.parquet"

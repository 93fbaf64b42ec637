"""Effects: CSV and TSV files as a stream of rows.

Arrow parses blocks of lines without quotes. Python's csv module, in its strict mode, parses blocks with quotes, since it
reports an unclosed quote and a value that continues after its closing quote. Arrow accepts both, and rows would be lost in a
value. If a value has several lines that look like rows, it is refused too: to every parser, two stray quotes enclose a valid
value.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from imgbatch.config.sections import IMAGE_SUFFIXES
from imgbatch.errors import InputError
from imgbatch.sources import spelling
from imgbatch.sources.columns import distinct_names
from imgbatch.sources.naming import Naming

MAX_LINE = 16 << 20
"""Maximum number of characters in a line or a value, so that a file without line ends, or with an unclosed quote, does not
fill the memory."""

_BLOCK = 1 << 20
_LINE_END = re.compile(r"\r\n?|\n")
_SEPARATORS = ",;\t|"
_SEPARATOR_LINE = re.compile(r"\s*\"?sep=(.)\"?\s*$", re.IGNORECASE)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a list."""

    batch: pa.RecordBatch
    place: Callable[[int], str] = str
    """Returns the place of a row in the file, such as `line 12`."""
    padded: bool = False
    """Whether spaces around the names of images are to be removed."""
    ignored: int = 0
    """Number of omitted rows: repeated headers."""
    annotated: bool = False
    """Whether the rows are tasks of Label Studio."""


def csv_rows(text: io.TextIOBase, separator: str, uri: str, naming: Naming) -> Iterator[Rows]:
    """Yield the rows as text. The first batch is empty and has the columns. An empty file yields nothing.

    Args:
        separator: the default for the suffix of the file. A first line `sep=;` takes precedence, and so does another
            separator if it is the only one in the header.
    """
    lines = _Lines(text, uri)
    first = lines.next_line()
    while first and not first.strip():
        first = lines.next_line()
    if named := _SEPARATOR_LINE.match(first):
        separator, first = named[1], lines.next_line()
    elif separator not in first:
        others = [other for other in _SEPARATORS if other in first]
        separator = others[0] if len(others) == 1 else separator
    if not first.strip():
        return
    header = _QuotedRows(lines, separator, first, first_line=lines.number).one()
    names = distinct_names(header, uri)
    naming = naming.resolve(names)
    naming.require(names, uri)
    table = _Table(uri, separator, names, naming)
    yield Rows(table.batch([[] for _ in names]))
    if "" in names and any(names[names.index("") :]):
        log.info("%s: columns without a name are omitted from the tables", uri)
    while block := lines.next_block():
        yield from table.rows(lines, block)


class _Lines:
    """A text file, read in blocks of lines or in single lines, with a count of lines."""

    def __init__(self, text: io.TextIOBase, uri: str) -> None:
        self._text, self._uri = text, uri
        self.number = 0
        """The number of lines that were read."""

    def next_line(self) -> str:
        """Return the next line with its line end, an empty text at the end of the file."""
        line = self._text.readline(MAX_LINE)
        return self._checked(line) if line else ""

    def next_block(self) -> str:
        """Return the next lines, an empty text at the end of the file."""
        block = self._text.read(_BLOCK)
        if block and not block.endswith("\n"):
            block += self._text.readline(MAX_LINE)
        if block.count('"') % 2:  # the block probably ends within a value
            block += self._up_to_a_quote()
        return self._checked(block) if block else ""

    def _up_to_a_quote(self) -> str:
        """Return the lines up to one with an odd number of quotes, but not many more than `_BLOCK` characters."""
        lines: list[str] = []
        chars = 0
        while chars < _BLOCK and (line := self._text.readline(MAX_LINE)):
            lines.append(line)
            chars += len(line)
            if line.count('"') % 2:
                break
        return "".join(lines)

    def _checked(self, lines: str) -> str:
        """Count lines and return them; refuse those that are not text."""
        if "\0" in lines:
            self._refuse(lines, lines.index("\0"), "holds a NUL character: save the file as UTF-8 text")
        try:
            lines.encode()
        except UnicodeEncodeError as error:
            self._refuse(lines, error.start, "is not UTF-8: save the file as UTF-8 text ('CSV UTF-8' in Excel)")
        if len(lines) >= MAX_LINE and not lines.endswith(("\n", "\r")):
            self._refuse(lines, len(lines), f"is longer than {MAX_LINE >> 20} MB: is it text with one image per line?")
        self.number += count_lines(lines)
        return lines

    def _refuse(self, lines: str, at: int, why: str) -> None:
        line = self.number + 1 + _ends(lines[:at])
        raise InputError(f"{self._uri} cannot be read as CSV: line {line:,} {why}")


def _ends(lines: str) -> int:
    return lines.count("\n") + (lines.count("\r") - lines.count("\r\n") if "\r" in lines else 0)


def count_lines(lines: str) -> int:
    """Return the number of lines of a text, with the line ends of Unix, Windows or old Macs.

    >>> count_lines("a\\r\\nb\\rc\\nd")
    4
    """
    return _ends(lines) + (0 if lines.endswith(("\n", "\r")) else 1)


class _QuotedRows:
    """The rows of a block, parsed by Python in strict mode. More lines are read if the last value is not closed."""

    def __init__(self, lines: _Lines, separator: str, block: str, first_line: int) -> None:
        self._lines, self._block = lines, io.StringIO(block, newline="")
        self._end, self._before = len(block), first_line - 1
        csv.field_size_limit(MAX_LINE)
        self._reader = csv.reader(self._block_and_more(), delimiter=separator, strict=True)
        self.uri = lines._uri

    def _block_and_more(self) -> Iterator[str]:
        yield from self._block
        while line := self._lines.next_line():
            yield line

    def one(self) -> list[str]:
        """Return the first row."""
        return next(iter(self))[1]

    def __iter__(self) -> Iterator[tuple[int, list[str], int]]:
        """Yield (the line in which a row begins, its values, the line in which it ends)."""
        while self._block.tell() < self._end:
            start = self._before + self._reader.line_num + 1
            try:
                row = next(self._reader, None)
            except csv.Error as error:
                raise InputError(f"{self.uri} cannot be read as CSV: {self._why(start, str(error))}") from error
            if row:  # a blank line has no values
                yield start, row, self._before + self._reader.line_num

    def _why(self, start: int, error: str) -> str:
        end = self._before + self._reader.line_num
        place = f"line {start:,}" if end <= start else f"lines {start:,} to {end:,}"
        rule = "a value that begins with a quote ends with one, and quotes within it are written twice"
        if "expected after" in error:
            return f"{place}: a value continues after its closing quote; {rule}"
        if "end of data" in error:
            return f"line {start:,}: a quote is not closed; {rule}"
        if "field limit" in error:
            return f"line {start:,}: a value is longer than {MAX_LINE >> 20} MB: is its quote closed?"
        return f"{place}: {error}"


@dataclass(frozen=True)
class _Table:
    uri: str
    separator: str
    names: list[str]
    naming: Naming

    def rows(self, lines: _Lines, block: str) -> Iterator[Rows]:
        """Yield the rows of a block of lines."""
        first_line = lines.number - count_lines(block) + 1
        batch = self._parse_unquoted(block) if '"' not in block else None
        if batch is not None:
            yield self._without_headers(batch, lambda at: _line_of(block, first_line, at))
            return
        parsed = self._parse_quoted(block, first_line)
        if parsed is None:
            parsed = list(_QuotedRows(lines, self.separator, block, first_line))
        count, starts, values = len(self.names), [], []
        for start, row, end in parsed:
            values.append(row if len(row) == count and start == end else self._checked(start, row, end))
            starts.append(start)
        columns = list(zip(*values, strict=True)) or [() for _ in self.names]
        yield self._without_headers(self.batch(columns), starts.__getitem__)

    def _parse_quoted(self, block: str, first_line: int) -> list[tuple[int, list[str], int]] | None:
        """Return what `_QuotedRows` yields, None if the block ends within a row or has a syntax error."""
        reader = csv.reader(io.StringIO(block, newline=""), delimiter=self.separator, strict=True)
        rows, start = [], first_line
        try:
            for row in reader:
                after = first_line + reader.line_num
                if row:
                    rows.append((start, row, after - 1))
                start = after
        except csv.Error:
            return None
        return rows

    def batch(self, columns: Sequence[Sequence[str] | pa.Array]) -> pa.RecordBatch:
        """Return columns as a batch; those without a name are dropped."""
        arrays = [pa.array(column, pa.string()) for name, column in zip(self.names, columns, strict=True) if name]
        return pa.RecordBatch.from_arrays(arrays, names=[name for name in self.names if name])

    def _parse_unquoted(self, block: str) -> pa.RecordBatch | None:
        """Return the rows of a block without quotes, None if they have different numbers of values."""
        data = block.encode()
        numbers = [str(at) for at in range(len(self.names))]
        try:
            table = pa_csv.read_csv(
                pa.BufferReader(data),
                pa_csv.ReadOptions(column_names=numbers, use_threads=False, block_size=len(data) + 1),
                pa_csv.ParseOptions(delimiter=self.separator, quote_char=False),
                # All columns stay text: a type that is inferred from the first rows may not fit a later one.
                pa_csv.ConvertOptions(column_types=dict.fromkeys(numbers, pa.string()), strings_can_be_null=False),
            )
        except pa.ArrowInvalid:
            return None
        return self.batch([column.combine_chunks() for column in table.columns])

    def _checked(self, start: int, row: list[str], end: int) -> list[str]:
        count = len(self.names)
        if len(row) > count and not any(value.strip() for value in row[count:]):
            row = row[:count]  # each row ends with a separator
        if len(row) != count:
            place = f"line {start:,}" if start == end else f"lines {start:,} to {end:,}"
            raise InputError(
                f"{self.uri} cannot be read as CSV: {place}: {len(row)} values, but the header has {count}. Put values with "
                f"{self.separator!r} in quotes, without a space before the quote"
            )
        if end > start:
            self._require_no_rows_in(row, start, end)
        return row

    def _require_no_rows_in(self, row: list[str], start: int, end: int) -> None:
        """Refuse a row of several lines if one of them looks like a row itself."""
        at, separators = self.names.index(self.naming.fields[0]), len(self.names) - 1
        first, *others = _LINE_END.split(self.separator.join(row))
        name = row[at]
        if _LINE_END.search(name):  # a name may contain a line end, unless the first line alone is a row
            if first.count(self.separator) != separators:
                return
            name = first.split(self.separator)[at]
        for line in others:
            if line.count(self.separator) != separators:
                continue
            other = line.split(self.separator)[at].strip()
            if _similar(name.strip(), other) and _similar(other, name.strip()):
                raise InputError(
                    f"{self.uri} cannot be read as CSV: a quote in line {start:,} is closed in line {end:,}, and the lines "
                    f"between look like rows, such as {line[:100]!r}. Close the quote, or double it within a quoted value. If "
                    "the value is right, write the list as JSON Lines or Parquet"
                )

    def _without_headers(self, batch: pa.RecordBatch, line: Callable[[int], int]) -> Rows:
        """Drop repeated headers, which concatenated files have."""
        key = self.naming.fields[0]
        named = pc.is_in(pc.utf8_trim(batch[key], " \t\ufeff"), pa.array([name for name in self.names if name]))
        headers = []
        for at in pc.indices_nonzero(named).to_pylist():
            values = [spelling.normalise(value.strip("\ufeff")) for value in batch.slice(at, 1).to_pylist()[0].values()]
            names = batch.schema.names
            if values == names:
                headers.append(at)
            elif sorted(values) == sorted(names) or values[names.index(key)] == key:
                raise InputError(
                    f"{self.uri} cannot be read as CSV: line {line(at):,} is a different header, {', '.join(values)[:200]!r}. "
                    "Give each table as a separate --input"
                )
        if not headers:
            return Rows(batch, lambda at: f"line {line(at):,}", padded=True)
        log.warning("%s: line %s repeats the header and is ignored", self.uri, f"{line(headers[0]):,}")
        others = [at for at in range(len(batch)) if at not in set(headers)]
        return Rows(
            batch.take(pa.array(others, pa.int64())),
            lambda at: f"line {line(others[at]):,}",
            padded=True,
            ignored=len(headers),
        )


def _line_of(block: str, first: int, at: int) -> int:
    """Return the line of a row in a block where each line is a row, except for blank lines."""
    for number, line in enumerate(io.StringIO(block, newline=""), first):
        if line.strip("\r\n"):
            at -= 1
        if at < 0:
            return number
    return first


def _similar(name: str, other: str) -> bool:
    """Return whether `other` may be the name of an image in a list that has the name `name`.

    >>> _similar("p/1.jpg", "p/2.jpg"), _similar("7f3a", "81bc"), _similar("p/1.jpg", "A dog"), _similar("7f3a", "Hello")
    (True, True, False, False)
    """
    suffix, other_suffix = (text.rpartition(".")[2].lower() if "." in text else "" for text in (name, other))
    if other_suffix:
        return other_suffix in IMAGE_SUFFIXES or (other_suffix == suffix and other_suffix.isalnum())
    if suffix or not other or re.search(r"\s", other) or not re.search(r"\d", other):
        return False
    return len(other) == len(name) or _shape(other) == _shape(name)


def _shape(name: str) -> str:
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", name))

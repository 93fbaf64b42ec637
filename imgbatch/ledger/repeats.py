"""Effects: repeated rows, which name an image again: their values fill those that the image's first row lacks.

The only effects are log messages: `listing` reads and writes the pages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.ledger.carried import CarriedColumns, has_value, shown_column
from imgbatch.ledger.common_columns import as_text
from imgbatch.schema import CARRIED, LISTING, carried_fields, single_chunk
from imgbatch.sources.spelling import normalised
from imgbatch.uri_index import Keys, UriIndex, first_of_each, uri_keys

MAX_BUFFERED_BYTES = 32 << 20
"""Maximum size of the buffered rows. Each time it is exceeded, all pages of the listing are read once."""

_VERSION = ("size", "etag", "last_modified")

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


class Repeats:
    """Rows that name an image again. Each of their values fills that of the image's first row, if that has none.

    Null, empty text and blank text are no values. If both rows have a value, that of the first row is kept.
    """

    def __init__(self, agree: Sequence[str] = ()) -> None:
        """Start without rows; in the carried columns `agree`, different values of an image are an error."""
        self._agree = frozenset(agree)
        self._rows: list[pa.RecordBatch] = []
        self._keys: list[Keys] = []
        self._bytes = 0
        self._lacking: set[str] = set()
        self._differing: dict[str, tuple[int, str]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._keys))

    @property
    def full(self) -> bool:
        """Whether the buffer is full, so that `drain` should be called."""
        return self._bytes > MAX_BUFFERED_BYTES

    def note(self, listed: pa.RecordBatch) -> None:
        """Note which of size, ETag and time the first rows of images lack."""
        self._lacking.update(name for name in _VERSION if listed[name].null_count)

    def add(self, rows: pa.RecordBatch, keys: Keys) -> None:
        """Buffer the rows that have a value to fill in, or to compare with that of the first row."""
        names = [*(name for name in _VERSION if name in self._lacking), *carried_fields(rows.schema).names]
        useful = np.zeros(len(rows), bool)
        for name in names:
            useful |= has_value(rows[name])
        if useful.any():
            self._rows.append(rows.select([*_VERSION, *carried_fields(rows.schema).names]).filter(pa.array(useful)))
            self._keys.append(keys[useful])
            self._bytes += self._rows[-1].nbytes + self._keys[-1].nbytes

    def drain(self, columns: CarriedColumns) -> Fill:
        """Return the buffered rows with these columns, and empty the buffer."""
        tables = [columns.cast(_with_listing(rows)) for rows in self._rows]
        keys = np.concatenate(self._keys) if self._keys else np.zeros((0, 2), np.uint64)
        self._rows, self._keys, self._bytes = [], [], 0
        # Cast again: a column may have become text with a later table.
        return Fill(
            pa.concat_tables(columns.cast(table) for table in [*tables, columns.schema.empty_table()]), keys, self
        )

    def differ(self, name: str, uris: pa.Array, first_values: pa.Array, other_values: pa.Array) -> None:
        """Note the differences between values of first rows, which are kept, and those of repeated rows, in one column.

        Raises:
            InputError: in this column values may not differ.
        """
        first_text, other_text = as_text(first_values), as_text(other_values)
        if name in self._agree:
            first_text, other_text = normalised(first_text), normalised(other_text)
        differs = pc.not_equal(first_text, other_text)
        if not pc.any(differs).as_py():
            return
        at = pc.index(differs, True).as_py()
        uri, kept, ignored = uris[at].as_py(), first_text[at].as_py(), other_text[at].as_py()
        if name in self._agree:
            raise InputError(
                f"{uri} is listed more than once, with two values of {shown_column(name)}: {kept!r} and {ignored!r}: "
                "give it one"
            )
        count, example = self._differing.get(name, (0, f"{uri} has {kept!r} and {ignored!r}"))
        self._differing[name] = count + pc.sum(differs).as_py(), example

    def warn(self) -> None:
        """Log the columns in which repeated rows had other values."""
        for name, (count, example) in self._differing.items():
            log.warning(
                "%s rows name an image again with another value of %s, such as %s: the first is kept",
                f"{count:,}", shown_column(name), example,
            )  # fmt: skip


@dataclass
class Fill:
    """Values to fill in: the rows that name images again, grouped by image."""

    rows: pa.Table
    keys: Keys
    repeats: Repeats

    def __post_init__(self) -> None:
        order = np.lexsort((self.keys[:, 1], self.keys[:, 0]))  # stable: the rows of one image keep their order
        self.rows, self.keys = self.rows.take(pa.array(order)).combine_chunks(), self.keys[order]
        first = np.flatnonzero(first_of_each(self.keys))
        self._starts = np.append(first, len(self.keys))
        self._index = UriIndex(group=np.int64)
        self._index.add(self.keys[first], group=np.arange(len(first)))

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, page: pa.Table) -> tuple[pa.Table, Mask]:
        """Return a page with the values filled in, and a mask of the rows that got a size, ETag or time.

        Raises:
            InputError: the rows of an image differ in a column where they may not.
        """
        repeated, at = self._rows_of(page)
        versions = np.zeros(len(page), bool)
        if not len(repeated):
            return page, versions
        plain = np.asarray(page["container"].is_null())[at]
        for name in page.column_names:
            if name in _VERSION or name.startswith(CARRIED):
                values = single_chunk(repeated[name])
                is_usable = has_value(values) & (plain | (name not in _VERSION))
                page, filled = self._fill(page, name, values.filter(pa.array(is_usable)), at[is_usable])
                versions[filled if name in _VERSION else []] = True
        return page, versions

    def _rows_of(self, page: pa.Table) -> tuple[pa.Table, Rows]:
        """Return the rows that name images of a page, and the row of the page that each names."""
        keys = uri_keys(single_chunk(page["uri"]))
        pairs = [(match["group"], match.rows) for match in self._index.lookup(keys)]
        groups, rows = (np.concatenate([pair[side] for pair in pairs] or [np.zeros(0, np.int64)]) for side in (0, 1))
        starts, counts = self._starts[groups], self._starts[groups + 1] - self._starts[groups]
        # All rows of each group, which are adjacent: starts[0], starts[0] + 1, …, starts[1], …
        takes = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return self.rows.take(pa.array(takes)), np.repeat(rows, counts)

    def _fill(self, page: pa.Table, name: str, values: pa.Array, at: Rows) -> tuple[pa.Table, Rows]:
        """Fill one column of a page with values for the rows `at`; return the page, and the rows that were filled."""
        if not len(values):
            return page, at
        own = single_chunk(page[name])
        values = values.cast(own.type)  # the column may have become text meanwhile
        named_rows, first_index = np.unique(at, return_index=True)
        lacking = ~has_value(own)[named_rows]
        filled = named_rows[lacking]
        if len(filled):
            source = np.arange(len(own))
            source[filled] = len(own) + first_index[lacking]
            own = pa.concat_arrays([own, values]).take(pa.array(source))
            page = page.set_column(page.schema.get_field_index(name), page.schema.field(name), own)
        if name != "last_modified" and not name.startswith(
            f"{CARRIED}@"
        ):  # columns with @ record which input named the image
            rows = pa.array(at)
            self.repeats.differ(name, single_chunk(page["uri"]).take(rows), own.take(rows), values)
        return page, filled


def _with_listing(rows: pa.RecordBatch) -> pa.Table:
    """Return rows with nulls in the columns of LISTING that they lack."""
    table = pa.Table.from_batches([rows])
    for entry in LISTING:
        if entry.name not in table.column_names:
            table = table.append_column(entry.with_nullable(True), pa.nulls(len(table), entry.type))
    return table

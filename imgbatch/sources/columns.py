"""Effects: columns of tables: their names, the types in which they are carried along, and which of them hold image bytes.

Names are trimmed and in Unicode's composed form wherever a table is read. Binary values of up to 1 kB, such as hashes and
ids, are carried along as bytes. Longer ones are taken for pixels: they reach neither the listing nor the output tables.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from imgbatch.errors import InputError
from imgbatch.schema import whole
from imgbatch.sources import spelling
from imgbatch.sources.column_types import _leaves, as_plain, holds_bytes, is_bytes, plain

MAX_CARRIED_BYTES = 1024
"""Binary values above this are not carried along."""

log = logging.getLogger(__name__)


def distinct_names(names: Sequence[str], where: str) -> list[str]:
    """Return the names of columns, trimmed and in NFC.

    Raises:
        InputError: two columns have the same name then.

    >>> distinct_names(["\\ufeffuri", " label"], "list.csv")
    ['uri', 'label']
    """
    first: dict[str, str] = {}
    for raw in names:
        name = spelling.normalise(raw.strip("\ufeff"))
        if name and name in first:
            if raw == first[name]:
                raise InputError(f"{where} has more than one column {name!r}: rename or remove one")
            raise InputError(
                f"{where}: the columns {first[name]!r} and {raw!r} both have the name {name!r} without the spaces around "
                "them and in one Unicode form: rename one"
            )
        first[name] = raw
    return [spelling.normalise(raw.strip("\ufeff")) for raw in names]


@dataclass(frozen=True)
class TableColumns:
    """The columns of one Parquet file, under their trimmed names."""

    footer: pq.FileMetaData
    where: str
    """The file's URI, for messages."""

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns as the file names them."""
        return self.footer.schema.to_arrow_schema()

    @cached_property
    def names(self) -> list[str]:
        """The trimmed names."""
        return distinct_names(self.schema.names, self.where)

    @cached_property
    def raw(self) -> dict[str, str]:
        """The names in the file by the trimmed ones."""
        return dict(zip(self.names, self.schema.names, strict=True))

    def field(self, name: str) -> pa.Field:
        """Return the file's own field of a trimmed name."""
        return self.schema.field(self.names.index(name))

    @cached_property
    def binary(self) -> list[str]:
        """The binary columns as the file names them. They are read as dictionaries: a long value that occurs in many rows
        is in memory once, and so can be recognised before it is copied into each row."""
        return [field.name for field in self.schema if is_bytes(field.type) and not pt.is_fixed_size_binary(field.type)]

    def carried(self, *, image: str | None = None) -> dict[str, pa.DataType]:
        """Return the names and types of the columns that are carried along.

        Args:
            image: the trimmed name of the column of images, if the table has one.
        """
        named = [(name, self.schema.field(at)) for at, name in enumerate(self.names) if name and name != image]
        left_out = [name for name, field in named if holds_bytes(field.type) and not self._is_small(name)]
        if left_out:
            _say_left_out(self.where.rpartition("/")[0], tuple(left_out))
        return {
            name: pa.string() if field.name in self._class_names else plain(field.type)
            for name, field in named
            if name not in left_out
        }

    def values(self, rows: pa.Table | pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
        """Return a column of rows that were read from the file, as it is carried along.

        Raises:
            InputError: its values cannot be converted.
        """
        raw = self.raw[name]
        try:
            column = whole(rows.column(rows.schema.get_field_index(raw)))
            if is_bytes(column.type):
                column = self._without_pixels(column, name)
            if raw in self._class_names:  # -1, or beyond the names: a test split whose classes are not given
                names = self._class_names[raw]
                known = pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names)))
                return pa.array(names, pa.string()).take(pc.if_else(known, column, None))
            return as_plain(column, kind)
        except pa.ArrowException as error:
            raise InputError(f"{self.where}: the column {name!r} cannot be read as {kind}: {error}") from error

    def _is_small(self, name: str) -> bool:
        """Return whether a column with binary values may be carried along, as far as the footer tells."""
        at = self.names.index(name)
        kind = self.schema.field(at).type
        if pt.is_fixed_size_binary(kind):
            return bool(kind.byte_width <= MAX_CARRIED_BYTES)
        if not is_bytes(kind):
            return False
        leaf = sum(_leaves(field.type) for field in list(self.schema)[:at])
        chunks = [self.footer.row_group(group).column(leaf) for group in range(self.footer.num_row_groups)]
        return all(chunk.total_uncompressed_size <= MAX_CARRIED_BYTES * max(1, chunk.num_values) for chunk in chunks)

    def _without_pixels(self, column: pa.Array, name: str) -> pa.Array:
        values = column.dictionary if pt.is_dictionary(column.type) else column
        long = pc.fill_null(pc.greater(pc.binary_length(values.cast(pa.large_binary())), MAX_CARRIED_BYTES), False)
        if not pc.any(long).as_py():
            return column
        _say_left_out(self.where.rpartition("/")[0], (name,))
        if not pt.is_dictionary(column.type):
            return pc.if_else(long, None, values)
        short = pc.invert(long)
        numbers = pc.subtract(pc.cumulative_sum(short.cast(pa.int32())), 1)
        indices = pc.if_else(short, numbers, None).take(column.indices)
        return pa.DictionaryArray.from_arrays(indices, values.filter(short))

    @cached_property
    def _class_names(self) -> dict[str, list[str]]:
        """The names of the classes, of columns of class numbers that Hugging Face describes in the footer."""
        try:
            described = json.loads((self.footer.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
            found = {name: kind["names"] for name, kind in described.items() if kind.get("_type") == "ClassLabel"}
            return {name: names for name, names in found.items() if pt.is_integer(self.schema.field(name).type)}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}


@lru_cache(maxsize=4096)
def _say_left_out(folder: str, names: tuple[str, ...]) -> None:
    """Name columns once, not for each of the files of a folder."""
    log.info(
        "%s: the columns %s hold binary values that are nested or longer than %s bytes: they are not carried along",
        folder,
        ", ".join(map(repr, names)),
        f"{MAX_CARRIED_BYTES:,}",
    )


# Image bytes

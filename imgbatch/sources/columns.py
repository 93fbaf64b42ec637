"""Effects: the columns of a Parquet file: their names, and the values that are carried to the output tables.

Wherever a table is read, the names are trimmed and in Unicode's composed form (NFC). Binary values of up to 1 kB, such as
hashes and ids, are carried as bytes. Longer ones are taken for pixels and are omitted from the listing and the output tables.
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
from imgbatch.schema import single_chunk
from imgbatch.sources import spelling
from imgbatch.sources.column_types import _leaves, as_carried, carried_type, holds_bytes, is_bytes

MAX_CARRIED_BYTES = 1024
"""Longer binary values are not carried."""

log = logging.getLogger(__name__)


def distinct_names(names: Sequence[str], where: str) -> list[str]:
    """Return the names of columns, trimmed and in NFC.

    Raises:
        InputError: two columns have the same name after that.

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
                f"{where}: the columns {first[name]!r} and {raw!r} have the same name {name!r}, apart from spaces around it "
                "and the Unicode form: rename one"
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
        """The columns under the names in the file."""
        return self.footer.schema.to_arrow_schema()

    @cached_property
    def names(self) -> list[str]:
        """The trimmed names."""
        return distinct_names(self.schema.names, self.where)

    @cached_property
    def raw(self) -> dict[str, str]:
        """The names in the file, by trimmed name."""
        return dict(zip(self.names, self.schema.names, strict=True))

    def field(self, name: str) -> pa.Field:
        """Return the field of a trimmed name."""
        return self.schema.field(self.names.index(name))

    @cached_property
    def binary(self) -> list[str]:
        """The binary columns, under the names in the file. They are read as dictionaries, so that a long value that many
        rows share is in memory once and can be omitted before it is copied into each row."""
        return [field.name for field in self.schema if is_bytes(field.type) and not pt.is_fixed_size_binary(field.type)]

    def carried(self, *, image: str | None = None) -> dict[str, pa.DataType]:
        """Return the names and types of the carried columns.

        Args:
            image: the trimmed name of the column of images, if the table has one.
        """
        named = [(name, self.schema.field(at)) for at, name in enumerate(self.names) if name and name != image]
        omitted = [name for name, field in named if holds_bytes(field.type) and not self._is_small(name)]
        if omitted:
            _log_omitted(self.where.rpartition("/")[0], tuple(omitted))
        return {
            name: pa.string() if field.name in self._class_names else carried_type(field.type)
            for name, field in named
            if name not in omitted
        }

    def values(self, rows: pa.Table | pa.RecordBatch, name: str, kind: pa.DataType) -> pa.Array:
        """Return the carried values of a column, from rows that were read from the file.

        Raises:
            InputError: its values cannot be converted.
        """
        raw = self.raw[name]
        try:
            column = single_chunk(rows.column(rows.schema.get_field_index(raw)))
            if is_bytes(column.type):
                column = self._without_pixels(column, name)
            if raw in self._class_names:
                names = self._class_names[raw]
                # Test splits without classes have -1, or a number beyond the names.
                valid = pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names)))
                return pa.array(names, pa.string()).take(pc.if_else(valid, column, None))
            return as_carried(column, kind)
        except pa.ArrowException as error:
            raise InputError(f"{self.where}: the column {name!r} cannot be read as {kind}: {error}") from error

    def _is_small(self, name: str) -> bool:
        """Return whether the values of a binary column may be short enough to be carried, according to the footer."""
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
        _log_omitted(self.where.rpartition("/")[0], (name,))
        if not pt.is_dictionary(column.type):
            return pc.if_else(long, None, values)
        short = pc.invert(long)
        numbers = pc.subtract(pc.cumulative_sum(short.cast(pa.int32())), 1)
        indices = pc.if_else(short, numbers, None).take(column.indices)
        return pa.DictionaryArray.from_arrays(indices, values.filter(short))

    @cached_property
    def _class_names(self) -> dict[str, list[str]]:
        """The names of the classes, by column of class numbers, if Hugging Face has written them into the footer."""
        try:
            features = json.loads((self.footer.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
            classes = {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
            return {name: names for name, names in classes.items() if pt.is_integer(self.schema.field(name).type)}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}


@lru_cache(maxsize=4096)
def _log_omitted(folder: str, names: tuple[str, ...]) -> None:
    """Log the names of omitted columns once per folder, not once per file."""
    log.info(
        "%s: the columns %s are omitted from the tables: their binary values are nested or longer than %s bytes",
        folder,
        ", ".join(map(repr, names)),
        f"{MAX_CARRIED_BYTES:,}",
    )


# Image bytes

"""Effects: columns of tables: their names, the types in which they are carried along, and which of them hold image bytes.

Names are trimmed and in Unicode's composed form wherever a table is read. Binary values of up to 1 kB, such as hashes and
ids, are carried along as bytes. Longer ones are taken for pixels: they reach neither the listing nor the output tables.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from imgbatch.errors import InputError
from imgbatch.schema import single_chunk
from imgbatch.sources import spelling

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


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is a binary one, of any of Arrow's layouts.

    >>> is_bytes(pa.binary_view()), is_bytes(pa.dictionary(pa.int8(), pa.binary())), is_bytes(pa.string())
    (True, True, False)
    """
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is a string, of any of Arrow's layouts."""
    return bool(pt.is_string(plain(kind)))


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is a list, of any of Arrow's layouts; a map is none."""
    return bool(
        pt.is_list(kind)
        or pt.is_large_list(kind)
        or pt.is_fixed_size_list(kind)
        or pt.is_list_view(kind)
        or pt.is_large_list_view(kind)
    )


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is binary or has binary values in it, at any depth."""
    return is_bytes(kind) or any(holds_bytes(kind.field(at).type) for at in range(kind.num_fields))


def plain(kind: pa.DataType) -> pa.DataType:
    """Return the type in which values are carried along: one for all layouts of the same values.

    >>> plain(pa.dictionary(pa.int8(), pa.large_string())), plain(pa.large_list(pa.string_view()))
    (DataType(string), ListType(list<item: string>))
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type)
    if pt.is_dictionary(kind):
        return plain(kind.value_type)
    if pt.is_large_string(kind) or pt.is_string_view(kind):
        return pa.string()
    if is_bytes(kind):
        return pa.binary()
    if is_list(kind):
        return pa.list_(kind.field(0).with_type(plain(kind.field(0).type)))
    if pt.is_struct(kind):
        return pa.struct([field.with_type(plain(field.type)) for field in kind])
    return kind


def as_plain(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Return a column in the type that `plain` gives for its own."""
    column = single_chunk(column)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pt.is_list_view(column.type) or pt.is_large_list_view(column.type):  # pyarrow 26's cast makes them empty lists
        return pa.array(column.to_pylist(), kind)
    return column.cast(kind)


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
            column = single_chunk(rows.column(rows.schema.get_field_index(raw)))
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


def _leaves(kind: pa.DataType) -> int:
    """Return how many columns of a Parquet file a field takes."""
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    return sum(_leaves(kind.field(at).type) for at in range(kind.num_fields)) or 1


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

LIST = "*"
"""A step from a list to its only value; other steps name a field of a struct."""

_LEAST_FIXED = 65
"""Fixed-size values of up to 64 bytes are hashes and ids, unless the column is named as that of the images."""

Steps = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """Where in a table the bytes of an image are."""

    name: str
    """The trimmed name of the column."""
    steps: Steps
    """The way from a value of the column to the bytes."""

    @property
    def path(self) -> str:
        """Its name with the fields of structs, as `source.image_column` names it."""
        fields = [step for step in self.steps if step != LIST]
        return ".".join([self.name, *(fields[:-1] if fields[-1:] == ["bytes"] else fields)])


def image_column(schema: pa.Schema, named: str | None) -> ImageColumn | None:
    """Return the column that holds images: the named one, or the one that the types tell, None if there is none.

    Of the kinds in `_KINDS` the first counts of which there is a column.

    Args:
        schema: columns under their trimmed names.
        named: a column, or with dots a field of a struct in it.

    Raises:
        InputError: several could be meant.

    >>> image_column(pa.schema([("id", pa.int64()), ("jpg", pa.binary())]), None).path
    'jpg'
    """
    if named is not None:
        return _named(schema, spelling.normalise(named))
    for kind in _KINDS:
        found = [ImageColumn(field.name, steps) for field in schema for steps in kind(field.type)]
        if found:
            return _only(found)
    return None


def _named(schema: pa.Schema, named: str) -> ImageColumn | None:
    for at in range(len(named.split(".")), 0, -1):  # a column's own name may have dots
        parts = named.split(".")
        name, fields = ".".join(parts[:at]), tuple(parts[at:])
        if name not in schema.names:
            continue
        ways = list(_everywhere(schema.field(name).type))
        meant = [steps for steps in ways if tuple(step for step in steps if step != LIST)[: len(fields)] == fields]
        told = [steps for steps in meant if steps[-1:] == ("bytes",)]
        if meant:
            return _only([ImageColumn(name, steps) for steps in told or meant])
    return None


def _only(found: list[ImageColumn]) -> ImageColumn:
    if len(found) > 1:
        names = ", ".join(column.path for column in found)
        raise InputError(f"the columns {names} could all be images: name one with source.image_column")
    return found[0]


def _everywhere(kind: pa.DataType) -> Iterator[Steps]:
    """Yield the ways to all binary values in a type; of a struct with `bytes`, to those alone."""
    if is_bytes(kind):
        yield ()
    elif is_list(kind):
        yield from ((LIST, *steps) for steps in _everywhere(kind.field(0).type))
    elif pt.is_struct(kind):
        yield from _struct_of_bytes(kind) or (
            (field.name, *steps) for field in kind for steps in _everywhere(field.type)
        )


def _struct_of_bytes(kind: pa.DataType) -> list[Steps]:
    """As Hugging Face writes images."""
    at = kind.get_field_index("bytes") if pt.is_struct(kind) else -1
    return [("bytes",)] if at >= 0 and is_bytes(kind.field(at).type) else []


def _struct_within(kind: pa.DataType) -> list[Steps]:
    if _struct_of_bytes(kind) or not pt.is_struct(kind):
        return _struct_of_bytes(kind)
    return [(field.name, *steps) for field in kind for steps in _struct_within(field.type)]


def _bytes_alone(kind: pa.DataType) -> list[Steps]:
    return [()] if is_bytes(kind) and not pt.is_fixed_size_binary(kind) else []


def _fixed(kind: pa.DataType) -> list[Steps]:
    return [()] if pt.is_fixed_size_binary(kind) and kind.byte_width >= _LEAST_FIXED else []


def _list_of_structs(kind: pa.DataType) -> list[Steps]:
    return [(LIST, *steps) for steps in _struct_of_bytes(kind.field(0).type)] if is_list(kind) else []


def _list_of_bytes(kind: pa.DataType) -> list[Steps]:
    return [(LIST, *steps) for steps in _bytes_alone(kind.field(0).type)] if is_list(kind) else []


_KINDS = (_struct_of_bytes, _struct_within, _bytes_alone, _fixed, _list_of_structs, _list_of_bytes)

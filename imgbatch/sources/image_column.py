"""Values: which column of a table holds images, and where in a value of it the bytes are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as pt

from imgbatch.errors import InputError
from imgbatch.sources import spelling
from imgbatch.sources.column_types import is_bytes, is_list

LIST = "*"
"""A step from a list to its only value. Other steps are names of struct fields."""

_MIN_FIXED_BYTES = 65
"""Shorter fixed-size values are taken for hashes and ids, unless `source.image_column` names the column."""

Steps = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """The column of images, and where in its values the bytes are."""

    name: str
    """The trimmed name of the column."""
    steps: Steps
    """The steps from a value of the column to the bytes."""

    @property
    def path(self) -> str:
        """The name with the fields of structs, as in `source.image_column`."""
        fields = [step for step in self.steps if step != LIST]
        return ".".join([self.name, *(fields[:-1] if fields[-1:] == ["bytes"] else fields)])


def image_column(schema: pa.Schema, named: str | None) -> ImageColumn | None:
    """Return the column of images, None if there is none.

    Without `named`, the types decide: the first entry of `_KINDS` that matches a column.

    Args:
        schema: columns under their trimmed names.
        named: the name of a column, or with dots a field of a struct in it.

    Raises:
        InputError: several columns match.

    >>> image_column(pa.schema([("id", pa.int64()), ("jpg", pa.binary())]), None).path
    'jpg'
    """
    if named is not None:
        return _by_name(schema, spelling.normalise(named))
    for kind in _KINDS:
        columns = [ImageColumn(field.name, steps) for field in schema for steps in kind(field.type)]
        if columns:
            return _single(columns)
    return None


def _by_name(schema: pa.Schema, named: str) -> ImageColumn | None:
    for at in range(len(named.split(".")), 0, -1):  # the name of a column may itself have dots
        parts = named.split(".")
        name, fields = ".".join(parts[:at]), tuple(parts[at:])
        if name not in schema.names:
            continue
        binary = list(_all_binary(schema.field(name).type))
        below = [steps for steps in binary if tuple(step for step in steps if step != LIST)[: len(fields)] == fields]
        in_bytes = [steps for steps in below if steps[-1:] == ("bytes",)]
        if below:
            return _single([ImageColumn(name, steps) for steps in in_bytes or below])
    return None


def _single(columns: list[ImageColumn]) -> ImageColumn:
    if len(columns) > 1:
        names = ", ".join(column.path for column in columns)
        raise InputError(f"the columns {names} could all be images: name one with source.image_column")
    return columns[0]


def _all_binary(kind: pa.DataType) -> Iterator[Steps]:
    """Yield the steps to all binary values in a type. In a struct with a field `bytes`, only to that field."""
    if is_bytes(kind):
        yield ()
    elif is_list(kind):
        yield from ((LIST, *steps) for steps in _all_binary(kind.field(0).type))
    elif pt.is_struct(kind):
        yield from _struct_of_bytes(kind) or (
            (field.name, *steps) for field in kind for steps in _all_binary(field.type)
        )


def _struct_of_bytes(kind: pa.DataType) -> list[Steps]:
    """Match the struct in which Hugging Face writes images: `{bytes, path}`."""
    at = kind.get_field_index("bytes") if pt.is_struct(kind) else -1
    return [("bytes",)] if at >= 0 and is_bytes(kind.field(at).type) else []


def _struct_within(kind: pa.DataType) -> list[Steps]:
    if _struct_of_bytes(kind) or not pt.is_struct(kind):
        return _struct_of_bytes(kind)
    return [(field.name, *steps) for field in kind for steps in _struct_within(field.type)]


def _bytes_alone(kind: pa.DataType) -> list[Steps]:
    return [()] if is_bytes(kind) and not pt.is_fixed_size_binary(kind) else []


def _fixed(kind: pa.DataType) -> list[Steps]:
    return [()] if pt.is_fixed_size_binary(kind) and kind.byte_width >= _MIN_FIXED_BYTES else []


def _list_of_structs(kind: pa.DataType) -> list[Steps]:
    return [(LIST, *steps) for steps in _struct_of_bytes(kind.field(0).type)] if is_list(kind) else []


def _list_of_bytes(kind: pa.DataType) -> list[Steps]:
    return [(LIST, *steps) for steps in _bytes_alone(kind.field(0).type)] if is_list(kind) else []


_KINDS = (_struct_of_bytes, _struct_within, _bytes_alone, _fixed, _list_of_structs, _list_of_bytes)

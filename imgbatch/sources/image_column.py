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

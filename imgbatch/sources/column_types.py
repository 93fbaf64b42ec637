"""Values: the Arrow types of columns of tables: which are bytes, text or lists, and the type in which values are carried."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.types as pt

from imgbatch.schema import single_chunk


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is binary, in any of Arrow's layouts.

    >>> is_bytes(pa.binary_view()), is_bytes(pa.dictionary(pa.int8(), pa.binary())), is_bytes(pa.string())
    (True, True, False)
    """
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is a string, in any of Arrow's layouts."""
    return bool(pt.is_string(carried_type(kind)))


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is a list, in any of Arrow's layouts. A map is not a list."""
    return bool(
        pt.is_list(kind)
        or pt.is_large_list(kind)
        or pt.is_fixed_size_list(kind)
        or pt.is_list_view(kind)
        or pt.is_large_list_view(kind)
    )


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is binary or contains binary values at any depth."""
    return is_bytes(kind) or any(holds_bytes(kind.field(at).type) for at in range(kind.num_fields))


def carried_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which values are carried: one type for all layouts of the same values.

    >>> carried_type(pa.dictionary(pa.int8(), pa.large_string())), carried_type(pa.large_list(pa.string_view()))
    (DataType(string), ListType(list<item: string>))
    """
    if isinstance(kind, pa.BaseExtensionType):
        return carried_type(kind.storage_type)
    if pt.is_dictionary(kind):
        return carried_type(kind.value_type)
    if pt.is_large_string(kind) or pt.is_string_view(kind):
        return pa.string()
    if is_bytes(kind):
        return pa.binary()
    if is_list(kind):
        return pa.list_(kind.field(0).with_type(carried_type(kind.field(0).type)))
    if pt.is_struct(kind):
        return pa.struct([field.with_type(carried_type(field.type)) for field in kind])
    return kind


def as_carried(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Convert a column to `kind`, which is `carried_type` of its own type."""
    column = single_chunk(column)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pt.is_list_view(column.type) or pt.is_large_list_view(column.type):  # the cast of pyarrow 26 returns empty lists
        return pa.array(column.to_pylist(), kind)
    return column.cast(kind)


def _leaves(kind: pa.DataType) -> int:
    """Return the number of columns that a field has in a Parquet file."""
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    return sum(_leaves(kind.field(at).type) for at in range(kind.num_fields)) or 1

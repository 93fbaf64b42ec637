"""Values: the union of the columns of several parts, with one type for each column.

Parts of one output may differ in their carried columns. The columns of imgbatch itself have the same type in all of them.
"""

from __future__ import annotations

import json

import pyarrow as pa

from imgbatch.schema import single_chunk


def as_text(values: pa.Array) -> pa.Array:
    """Return values as text that is the same for equal values, also across types: 5 and 5.0 are both '5'.

    >>> as_text(pa.array([5.0, None])).to_pylist(), as_text(pa.array([[1, 2]])).to_pylist()
    (['5', None], ['[1, 2]'])
    """
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type) or pa.types.is_nested(values.type):
        return pa.array(
            [None if value is None else json.dumps(value, default=str) for value in values.to_pylist()], pa.string()
        )
    return values.cast(pa.string())


class CommonColumns:
    """The columns of all tables that were added, in the order in which they were seen first.

    Integers of several widths become the widest, and so do floats. Columns of other types that differ become text.

    >>> columns = CommonColumns()
    >>> for values in ([1], ["a"]):
    ...     columns.add(pa.table({"n": values}).schema)
    >>> columns.cast(pa.table({"n": [1]}))["n"].to_pylist()
    ['1']
    """

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._nullable: set[str] = set()
        self._tables = 0

    @property
    def schema(self) -> pa.Schema:
        """The columns so far; those without a single value are text, since not every reader supports the type null."""
        types = {name: pa.string() if pa.types.is_null(type_) else type_ for name, type_ in self._types.items()}
        return pa.schema([pa.field(name, type_, name in self._nullable) for name, type_ in types.items()])

    def add(self, schema: pa.Schema) -> None:
        """Add the columns of a table."""
        absent = self._types.keys() - set(schema.names)
        late = set(schema.names) - self._types.keys() if self._tables else set()
        self._nullable |= {*absent, *late, *(entry.name for entry in schema if entry.nullable)}
        self._tables += 1
        for entry in schema:
            known = self._types.get(entry.name, pa.null())
            self._types[entry.name] = _common(known, entry.type)

    def cast(self, table: pa.Table) -> pa.Table:
        """Return a table with all columns, in their common types; absent columns are null.

        Args:
            table: one whose schema was added.
        """
        schema, present = self.schema, set(table.column_names)
        columns = [
            _as(single_chunk(table[entry.name]), entry.type)
            if entry.name in present
            else pa.nulls(len(table), entry.type)
            for entry in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)


def _common(known: pa.DataType, new: pa.DataType) -> pa.DataType:
    if pa.types.is_null(known) or known == new:
        return new
    if pa.types.is_null(new):
        return known
    for is_a in (pa.types.is_signed_integer, pa.types.is_unsigned_integer, pa.types.is_floating):
        if is_a(known) and is_a(new):
            return max(known, new, key=lambda type_: type_.bit_width)
    return pa.string()


def _as(values: pa.Array, type_: pa.DataType) -> pa.Array:
    return as_text(values) if pa.types.is_string(type_) and values.type != type_ else values.cast(type_)

"""Effects: columns that travel along from the input: one schema for all batches, and values that are compared whatever
their type.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.schema import CARRIED, LISTING, carried_fields, single_chunk, with_carried
from imgbatch.uri_index import Keys, UriIndex, hash_strings, uri_keys

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: so no bit of a hash is lost
_CANNOT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError)

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


class Columns:
    """The union of the carried columns of all batches, each with a type that holds the values of every batch.

    Types are unified by Arrow's permissive promotion. What has no common type becomes text.
    """

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._origins: dict[str, str] = {}
        self._warned: set[str] = set()

    @property
    def carried(self) -> pa.Schema:
        """The carried columns so far."""
        return pa.schema(list(self._types.items()))

    @property
    def schema(self) -> pa.Schema:
        """LISTING with the carried columns so far."""
        return with_carried(LISTING, self.carried)

    def take(self, schema: pa.Schema, origin: str = "") -> None:
        """Add the carried columns of a batch.

        Args:
            schema: of the batch.
            origin: the file or input that the batch came from, for messages.

        Raises:
            InputError: a column of lists or structs has no type in common with the batches before.
        """
        for entry in carried_fields(schema):
            kind, known = _plain(entry.type), self._types.get(entry.name)
            if known is None or pa.types.is_null(known):
                self._types[entry.name], self._origins[entry.name] = kind, origin
            elif kind != known:
                self._types[entry.name] = self._common(entry.name, known, kind, origin)

    def cast(self, rows: pa.Table | pa.RecordBatch) -> pa.Table:
        """Return rows with all columns so far, absent ones null. A column becomes text if a value does not fit its type.

        Raises:
            InputError: a value cannot be text either.
        """
        names = [*LISTING.names, *self._types]
        present = set(rows.schema.names)
        columns = [
            single_chunk(rows[name])
            if name in LISTING.names
            else self.fit(name, rows[name])
            if name in present
            else None
            for name in names
        ]
        schema = self.schema  # now that it is known which columns are text
        filled = [
            pa.nulls(rows.num_rows, entry.type) if column is None else column
            for entry, column in zip(schema, columns, strict=True)
        ]
        return pa.Table.from_arrays(filled, schema=schema)

    def fit(self, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Return values of a carried column in its type, which becomes text if they do not fit.

        Raises:
            InputError: a value cannot be text either.
        """
        column = single_chunk(column)
        try:
            return column.cast(self._types[name])
        except _CANNOT as error:
            self._make_text(name, column.type, self._types[name], str(error))
            try:
                return column.cast(pa.string())
            except _CANNOT as second:
                raise InputError(
                    f"column {shown_column(name)}: {second}: give it one type in all inputs, or leave it out"
                ) from second

    def settle(self) -> None:
        """Make columns without a single value text: not every reader of Parquet knows the type null."""
        for name, kind in self._types.items():
            if pa.types.is_null(kind):
                self._types[name] = pa.string()

    def doubtful(self, schema: pa.Schema) -> list[str]:
        """Return the columns of a page with this schema whose values may not fit their type in `schema`."""
        return [
            entry.name
            for entry in carried_fields(schema)
            if entry.type != (kind := self._types[entry.name])
            and not (pa.types.is_null(entry.type) or pa.types.is_string(kind))
        ]

    def _common(self, name: str, known: pa.DataType, kind: pa.DataType, origin: str) -> pa.DataType:
        schemas = [pa.schema([(name, each)]) for each in (known, kind)]
        try:
            return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except _CANNOT as error:
            first = self._origins[name]
            both = f"{known}{f' in {first}' if first else ''} and {kind}{f' in {origin}' if origin else ''}"
            if pa.types.is_nested(known) or pa.types.is_nested(kind):
                raise InputError(
                    f"column {shown_column(name)} is {both}: these go into no one column; give it one type in all inputs, or "
                    "another name in one of them"
                ) from error
            self._warn(name, f"is {both}")
            return pa.string()

    def _make_text(self, name: str, kind: pa.DataType, wanted: pa.DataType, why: str) -> None:
        if pa.types.is_nested(kind) or pa.types.is_nested(wanted):
            raise InputError(
                f"column {shown_column(name)} is {kind} here and {wanted} there, and the one does not fit the other ({why}): "
                "give it one type in all inputs"
            )
        self._warn(name, f"is {kind} here and {wanted} there, and not every value fits ({why})")
        self._types[name] = pa.string()

    def _warn(self, name: str, what: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning("column %s %s: it is carried as text", shown_column(name), what)


@dataclass(frozen=True, slots=True)
class NewValues:
    """Values of carried columns for images whose rows are in one part."""

    keys: Keys
    values: pa.Table

    def into(self, part: pa.Table) -> pa.Table:
        """Return the part with these values in those of the columns that it has.

        Raises:
            InputError: a column's new type has nothing in common with that of the part.
        """
        index = UriIndex(row=np.int64)
        index.add(self.keys, row=np.arange(len(self.keys)))
        source = np.arange(len(part))
        for columns, rows, positions in index.lookup(uri_keys(single_chunk(part["uri"]))):
            source[rows] = len(part) + columns["row"][positions]
        for at, entry in enumerate(part.schema):
            if entry.name in self.values.column_names:
                values = _in_one_type(entry.name, single_chunk(part[entry.name]), single_chunk(self.values[entry.name]))
                part = part.set_column(at, entry.with_type(values.type), values.take(pa.array(source)))
        return part


def _in_one_type(name: str, own: pa.Array, others: pa.Array) -> pa.Array:
    """Return the values of both arrays as one."""
    columns = Columns()
    for values, origin in ((own, "the output"), (others, "the input")):
        columns.take(pa.schema([(name, values.type)]), origin)
    for _ in range(2):  # the second time as text, if values do not fit
        arrays = [columns.fit(name, values) for values in (own, others)]
    return pa.concat_arrays(arrays)


def row_hashes(rows: pa.Table, columns: pa.Schema) -> npt.NDArray[np.uint32]:
    """Return a 32-bit hash of each row over these columns; equal values have equal ones in whatever type they are.

    Two rows that differ share one with a probability of 2e-10.
    """
    hashes = np.zeros(len(rows), np.uint64)
    for entry in columns:
        hashes = hashes * _FACTOR + hash_strings(as_text(_like(single_chunk(rows[entry.name]), entry.type)))
    return (hashes >> np.uint64(32)).astype(np.uint32)


def _like(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return numbers or times in another such type, if they fit: as a double 0.1 is written otherwise than as a float."""
    if any(of(values.type) and of(kind) for of in (_is_number, pa.types.is_temporal)):
        with suppress(*_CANNOT):
            return values.cast(kind)
    return values


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def as_text(values: pa.Array) -> pa.Array:
    """Return values as text that is alike for equal ones, whatever their type: 5 and 5.0 are both '5'.

    >>> as_text(pa.array([5.0, None])).to_pylist(), as_text(pa.array([[1, 2]])).to_pylist()
    (['5', None], ['[1, 2]'])
    """
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type) or pa.types.is_nested(values.type):
        return pa.array(
            [None if value is None else json.dumps(value, default=str) for value in values.to_pylist()], pa.string()
        )
    return values.cast(pa.string())


def has_value(values: pa.Array) -> Mask:
    """Return a mask of the values that are neither null nor blank text."""
    there = values.is_valid()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        there = pc.and_(there, pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(values), ""), False))
    return np.asarray(there)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type that holds values without Arrow's encodings of them."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    views = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    return views.get(kind, kind)


def shown_column(name: str) -> str:
    """Return a carried column as the input calls it."""
    return repr(name.removeprefix(CARRIED))

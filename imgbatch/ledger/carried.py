"""Effects: carried columns: one schema for the columns of all batches, and comparison of values across types."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.ledger.common_columns import as_text
from imgbatch.schema import CARRIED, LISTING, carried_fields, single_chunk, with_carried
from imgbatch.uri_index import Keys, UriIndex, hash_strings, uri_keys

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses no bit of a hash
_CAST_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError)

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


class CarriedColumns:
    """The union of the carried columns of all batches, each with a type that holds the values of every batch.

    Types are unified by Arrow's permissive promotion. Columns without a common type become text.
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
            origin: the file or input that the batch is from, for messages.

        Raises:
            InputError: a column of lists or structs has no common type with that of earlier batches.
        """
        for entry in carried_fields(schema):
            new_type, old_type = _plain(entry.type), self._types.get(entry.name)
            if old_type is None or pa.types.is_null(old_type):
                self._types[entry.name], self._origins[entry.name] = new_type, origin
            elif new_type != old_type:
                self._types[entry.name] = self._common(entry.name, old_type, new_type, origin)

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
        schema = self.schema  # after the casts, which may have made columns text
        filled = [
            pa.nulls(rows.num_rows, entry.type) if column is None else column
            for entry, column in zip(schema, columns, strict=True)
        ]
        return pa.Table.from_arrays(filled, schema=schema)

    def fit(self, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Return values of a carried column in its type, which becomes text if they do not fit it.

        Raises:
            InputError: a value cannot be text either.
        """
        column = single_chunk(column)
        try:
            return column.cast(self._types[name])
        except _CAST_ERRORS as error:
            self._make_text(name, column.type, self._types[name], str(error))
            try:
                return column.cast(pa.string())
            except _CAST_ERRORS as text_error:
                raise InputError(
                    f"column {shown_column(name)}: {text_error}: give it one type in all inputs, or omit it"
                ) from text_error

    def settle(self) -> None:
        """Make columns without a single value text: not every Parquet reader supports the type null."""
        for name, type_ in self._types.items():
            if pa.types.is_null(type_):
                self._types[name] = pa.string()

    def may_not_fit(self, schema: pa.Schema) -> list[str]:
        """Return the columns of a page with this schema in which values may not fit the type in `self.schema`."""
        return [
            entry.name
            for entry in carried_fields(schema)
            if entry.type != (type_ := self._types[entry.name])
            and not (pa.types.is_null(entry.type) or pa.types.is_string(type_))
        ]

    def _common(self, name: str, old_type: pa.DataType, new_type: pa.DataType, origin: str) -> pa.DataType:
        schemas = [pa.schema([(name, type_)]) for type_ in (old_type, new_type)]
        try:
            return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except _CAST_ERRORS as error:
            old_origin = self._origins[name]
            types = f"{old_type}{f' in {old_origin}' if old_origin else ''} and {new_type}{f' in {origin}' if origin else ''}"
            if pa.types.is_nested(old_type) or pa.types.is_nested(new_type):
                raise InputError(
                    f"column {shown_column(name)} is {types}, which have no common type; give it one type in all inputs, or "
                    "another name in one of them"
                ) from error
            self._warn(name, f"is {types}")
            return pa.string()

    def _make_text(self, name: str, values_type: pa.DataType, column_type: pa.DataType, reason: str) -> None:
        if pa.types.is_nested(values_type) or pa.types.is_nested(column_type):
            raise InputError(
                f"column {shown_column(name)} is {values_type} here and {column_type} there, and the values do not fit "
                f"({reason}): give it one type in all inputs"
            )
        self._warn(name, f"is {values_type} here and {column_type} there, and not every value fits ({reason})")
        self._types[name] = pa.string()

    def _warn(self, name: str, problem: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            log.warning("column %s %s: it is carried as text", shown_column(name), problem)


@dataclass(frozen=True, slots=True)
class NewValues:
    """Values of carried columns for images whose rows are in one part."""

    keys: Keys
    values: pa.Table

    def into(self, part: pa.Table) -> pa.Table:
        """Return the part with these values, in the columns that it has.

        Raises:
            InputError: a column's new type has no common type with that of the part.
        """
        index = UriIndex(row=np.int64)
        index.add(self.keys, row=np.arange(len(self.keys)))
        source = np.arange(len(part))
        for match in index.lookup(uri_keys(single_chunk(part["uri"]))):
            source[match.rows] = len(part) + match["row"]
        for at, entry in enumerate(part.schema):
            if entry.name in self.values.column_names:
                values = _in_one_type(entry.name, single_chunk(part[entry.name]), single_chunk(self.values[entry.name]))
                part = part.set_column(at, entry.with_type(values.type), values.take(pa.array(source)))
        return part


def _in_one_type(name: str, part_values: pa.Array, input_values: pa.Array) -> pa.Array:
    """Return the values of both arrays as one."""
    columns = CarriedColumns()
    for values, origin in ((part_values, "the output"), (input_values, "the input")):
        columns.take(pa.schema([(name, values.type)]), origin)
    for _ in range(2):  # the second time as text, if values do not fit
        arrays = [columns.fit(name, values) for values in (part_values, input_values)]
    return pa.concat_arrays(arrays)


def row_hashes(rows: pa.Table, columns: pa.Schema) -> npt.NDArray[np.uint32]:
    """Return a 32-bit hash of each row over these columns; equal values have equal hashes, also across types.

    Two rows that differ share one with a probability of 2e-10.
    """
    hashes = np.zeros(len(rows), np.uint64)
    for entry in columns:
        hashes = hashes * _FACTOR + hash_strings(as_text(_like(single_chunk(rows[entry.name]), entry.type)))
    return (hashes >> np.uint64(32)).astype(np.uint32)


def _like(values: pa.Array, type_: pa.DataType) -> pa.Array:
    """Return numbers or times in another such type, if they fit: 0.1 has another text as a double than as a float."""
    if any(is_a(values.type) and is_a(type_) for is_a in (_is_number, pa.types.is_temporal)):
        with suppress(*_CAST_ERRORS):
            return values.cast(type_)
    return values


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_))


def has_value(values: pa.Array) -> Mask:
    """Return a mask of the values that are neither null nor blank text."""
    present = values.is_valid()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        present = pc.and_(present, pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(values), ""), False))
    return np.asarray(present)


def _plain(type_: pa.DataType) -> pa.DataType:
    """Return the type of the values without Arrow's encodings (dictionaries, views)."""
    if pa.types.is_dictionary(type_):
        return _plain(type_.value_type)
    views = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    return views.get(type_, type_)


def shown_column(name: str) -> str:
    """Return the name of a carried column in the input, quoted."""
    return repr(name.removeprefix(CARRIED))

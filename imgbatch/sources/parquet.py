"""Images that are rows of a Parquet file: a column of bytes, or of `{bytes, path}` as Hugging Face writes it.

A row's URI is `FILE#ROW`, its version that of the file. Row groups are the unit of work, since one is read as a whole. The
driver reads footers and the columns that travel along, workers the image column; nobody reads more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.errors import Conflict, InputError
from imgbatch.listing import Found
from imgbatch.schema import CARRIED, LISTING, PARQUET, whole
from imgbatch.storage import Meta, Stores

_PATH = CARRIED + "path"
"""The file name beside the bytes, where Hugging Face keeps one."""

_AT_ONCE_BYTES = 64 << 20  # a column chunk up to this is one GET; larger ones are read in pieces
_PIECE_BYTES = 8 << 20
_ROWS = 64


def image_column(schema: pa.Schema, named: str | None) -> str | None:
    """Return the column that holds images: the named one, else the one of `{bytes, …}`, else the only one of bytes.

    >>> image_column(pa.schema([("id", pa.int64()), ("jpg", pa.binary())]), None)
    'jpg'
    """
    if named is not None:
        return named if named in schema.names and _holds_bytes(schema.field(named).type) else None
    structs = [field.name for field in schema if pa.types.is_struct(field.type) and _holds_bytes(field.type)]
    plain = [field.name for field in schema if not pa.types.is_struct(field.type) and _holds_bytes(field.type)]
    found = structs or plain
    if len(found) > 1:
        raise InputError(f"the columns {', '.join(found)} could all be images: name one with source.image_column")
    return found[0] if found else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        kind = kind.field(at).type if at >= 0 else pa.null()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass(frozen=True)
class ImageTable:
    """One Parquet file of images."""

    stores: Stores
    uri: str
    meta: Meta
    named: str | None = None
    """The image column, where it is named and not looked for."""

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        with self.stores.ranges(self.uri, self.meta) as file:
            try:
                return pq.ParquetFile(file).metadata
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{self.uri} cannot be read as Parquet: {error}") from error

    @cached_property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return self._footer.schema.to_arrow_schema()

    @cached_property
    def column(self) -> str | None:
        """The image column, None if there is none."""
        try:
            return image_column(self.schema, self.named)
        except InputError as error:
            raise InputError(f"{self.uri}: {error}") from error

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """The first row of each row group, and the number of rows."""
        rows = [self._footer.row_group(group).num_rows for group in range(self._footer.num_row_groups)]
        return np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    @cached_property
    def carried(self) -> pa.Schema:
        """The columns that travel along: all but bytes and structs, and the path beside the bytes."""
        fields = []
        for field in self.schema:
            if field.name == self.column and pa.types.is_struct(field.type):
                if field.type.get_field_index("path") >= 0 and _PATH not in (
                    CARRIED + name for name in self.schema.names
                ):
                    fields.append(pa.field(_PATH, pa.string()))
            elif not (pa.types.is_struct(field.type) or _holds_bytes(field.type)):
                fields.append(pa.field(CARRIED + field.name, self._carried_type(field)))
        return pa.schema(fields)

    def found(self) -> Iterator[Found]:
        """Yield the rows, a batch a row group.

        Raises:
            InputError: a row group does not hold the rows that the footer promises.
        """
        for group in range(len(self.starts) - 1):
            numbers = pa.array(np.arange(self.starts[group], self.starts[group + 1]))
            count = len(numbers)
            columns = {
                "uri": pc.binary_join_element_wise(f"{self.uri}#", numbers.cast(pa.string()), ""),
                "size": pa.nulls(count, pa.int64()),
                "etag": pa.repeat(pa.scalar(self.meta.etag, pa.string()), count),
                "last_modified": pa.repeat(
                    pa.scalar(self.meta.last_modified, LISTING.field("last_modified").type), count
                ),
                "container": pa.repeat(PARQUET, count),
                **self._carried_values(group),
            }
            yield Found(pa.record_batch(columns, schema=pa.schema([*LISTING, *self.carried])), whole=True)

    def images(self, group: int, rows: npt.NDArray[np.int64]) -> Iterator[bytes | None]:
        """Yield the bytes of ascending rows of a row group, counted from its first one; None where a row has none."""
        assert self.column is not None
        is_struct = pa.types.is_struct(self.schema.field(self.column).type)
        size = self._footer.row_group(group).total_byte_size
        with self.stores.ranges(self.uri, self.meta) as file:
            buffer = _PIECE_BYTES if size > _AT_ONCE_BYTES else 0
            parquet = pq.ParquetFile(file, metadata=self._footer, buffer_size=buffer, pre_buffer=False)
            leaf = f"{self.column}.bytes" if is_struct else self.column
            first = 0
            for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=[leaf], use_threads=False):
                column = batch.column(0)
                values = column.field(0) if is_struct else column
                here = rows[(rows >= first) & (rows < first + len(values))] - first
                yield from (values[at].as_py() for at in here.tolist())
                first += len(values)

    def require_unchanged(self, etag: str | None, last_modified: datetime | None, row: int) -> None:
        """Raise if the file is another than the one that was listed, which had such a row.

        Raises:
            Conflict: it is.
        """
        listed, found = (etag, self.meta.etag) if etag is not None else (last_modified, self.meta.last_modified)
        other = listed is not None and found is not None and listed != found
        if other or self.column is None or row >= self.starts[-1]:
            raise Conflict(f"read {self.uri}: it was replaced while the run went on")

    @cached_property
    def _label_names(self) -> dict[str, list[str]]:
        """The names of the classes, of columns of class numbers that Hugging Face describes in the footer."""
        try:
            described = json.loads((self._footer.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
            return {name: kind["names"] for name, kind in described.items() if kind.get("_type") == "ClassLabel"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _carried_type(self, field: pa.Field) -> pa.DataType:
        if field.name in self._label_names:
            return pa.string()
        return field.type.value_type if pa.types.is_dictionary(field.type) else field.type

    def _carried_values(self, group: int) -> dict[str, pa.Array]:
        if not self.carried.names:
            return {}
        leaves = {CARRIED + name: name for name in self.schema.names}
        wanted = [leaves.get(name, f"{self.column}.path") for name in self.carried.names]
        with self.stores.ranges(self.uri, self.meta) as file:
            parquet = pq.ParquetFile(file, metadata=self._footer, pre_buffer=False)
            table = parquet.read_row_group(group, columns=wanted, use_threads=False)
        if len(table) != (promised := self._footer.row_group(group).num_rows):
            raise InputError(
                f"{self.uri}: row group {group} has {len(table)} rows, its footer says {promised}: mend the file"
            )
        values = {}
        for entry in self.carried:
            if entry.name not in leaves:
                values[entry.name] = whole(pc.struct_field(table[self.column], "path"))
                continue
            column = whole(table[leaves[entry.name]])
            names = self._label_names.get(leaves[entry.name])
            if names is not None:  # -1, or beyond the names: a test split whose classes are not told
                known = pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names)))
                column = pa.array(names, pa.string()).take(pc.if_else(known, column, None))
            values[entry.name] = column.cast(entry.type)
        return values

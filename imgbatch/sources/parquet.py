"""Effects: images that are rows of a Parquet file: a column of bytes, or of `{bytes, path}` as Hugging Face writes it.

The URI of a row is `FILE#ROW`, and its version is that of the file. The unit of work is a row group, since a row group is read
as a whole. The driver reads only footers and carried columns, and workers read only the image column.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.decode.other_kinds import describe_placeholder
from imgbatch.errors import Conflict, InputError, StoreError
from imgbatch.rejects import Refusal
from imgbatch.schema import CARRIED, LISTING, PARQUET, single_chunk
from imgbatch.sources.base import ListingBatch
from imgbatch.sources.column_types import is_text
from imgbatch.sources.columns import TableColumns
from imgbatch.sources.image_column import LIST, ImageColumn, Steps, image_column
from imgbatch.storage.stores import Meta, Stores

_PATH = CARRIED + "path"
"""The file name that Hugging Face stores next to the bytes."""

_AT_ONCE_BYTES = 64 << 20  # a column chunk up to this size is read in one GET, a larger one in pieces
_PIECE_BYTES = 8 << 20
_ROWS, _START = 64, 2_048


@dataclass(frozen=True)
class ImageTable:
    """One Parquet file of images."""

    stores: Stores
    uri: str
    meta: Meta
    named: str | None = None
    """The name of the image column; None: the types decide."""

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        with self.stores.ranges(self.uri, self.meta) as file:
            try:
                return pq.ParquetFile(file).metadata
            except (pa.ArrowException, OSError) as error:
                with suppress(OSError, StoreError):  # it only improves a message
                    file.seek(0)
                    if kind := describe_placeholder(file.read(_START)):
                        raise InputError(f"{self.uri} is not a Parquet file, but {kind}") from error
                raise InputError(f"{self.uri} cannot be read as Parquet: {error}") from error

    @cached_property
    def columns(self) -> TableColumns:
        """The columns, under their trimmed names."""
        return TableColumns(self._footer, self.uri)

    @cached_property
    def column(self) -> ImageColumn | None:
        """The image column, None if there is none."""
        names = self.columns.names
        fields = [field.with_name(name) for field, name in zip(self.columns.schema, names, strict=True)]
        try:
            return image_column(pa.schema(fields), self.named)
        except InputError as error:
            raise InputError(f"{self.uri}: {error}") from error

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """The number of the first row of each row group, and at the end the number of rows."""
        rows = [self._footer.row_group(group).num_rows for group in range(self._footer.num_row_groups)]
        return np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    @cached_property
    def carried(self) -> pa.Schema:
        """The carried columns, and the path next to the bytes."""
        fields = [(CARRIED + name, kind) for name, kind in self._carried.items()]
        if self._path is not None and _PATH not in (CARRIED + name for name in self.columns.names):
            fields.append((_PATH, pa.string()))
        return pa.schema(fields)

    @cached_property
    def _carried(self) -> dict[str, pa.DataType]:
        return self.columns.carried(image=self.column.name if self.column else None)

    @cached_property
    def _path(self) -> str | None:
        """The Parquet column with the file name next to the bytes; None if there is none, or if it is in a list."""
        if self.column is None or self.column.steps[-1:] != ("bytes",) or LIST in self.column.steps:
            return None
        kind = self.columns.field(self.column.name).type
        for step in self.column.steps[:-1]:
            kind = kind.field(step).type
        at = kind.get_field_index("path")
        return self._leaf(*self.column.steps[:-1], "path") if at >= 0 and is_text(kind.field(at).type) else None

    def _leaf(self, *steps: str) -> str:
        assert self.column is not None
        return ".".join([self.columns.raw[self.column.name], *steps])

    def list_images(self) -> Iterator[ListingBatch]:
        """Yield the rows, one batch per row group.

        Raises:
            InputError: a row group has another number of rows than the footer says.
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
            yield ListingBatch(pa.record_batch(columns, schema=pa.schema([*LISTING, *self.carried])), whole=True)

    def images(self, group: int, rows: npt.NDArray[np.int64]) -> Iterator[bytes | Refusal]:
        """Yield the bytes of rows of a row group, or why a row has none.

        Args:
            rows: ascending, counted from the first row of the group.
        """
        assert self.column is not None
        steps = self.column.steps
        size = self._footer.row_group(group).total_byte_size
        with self.stores.ranges(self.uri, self.meta) as file:
            buffer = _PIECE_BYTES if size > _AT_ONCE_BYTES else 0
            parquet = pq.ParquetFile(file, metadata=self._footer, buffer_size=buffer, pre_buffer=False)
            leaf = self._leaf() if LIST in steps else self._leaf(*steps)
            first = 0
            for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=[leaf], use_threads=False):
                values = batch.column(batch.schema.get_field_index(self._leaf()))
                in_batch = rows[(rows >= first) & (rows < first + len(values))] - first
                for at in in_batch.tolist():
                    content = _bytes_in(values[at].as_py(), steps)
                    yield self._without_bytes(group, first + at) if content is None else content
                first += len(values)

    def _without_bytes(self, group: int, row: int) -> Refusal:
        path = self._paths(group)[row].as_py() if self._path is not None else None
        if path is None:
            return Refusal("fetch", "empty", "the row has no bytes")
        return Refusal(
            "fetch",
            "empty",
            f"the row has no bytes, only the path {path[:200]!r}: write the images into the Parquet file, or give a manifest "
            "that names the files",
        )

    @cached_property
    def _last_paths(self) -> dict[int, pa.Array]:
        return {}

    def _paths(self, group: int) -> pa.Array:
        """Return the file names of a row group. Those of the last row group are cached."""
        paths = self._last_paths.get(group)  # a dict, since threads read two row groups at a time
        if paths is None:
            with self.stores.ranges(self.uri, self.meta) as file:
                parquet = pq.ParquetFile(file, metadata=self._footer, pre_buffer=False)
                table = parquet.read_row_group(group, columns=[self._path], use_threads=False)
            paths = self._path_values(table)
            self._last_paths.clear()
            self._last_paths[group] = paths
        return paths

    def _path_values(self, table: pa.Table) -> pa.Array:
        assert self.column is not None
        values = single_chunk(table.column(table.schema.get_field_index(self._leaf())))
        return pc.struct_field(values, [*self.column.steps[:-1], "path"]).cast(pa.string())

    def require_unchanged(self, etag: str | None, last_modified: datetime | None, row: int) -> None:
        """Refuse a file that has changed since it was listed.

        Args:
            etag: as listed, like `last_modified`.
            row: the number of a row that the listed file had.

        Raises:
            Conflict: the file has changed.
        """
        listed, current = (etag, self.meta.etag) if etag is not None else (last_modified, self.meta.last_modified)
        changed = listed is not None and current is not None and listed != current
        if changed or self.column is None or row >= self.starts[-1]:
            raise Conflict(f"read {self.uri}: it was replaced during the run")

    def _carried_values(self, group: int) -> dict[str, pa.Array]:
        if not self.carried.names:
            return {}
        path = self._path if _PATH in self.carried.names and "path" not in self._carried else None
        names = [self.columns.raw[name] for name in self._carried] + ([path] if path else [])
        with self.stores.ranges(self.uri, self.meta) as file:
            try:
                parquet = pq.ParquetFile(
                    file, metadata=self._footer, pre_buffer=False, read_dictionary=self.columns.binary
                )
                table = parquet.read_row_group(group, columns=names, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{self.uri}: row group {group} cannot be read: {error}") from error
        if len(table) != (count := self._footer.row_group(group).num_rows):
            raise InputError(
                f"{self.uri}: row group {group} has {len(table)} rows, but the footer says {count}. Write the file again"
            )
        values = {CARRIED + name: self.columns.values(table, name, kind) for name, kind in self._carried.items()}
        return {**values, **({_PATH: self._path_values(table)} if path else {})}


def _bytes_in(value: Any, steps: Steps) -> bytes | Refusal | None:
    """Return the bytes in a value of the image column, None if it has none."""
    for at, step in enumerate(steps):
        if value is None:
            return None
        if step != LIST:
            value = value[step]
        elif len(value) > 1:
            column = ".".join(name for name in steps[:at] if name != LIST)
            return Refusal(
                "fetch",
                "unsupported",
                f"the row has {len(value)} images{f' in {column}' if column else ''}: write one row per image",
            )
        else:
            value = value[0] if value else None
    return value  # type: ignore[no-any-return]

"""Effects: the images of an S3 Inventory report. S3 writes it at night, and reading it replaces a request per thousand keys.

The input is the report's `manifest.json`. Its data files, CSV (gzip) or Parquet, are read as streams. Old versions and
delete markers are ignored. If an object has changed since the report, reading the object shows that.

Source: Amazon S3 User Guide, "Locating your inventory list".
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, cast
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from imgbatch.errors import InputError
from imgbatch.schema import LISTING, single_chunk
from imgbatch.sources.base import ListingBatch
from imgbatch.sources.patterns import Candidates
from imgbatch.storage.base import unquote_etags
from imgbatch.storage.stores import Stores

NAME = "manifest.json"
_ROWS, _BLOCK = 10_000, 1 << 20

# The names of the columns in the manifest, and in a Parquet file. CSV files have no header.
_COLUMNS = {
    "Bucket": "bucket",
    "Key": "key",
    "Size": "size",
    "ETag": "e_tag",
    "LastModifiedDate": "last_modified_date",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
}


class Inventory:
    """One report.

    Raises:
        InputError: the file is not the manifest of a report, or the report has a format that is not supported.
    """

    def __init__(self, stores: Stores, uri: str, suffixes: str) -> None:
        self._stores, self._uri, self._suffixes = stores, uri, suffixes
        try:
            self._report: Mapping[str, Any] = json.loads(stores.read(uri)[0])
            self._format = self._report["fileFormat"]
            self._bucket = str(self._report["destinationBucket"]).rpartition(":")[2]
            self._files = [str(file["key"]) for file in self._report["files"]]
            names = [name.strip() for name in str(self._report["fileSchema"]).split(",")]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{uri} is not the manifest of an S3 Inventory report: {error!r} is missing or wrong"
            ) from error
        if self._format not in ("CSV", "Parquet"):
            raise InputError(
                f"{uri}: inventories in {self._format} are not supported. Configure the inventory to write CSV or Parquet"
            )
        self._names = [_COLUMNS.get(name, name) for name in names]

    def list_images(self) -> Iterator[ListingBatch]:
        """Yield the candidates among the latest versions."""
        candidates = Candidates(self._suffixes)
        for rows in self._rows():
            keep = pc.and_(
                _is(rows, "is_latest", "true"), pc.invert(_is(rows, "is_delete_marker", "true", absent=False))
            )
            keep = pc.and_(keep, candidates.mask(rows["key"]))
            ignored = rows.filter(pc.invert(keep))
            example = ignored["key"][0].as_py() if len(ignored) else ""
            yield ListingBatch(_listed(rows.filter(keep)), ignored=len(ignored), example=example)

    def _rows(self) -> Iterator[pa.Table]:
        for key in self._files:
            uri = f"s3://{self._bucket}/{key}"
            with self._stores.open(uri) as file:
                try:
                    yield from _csv(file, self._names, uri) if self._format == "CSV" else _parquet(file)
                except (pa.ArrowException, OSError, EOFError, zlib.error, KeyError) as error:
                    raise InputError(f"{uri} cannot be read as part of {self._uri}: {error}") from error


def _csv(file: BinaryIO, names: list[str], uri: str) -> Iterator[pa.Table]:
    """Yield the rows of a CSV without a header, whose keys are percent-encoded.

    Raises:
        InputError: a row is longer than a block.
    """
    read = 0
    try:
        for table in _rows_of_csv(file, names):
            read += len(table)
            yield table
    except pa.ArrowInvalid as error:
        if "block size" not in str(error):
            raise
        raise InputError(
            f"{uri} cannot be read as CSV: after line {read:,} comes a line of more than {_BLOCK >> 20} MB, although keys have "
            "up to 1,024 bytes. The file is damaged, or a quote in it is not closed. Use the report of another day, or give "
            "the prefix itself as --input"
        ) from error


def _rows_of_csv(file: BinaryIO, names: list[str]) -> Iterator[pa.Table]:
    as_text = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    options = pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=_BLOCK)
    with (
        gzip.open(file) as text,
        pa_csv.open_csv(pa.PythonFile(cast(Any, text), "r"), read_options=options, convert_options=as_text) as batches,
    ):
        for batch in batches:
            table = pa.Table.from_batches([batch])
            keys = pa.array([unquote_plus(key) for key in table["key"].to_pylist()], pa.string())
            yield table.set_column(names.index("key"), "key", keys)


def _parquet(file: BinaryIO) -> Iterator[pa.Table]:
    parquet = pq.ParquetFile(file, pre_buffer=False)
    columns = [name for name in parquet.schema_arrow.names if name in _COLUMNS.values()]
    for batch in parquet.iter_batches(_ROWS, columns=columns, use_threads=False):
        yield pa.Table.from_batches([batch])


def _is(rows: pa.Table, name: str, text: str, *, absent: bool = True) -> pa.ChunkedArray | pa.Array:
    """Return a mask of the rows in which a column has this text; `absent` if the report, without versions, lacks it."""
    if name not in rows.column_names:
        return pa.array([absent] * len(rows), pa.bool_())
    return pc.equal(pc.utf8_lower(rows[name].cast(pa.string())), text)


def _listed(rows: pa.Table) -> pa.RecordBatch:
    count = len(rows)
    values = {
        name: rows[name] if name in rows.column_names else pa.nulls(count, pa.string()) for name in _COLUMNS.values()
    }
    sizes = values["size"].cast(pa.string())
    times = values["last_modified_date"]
    if pa.types.is_string(times.type):
        times = pc.if_else(pc.equal(times, ""), None, times)
    columns = [
        pc.binary_join_element_wise("s3://", rows["bucket"], "/", rows["key"], ""),
        pc.if_else(pc.equal(sizes, ""), None, sizes).cast(pa.int64()),
        unquote_etags(single_chunk(values["e_tag"])),
        times.cast(LISTING.field("last_modified").type),
        pa.nulls(count, pa.string()),
    ]
    return pa.record_batch([single_chunk(column) for column in columns], schema=LISTING)

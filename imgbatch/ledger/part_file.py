"""Values: one part of a log as the bytes of a Parquet file: its rows, and its footer in the key-value metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.errors import OutputError
from imgbatch.schema import EMBEDDING, FORMAT_VERSION

_WITH_STATISTICS = {
    "uri",
    "label",
    "label_id",
    "score",
    "width",
    "height",
    "run_id",
    "model",
    "stage",
    "reason",
    "passing",
    "attempts",
}
"""Columns whose row groups have statistics, so that nulls are found without reading the column: some 600 bytes a part."""


@dataclass(frozen=True, slots=True)
class Footer:
    """The metadata of a part, in the key-value metadata of the Parquet file."""

    run_id: str
    fingerprint: Mapping[str, Any]
    nonce: str = ""
    """A new random value for each attempt to write a part: it distinguishes our own retried PUT from that of another writer."""
    seal: bool = False
    """An empty part that takes a number, so that a late PUT of a dead run cannot take it."""
    streams: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """How far each stream is read, see `tar_progress`. The key in the file is `shards`, as version 0.1 called it."""

    def metadata(self) -> dict[str, str]:
        """Return the footer as key-value metadata."""
        return {
            "format_version": str(FORMAT_VERSION),
            "run_id": self.run_id,
            "fingerprint": json.dumps(self.fingerprint, sort_keys=True),
            "nonce": self.nonce,
            "seal": json.dumps(self.seal),
            "shards": json.dumps(self.streams),
        }


def encode(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """Return a part as Parquet bytes."""
    sink = io.BytesIO()
    with open_writer(sink, table.schema, metadata) as writer:
        if len(table):  # a row group of 0 rows is valid Parquet, but Hugging Face's `datasets` fails on it
            writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
    return sink.getvalue()


def open_writer(sink: io.BytesIO, schema: pa.Schema, metadata: Mapping[str, str]) -> pq.ParquetWriter:
    """Return a writer of rows of labels/ or rejects/, with their compression, encodings and statistics.

    Args:
        sink: receives the file.
        schema: of the rows.
        metadata: the key-value metadata of the file.
    """
    plain = [name for name in ("uri", "etag") if name in schema.names]
    # snappy writes 47,000 rows/s of 1,280 numbers, zstd 27,000. BYTE_STREAM_SPLIT is smaller, but DuckDB cannot read it.
    codecs = {name: "snappy" if name.startswith(f"{EMBEDDING}.") else "zstd" for name in _leaves(schema)}
    return pq.ParquetWriter(
        sink,
        schema.with_metadata(dict(metadata)),
        compression=codecs,
        use_dictionary=[name for name in _leaves(schema) if name not in plain and codecs[name] == "zstd"],
        write_statistics=[name for name in schema.names if name in _WITH_STATISTICS],
    )


def decode(
    data: bytes, uri: str, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> tuple[pa.Table, Footer]:
    """Return the rows and the footer of a part.

    Args:
        data: the bytes of the file.
        uri: of the part, for messages.
        columns: which columns to read; None: all.
        optional: columns that are read as well if the part has them.

    Raises:
        OutputError: the bytes are not a part that imgbatch wrote, are truncated, or come from a newer version.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        footer = footer_of(file.metadata.metadata or {}, uri)
        if missing := set(columns or ()) - set(file.schema_arrow.names):
            raise OutputError(f"{uri} lacks the columns {', '.join(sorted(missing))}: move it away, then run again")
        if columns is not None:
            columns = [*columns, *(name for name in optional if name in file.schema_arrow.names)]
        return file.read(columns=columns, use_threads=False), footer
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"{uri} is not a complete Parquet file ({error}); it is not counted as done: move it away, then run again"
        ) from error


def footer_of(metadata: Mapping[bytes, bytes], uri: str) -> Footer:
    """Return the footer of a part from its key-value metadata.

    Args:
        metadata: of the Parquet file.
        uri: of the part, for messages.

    Raises:
        OutputError: imgbatch did not write it, or a newer version did.
    """
    foreign = f"{uri} was not written by imgbatch: move it away, or choose another --output"
    try:
        version = int(metadata[b"format_version"])
        if version > FORMAT_VERSION:  # checked before all other keys, whose meaning may have changed
            raise OutputError(
                f"{uri} has format version {version}, this imgbatch supports {FORMAT_VERSION}: use a newer imgbatch"
            )
        fingerprint = json.loads(metadata[b"fingerprint"])
        footer = Footer(
            run_id=metadata[b"run_id"].decode(),
            fingerprint=fingerprint,
            nonce=metadata[b"nonce"].decode(),
            seal=json.loads(metadata[b"seal"]),
            streams=json.loads(metadata[b"shards"]),
        )
    except (KeyError, ValueError) as error:
        raise OutputError(foreign) from error
    if not isinstance(fingerprint, dict):
        raise OutputError(foreign)
    return footer


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the paths of the leaf columns, as Parquet names them."""
    names: list[str] = []

    def add(path: str, type_: pa.DataType) -> None:
        if pa.types.is_struct(type_):
            for entry in type_:
                add(f"{path}.{entry.name}", entry.type)
        elif pa.types.is_list(type_):
            add(f"{path}.list.element", type_.value_type)
        else:
            names.append(path)

    for column in schema:
        add(column.name, column.type)
    return names

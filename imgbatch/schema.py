"""Values: the columns of every table that imgbatch reads or writes: names and Arrow types, written once.

`LISTING` is the result of a source, `LABELS` and `REJECTS` are the two tables that a user queries. Columns of a manifest
are copied to both, with the prefix `input_`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from imgbatch.errors import ConfigError, did_you_mean

FORMAT_VERSION = 1
"""The version in the footer of every part. A part with a higher one is refused: its columns may have another meaning."""

CARRIED = "input_"
"""Prefix of the columns that are copied from a manifest into both tables."""

_TIME = pa.timestamp("us", tz="UTC")

_OBJECT = [
    pa.field("size", pa.int64()),
    pa.field("etag", pa.string()),
    pa.field("last_modified", _TIME),
]
_RUN = [pa.field("run_id", pa.string(), nullable=False), pa.field("model", pa.string(), nullable=False)]

URI = pa.field("uri", pa.string(), nullable=False)
INDEX = pa.field("index", pa.int64(), nullable=False)
"""The image's number in the listing of this run; it is in no table."""

LISTING = pa.schema([URI, *_OBJECT, pa.field("container", pa.string())])
"""The images of a source. `container`: PARQUET for a row of a Parquet file; TAR for a tar, which is listed in place of its
members, since their names are not known before it is read; null for an object."""

PARQUET, TAR = "parquet", "tar"

CANDIDATE = pa.struct([("label", pa.string()), ("label_id", pa.int32()), ("score", pa.float32())])
LEVEL = pa.struct([("level", pa.string()), ("label", pa.string()), ("score", pa.float32())])

_ANSWER = [
    pa.field("label", pa.string()),
    pa.field("label_id", pa.int32()),
    pa.field("score", pa.float32()),
    pa.field("top_k", pa.list_(CANDIDATE)),
    pa.field("levels", pa.list_(LEVEL)),
    pa.field("answer", pa.string()),
    pa.field("answer_level", pa.string()),
    pa.field("answer_score", pa.float32()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
]
EMBEDDING = "embedding"
"""The column of labels/ with `output.embeddings=true`: a fixed-size list of float16."""
CONTENT_HASH = "content_hash"
"""The column of labels/ with `output.content_hash=true`: see `training_images.content_hash`."""

_REFUSAL = [
    pa.field("stage", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("message", pa.string()),
    pa.field("passing", pa.bool_()),
    pa.field("attempts", pa.int32()),
]

LABELS = pa.schema([URI, *_ANSWER, *_OBJECT, *_RUN])
REJECTS = pa.schema([URI, *_REFUSAL, *_OBJECT, *_RUN])

_PLACE = [
    pa.field("offset", pa.int64()),
    pa.field("previous_offset", pa.int64()),
    pa.field("resume_offset", pa.int64()),
]
"""The place of a tar's member: its offset, that of the member before it, and an offset at which reading can resume."""

_HASH = pa.field(CONTENT_HASH, pa.uint64())
RESULTS = pa.schema([INDEX, URI, *_ANSWER, _HASH, *_REFUSAL, *_OBJECT, *_PLACE])
"""The rows that workers send to the driver, one per image. `reason` is null where the image has a label; the hash is null
unless it was requested."""

EVENT = pa.field("event", pa.string())
"""The last column of blocks that workers send: null in rows of images (see `inference.messages`). No table has it."""

PLACE_COLUMNS = [field.name for field in _PLACE]

REFUSAL_COLUMNS = [field.name for field in _REFUSAL]


def labels_with(columns: Sequence[str] = (), features: int | None = None, *, hashed: bool = False) -> pa.Schema:
    """Return the schema of labels/ with these columns, in the order of the table; with all columns if none are named.

    Args:
        columns: columns in addition to those of the image and its version, which the ledger needs.
        features: size of an embedding; None: no embeddings.
        hashed: whether there is a column CONTENT_HASH.

    Raises:
        ConfigError: a column does not exist.

    >>> labels_with(["score", "label"]).names
    ['uri', 'label', 'score', 'size', 'etag', 'last_modified']
    """
    fields = [*LABELS]
    if features is not None:
        fields.insert(LABELS.get_field_index("width"), pa.field(EMBEDDING, pa.list_(pa.float16(), features)))
    if hashed:
        fields.insert([field.name for field in fields].index("size"), _HASH)
    names = [field.name for field in fields]
    for name in columns:
        if name not in names and not name.startswith(CARRIED):
            raise ConfigError(f"output.columns: labels/ has no column {name!r}{_column_hint(name, names)}")
    included = {*columns, EMBEDDING, CONTENT_HASH} if columns else {*names}
    return pa.schema([field for field in fields if field.name in included or field.name in LISTING.names])


def require_carried(columns: Sequence[str], carried: pa.Schema) -> None:
    """Raise ConfigError if a column `input_…` is requested that no input has."""
    for name in columns:
        if name.startswith(CARRIED) and name not in carried.names:
            raise ConfigError(f"output.columns: no input carries {name!r}{_column_hint(name, carried.names)}")


def _column_hint(name: str, columns: Sequence[str]) -> str:
    return did_you_mean(name, columns) or f"; there are: {', '.join(columns)}"


def single_chunk(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column as one array; a single chunk is not copied."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def with_carried(schema: pa.Schema, carried: pa.Schema) -> pa.Schema:
    """Return `schema` followed by the carried columns of a listing.

    >>> names = with_carried(LISTING, pa.schema([("input_split", pa.string())])).names
    >>> names[0], names[-1]
    ('uri', 'input_split')
    """
    return pa.schema([*schema, *carried])


def carried_fields(schema: pa.Schema, columns: Sequence[str] = ()) -> pa.Schema:
    """Return the fields of `schema` that were copied from the input; with `columns`, only these."""
    carried = [field for field in schema if field.name.startswith(CARRIED)]
    return pa.schema([field for field in carried if not columns or field.name in columns])

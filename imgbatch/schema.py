"""The columns of every table that imgbatch reads or writes: names and Arrow types, written once.

`LISTING` is what a source finds, `LABELS` and `REJECTS` are the two tables that a user queries. Columns of a manifest
travel beside them under the prefix `input_`.
"""

from __future__ import annotations

import pyarrow as pa

FORMAT_VERSION = 1
"""Stands in the footer of every part. A part with a higher number is refused: it may mean something else."""

CARRIED = "input_"
"""Prefix of the columns that travel from a manifest into both tables."""

_TIME = pa.timestamp("us", tz="UTC")

_OBJECT = [
    pa.field("size", pa.int64()),
    pa.field("etag", pa.string()),
    pa.field("last_modified", _TIME),
]
_RUN = [pa.field("run_id", pa.string(), nullable=False), pa.field("model", pa.string(), nullable=False)]

URI = pa.field("uri", pa.string(), nullable=False)
INDEX = pa.field("index", pa.int64(), nullable=False)
"""The image's number in the listing of this run; it never leaves the run."""

LISTING = pa.schema([URI, *_OBJECT, pa.field("container", pa.string())])
"""What a source finds. `container`: PARQUET for a row of such a file, null for an object of its own."""

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
_REFUSAL = [
    pa.field("stage", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("message", pa.string()),
    pa.field("passing", pa.bool_()),
    pa.field("attempts", pa.int32()),
]

LABELS = pa.schema([URI, *_ANSWER, *_OBJECT, *_RUN])
REJECTS = pa.schema([URI, *_REFUSAL, *_OBJECT, *_RUN])

RESULTS = pa.schema([INDEX, URI, *_ANSWER, *_REFUSAL, *_OBJECT])
"""What travels from the actors to the driver: a row an image, `reason` null where it has a label."""

ANSWER_COLUMNS = [field.name for field in _ANSWER]
REFUSAL_COLUMNS = [field.name for field in _REFUSAL]


def with_carried(schema: pa.Schema, carried: pa.Schema) -> pa.Schema:
    """Return `schema` followed by the carried columns of a listing.

    >>> names = with_carried(LISTING, pa.schema([("input_split", pa.string())])).names
    >>> names[0], names[-1]
    ('uri', 'input_split')
    """
    return pa.schema([*schema, *carried])


def carried_fields(schema: pa.Schema) -> pa.Schema:
    """Return the fields of `schema` that were carried along from the input."""
    return pa.schema([field for field in schema if field.name.startswith(CARRIED)])

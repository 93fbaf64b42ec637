"""Values: events, which workers send to the driver with their rows of images: errors, notes, and the ends of streams.

An event is a row with JSON in the column `event`, and null in all other columns. `event` is the last column of each block
that a worker yields, and null in rows of images. It exists only between workers and driver: no table has it, and only this
module writes and reads it.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch import errors
from imgbatch.errors import ImgbatchError
from imgbatch.schema import EVENT, RESULTS, single_chunk
from imgbatch.sources.base import StreamEnd

Event = str
"""JSON of an object with one key, its kind."""

_ERROR, _NOTE, _STREAM_END = "error", "note", "stream_end"


class Received(NamedTuple):
    """The content of a block."""

    rows: pa.Table
    """The rows of images, without the column `event`."""
    notes: list[dict[str, Any]]
    """Facts that workers reported about themselves and their nodes."""
    ends: list[StreamEnd]
    """How readers reached the ends of streams."""


def received(block: pa.Table) -> Received:
    """Separate the rows of images in a block from the events.

    Raises:
        ImgbatchError: a worker sent this error; the driver has to end the run.
        RuntimeError: the same for a bug, with the worker's traceback.
    """
    rows, events = split_events(block)
    contents = [json.loads(event) for event in events]
    for content in contents:
        if _ERROR in content:
            raise _error_of(**content[_ERROR])
    return Received(
        rows,
        [content[_NOTE] for content in contents if _NOTE in content],
        [StreamEnd(**content[_STREAM_END]) for content in contents if _STREAM_END in content],
    )


def _error_of(kind: str, message: str) -> Exception:
    error = getattr(errors, kind, None)
    if isinstance(error, type) and issubclass(error, ImgbatchError):
        return error(message)
    return RuntimeError(f"in a worker:\n{message}")


def with_events(rows: pa.Table, *events: Event) -> pa.Table:
    """Return rows of images with the column `event`, followed by a row for each event.

    Args:
        rows: a table without the column `event`.
    """
    rows = rows.append_column(EVENT, pa.nulls(len(rows), EVENT.type))
    if not events:
        return rows
    # Events have all columns with their types: Ray may put rows of several blocks into one batch.
    columns = [pa.nulls(len(events), field.type) for field in rows.schema][:-1]
    table = pa.table([*columns, pa.array(events, EVENT.type)], names=rows.column_names)
    return pa.concat_tables([rows, table], promote_options="default")


def split_events(block: pa.Table) -> tuple[pa.Table, list[Event]]:
    """Return the rows of images of a block, without the column `event`, and its events in their order."""
    if EVENT.name not in block.column_names:
        return block, []
    column = single_chunk(block[EVENT.name])
    rows = block.drop_columns([EVENT.name])
    if column.null_count == len(column):
        return rows, []
    # Null values of events have made the columns nullable: rows of images have the schema that they were sent with.
    schema = pa.schema([field.with_nullable(field.name not in _REQUIRED) for field in rows.schema])
    return rows.filter(column.is_null()).cast(schema), pc.drop_null(column).to_pylist()


_REQUIRED = {field.name for field in RESULTS if not field.nullable}


def events_alone(*events: Event) -> pa.Table:
    """Return a block of events, without images."""
    return with_events(RESULTS.empty_table(), *events)


def note(facts: Mapping[str, Any]) -> Event:
    """Return an event that reports facts about the worker or its node."""
    return json.dumps({_NOTE: facts})


def stream_end(end: StreamEnd) -> Event:
    """Return an event that reports how a worker reached the end of a stream."""
    return json.dumps({_STREAM_END: asdict(end)})


def fatal(error: Exception) -> Event:
    """Return an event that ends the run with this error; a bug keeps its traceback."""
    if isinstance(error, ImgbatchError):
        return json.dumps({_ERROR: {"kind": type(error).__name__, "message": str(error)}})
    return json.dumps({_ERROR: {"kind": "bug", "message": "".join(traceback.format_exception(error))}})


def is_fatal(event: Event) -> bool:
    """Return whether an event ends the run."""
    return _ERROR in json.loads(event)

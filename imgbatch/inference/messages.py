"""Values: what workers send to the driver beside the rows of images."""

from __future__ import annotations

import json
import traceback
from typing import Any

import pyarrow as pa

from imgbatch import errors
from imgbatch.errors import ImgbatchError
from imgbatch.schema import (
    RESULTS,
)

FATAL, NOTE, READ = -1, -2, -3
"""Numbers of result rows that are no images: an error that ends the run; what a worker reports about itself, as JSON; that
a tar was read to its end, as JSON."""


def received(results: pa.Table) -> tuple[pa.Table, list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of images in what came from a worker, what the worker reports about itself, and which tars it has read.

    Raises:
        ImgbatchError: the worker sent an error in place of rows.
        RuntimeError: the same, of a bug, with the worker's traceback.
    """
    numbers = results["index"].to_numpy()
    for row in results.filter(pa.array(numbers == FATAL)).to_pylist():
        error = getattr(errors, row["reason"], None)
        raise error(row["message"]) if error is not None else RuntimeError(f"in a worker:\n{row['message']}")
    notes = results.filter(pa.array(numbers == NOTE))["message"].to_pylist()
    read = results.filter(pa.array(numbers == READ))["message"].to_pylist()
    return (
        results.filter(pa.array(numbers >= 0)),
        [json.loads(note) for note in notes],
        [json.loads(tar) for tar in read],
    )


def message(number: int, reason: str, message: str) -> pa.Table:
    """Return a row that is no image; `number` says of which kind it is."""
    row = {"index": number, "uri": "", "reason": reason, "message": message}
    return pa.Table.from_pylist([row], schema=RESULTS)


def with_note(results: pa.Table, facts: dict[str, Any]) -> pa.Table:
    """Return result rows, followed by what the worker reports about itself."""
    return pa.concat_tables([results, message(NOTE, "note", json.dumps(facts))], promote_options="default")


def fatal(error: Exception) -> pa.Table:
    """Return the row that ends the run with this error; a bug keeps its traceback."""
    if isinstance(error, ImgbatchError):
        return message(FATAL, type(error).__name__, str(error))
    return message(FATAL, "bug", "".join(traceback.format_exception(error)))

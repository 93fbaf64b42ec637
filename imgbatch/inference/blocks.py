"""Effects: conversion of the bytes of images to rows of results: functions on blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.errors import ModelError
from imgbatch.evaluation.training_images import content_hash
from imgbatch.inference.label_columns import answer_columns
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.base import Runtime
from imgbatch.rejects import Refusal
from imgbatch.schema import (
    CONTENT_HASH,
    EMBEDDING,
    PLACE_COLUMNS,
    REFUSAL_COLUMNS,
    RESULTS,
    carried_fields,
    single_chunk,
    with_carried,
)
from imgbatch.sources.fetch import Fetched

if TYPE_CHECKING:
    from imgbatch.decode import Picture

PIXELS = "pixels"
_ROW_COLUMNS = ["width", "height", CONTENT_HASH, *REFUSAL_COLUMNS, "size", "etag", "last_modified"]


def decode_images(
    numbers: npt.NDArray[np.int64],
    listed: pa.Table,
    fetched: Iterable[Fetched],
    preprocess: Preprocess,
    decode: Callable[[bytes], Picture],
    *,
    hashed: bool = False,
) -> pa.Table:
    """Return a row for each listed image: its pixels at the network's input size, or its reject.

    The column `pixels` holds H×W×3 bytes, all zero for a reject; width and height are the original's, upright.

    Args:
        numbers: the numbers of the images in the listing.
        listed: their rows of the listing.
        fetched: their bytes.
        hashed: whether to add a hash of the bytes of each image that could be read.
    """
    height, width = preprocess.height, preprocess.width
    pixels = np.zeros((len(listed), height, width, 3), np.uint8)
    rows: list[dict[str, Any]] = []
    for i, image in enumerate(fetched):
        row: dict[str, Any] = {"size": image.size, "etag": image.etag, "last_modified": image.last_modified}
        if isinstance(image.content, bytes):
            if hashed:
                row[CONTENT_HASH] = content_hash(image.content)
            decoded = _decode_into(pixels[i], image.content, preprocess, decode)
        else:
            decoded = _refused(image.content)
        rows.append(row | decoded)
    columns = {name: pa.array([row.get(name) for row in rows], RESULTS.field(name).type) for name in _ROW_COLUMNS}
    flat = pa.FixedSizeBinaryArray.from_buffers(pa.binary(height * width * 3), len(rows), [None, pa.py_buffer(pixels)])
    carried = {name: listed[name] for name in carried_fields(listed.schema).names}
    place = {
        name: listed[name] if name in listed.column_names else pa.nulls(len(rows), pa.int64()) for name in PLACE_COLUMNS
    }
    return pa.table({"index": pa.array(numbers), "uri": listed["uri"], **columns, **place, **carried, PIXELS: flat})


def _decode_into(
    pixels: npt.NDArray[np.uint8], content: bytes, preprocess: Preprocess, decode: Callable[[bytes], Picture]
) -> dict[str, Any]:
    """Decode an image into an array; return its size, or the columns of its reject."""
    from imgbatch.decode import Rejected

    try:
        picture = decode(content)
        pixels[:] = preprocess(picture.pixels)
    except Rejected as error:
        return _refused(Refusal("decode", error.reason, str(error)))
    except (RuntimeError, MemoryError) as error:  # torch could not resize it
        reason = "out_of_memory" if "memory" in str(error) else "corrupt"
        return _refused(Refusal("decode", reason, str(error)[:300]))
    return {"width": picture.width, "height": picture.height}


def _refused(refusal: Refusal) -> dict[str, Any]:
    return {name: getattr(refusal, name) for name in REFUSAL_COLUMNS}


def pixels_of(images: pa.Table, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Return the column `pixels` as n×H×W×3, without a copy."""
    column = single_chunk(images[PIXELS])
    size = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
    return flat.reshape(-1, preprocess.height, preprocess.width, 3)


def classify_images(images: pa.Table, runtime: Runtime, model: Model, min_score: float) -> pa.Table:
    """Classify the images that `decode_images` returned; return RESULTS with carried columns.

    Args:
        min_score: see `answer_columns`.

    Raises:
        ModelError: the network returns numbers that are not finite.
    """
    pixels, good = pixels_of(images, model.preprocess), np.asarray(images["reason"].is_null())
    prediction = runtime(pixels if good.all() else pixels[good])
    if not np.isfinite(prediction.scores).all():
        raise ModelError("the network returns numbers that are not finite: try --set classify.dtype=float32")
    columns = answer_columns(prediction, model, min_score)
    schema = with_carried(RESULTS, carried_fields(images.schema))
    if prediction.embeddings is not None:
        columns[EMBEDDING] = _fixed_lists(prediction.embeddings)
        schema = schema.append(pa.field(EMBEDDING, columns[EMBEDDING].type))
    # Row i of the table gets row places[i] of `columns`, or null if it is a reject.
    places = pa.array(np.cumsum(good) - 1, mask=~good)
    table = images.drop_columns([PIXELS])
    for name, values in columns.items():
        table = table.append_column(name, values.take(places))
    return table.select(schema.names).cast(schema)


def _fixed_lists(numbers: npt.NDArray[np.float16]) -> pa.FixedSizeListArray:
    """Return the rows of a matrix as a column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), numbers.shape[1])

"""Values: the columns of exported rows: the margin between the two best classes, and the columns of a manifest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.schema import CARRIED, LABELS, REJECTS, carried_fields, single_chunk

MARGIN, SECOND = "margin", "second"
"""The difference of the scores of the two best classes, and the second best class."""
PREDICTED, FINGERPRINT = "predicted", "fingerprint"

LABELS_READ = ["label", "label_id", "score", "top_k", "answer", "answer_level", "answer_score", "width", "height", "size",
               "run_id", "model"]  # fmt: skip
"""The columns of labels/ that an export reads, as far as they exist, besides `uri` and carried columns."""
REJECTS_READ = [name for name in REJECTS.names if name not in ("uri", "etag", "last_modified")]

_FROM_LABELS = {
    PREDICTED: LABELS.field("label").type, "score": pa.float32(), MARGIN: pa.float32(), SECOND: pa.string(),
    "answer": pa.string(), "answer_level": pa.string(), "answer_score": pa.float32(),
}  # fmt: skip
_FROM_REJECTS = {name: REJECTS.field(name).type for name in ("stage", "reason", "message", "passing", "attempts")}
_FROM_BOTH = {"run_id": pa.string(), "model": pa.string(), FINGERPRINT: pa.string()}

OWN = ("uri", "label", *_FROM_LABELS, *_FROM_REJECTS, *_FROM_BOTH)
_KEPT_PREFIX = {*OWN, "size", "etag", "image"}
"""Carried columns of these names keep the prefix `input_`, since they would be taken for something else."""


def with_margin(rows: pa.Table) -> pa.Table:
    """Return rows of labels/ with MARGIN and SECOND, from `top_k`; null if that has one class or is absent.

    >>> row = {"uri": "a", "top_k": [{"label": "cat", "score": 0.5}, {"label": "dog", "score": 0.25}]}
    >>> with_margin(pa.Table.from_pylist([row])).select(["margin", "second"]).to_pylist()
    [{'margin': 0.25, 'second': 'dog'}]
    """
    margin, second = pa.nulls(len(rows), pa.float32()), pa.nulls(len(rows), pa.string())
    if "top_k" in rows.column_names and len(rows):
        candidates = single_chunk(rows["top_k"])
        starts, values = candidates.offsets.to_numpy()[:-1], candidates.values
        has_two = np.asarray(pc.fill_null(pc.greater_equal(pc.list_value_length(candidates), 2), False))
        first, next_best = (pa.array(starts + step, mask=~has_two) for step in (0, 1))
        scores = values.field("score").cast(pa.float32())
        margin = pc.subtract(scores.take(first), scores.take(next_best))
        second = values.field("label").take(next_best)
    return rows.append_column(MARGIN, margin).append_column(SECOND, second)


def manifest_rows(rows: pa.Table, *, rejects: bool) -> pa.Table:
    """Return rows of a table as rows of a manifest.

    `label` is empty: a person fills it in, and training omits rows without it. What the model says is in `predicted`. Carried
    columns have the names that they had in the input, so that a split or group of the input is used again.

    Args:
        rows: with FINGERPRINT; rows of labels/ also with MARGIN and SECOND.
        rejects: whether they are rows of rejects/.
    """
    types = {**(_FROM_REJECTS if rejects else _FROM_LABELS), **_FROM_BOTH}
    source = {PREDICTED: "label"}
    columns: dict[str, pa.Array] = {"uri": single_chunk(rows["uri"]), "label": pa.nulls(len(rows), pa.string())}
    for name, type_ in types.items():
        read = source.get(name, name)
        columns[name] = (
            single_chunk(rows[read]).cast(type_) if read in rows.column_names else pa.nulls(len(rows), type_)
        )
    for name, shown in carried_names(rows.schema).items():
        columns[shown] = single_chunk(rows[name])
    return pa.table(columns)


def carried_names(schema: pa.Schema) -> Mapping[str, str]:
    """Return the names of carried columns in a manifest, by their names in the tables.

    >>> carried_names(pa.schema([("uri", pa.string()), ("input_split", pa.string()), ("input_label", pa.string())]))
    {'input_split': 'split', 'input_label': 'input_label'}
    >>> carried_names(pa.schema([("input_label", pa.string()), ("input_input_label", pa.string())]))
    {'input_label': 'input_label', 'input_input_label': 'input_input_label'}
    """
    names = {entry.name: entry.name.removeprefix(CARRIED) for entry in carried_fields(schema)}
    return {name: name if shown in _KEPT_PREFIX or shown in names else shown for name, shown in names.items()}

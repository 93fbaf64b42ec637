"""Effects: convert class numbers and probabilities to the columns of labels/."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa

from imgbatch.models.model import Model
from imgbatch.models.runtimes.base import Prediction
from imgbatch.models.taxonomy import Taxonomy
from imgbatch.schema import CANDIDATE, LEVEL, RESULTS


def answer_columns(prediction: Prediction, model: Model, min_score: float) -> dict[str, pa.Array]:
    """Return the columns from `label` to `answer_score` of n images.

    `answer` is the best label of the finest level at which its probability reaches `min_score`, or null. Without a taxonomy it
    is the label itself, and there are no levels.
    """
    ids, scores = prediction.ids, prediction.scores
    n, k = ids.shape
    labels = _label_array(model.labels)
    names = labels.take(pa.array(ids.ravel()))
    candidates = pa.StructArray.from_arrays(
        [names, pa.array(ids.ravel()), pa.array(scores.ravel())], fields=list(CANDIDATE)
    )
    best = labels.take(pa.array(ids[:, 0]))
    columns = {
        "label": best,
        "label_id": pa.array(ids[:, 0]),
        "score": pa.array(scores[:, 0]),
        "top_k": pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * k), candidates),
        "levels": pa.nulls(n, RESULTS.field("levels").type),
        "answer": best,
        "answer_level": pa.nulls(n, pa.string()),
        "answer_score": pa.array(scores[:, 0]),
    }
    if model.taxonomy is not None and prediction.above is not None:
        columns |= _levels(model.taxonomy, prediction, prediction.above, min_score)
    return columns


@lru_cache(maxsize=2)
def _label_array(names: tuple[str, ...]) -> pa.Array:
    return pa.array(names, pa.string())


@lru_cache(maxsize=2)
def _node_array(taxonomy: Taxonomy) -> pa.Array:
    return pa.array([node for level in taxonomy.levels for node in level.nodes], pa.string())


def _levels(taxonomy: Taxonomy, prediction: Prediction, above: Prediction, min_score: float) -> dict[str, pa.Array]:
    """Return the columns that depend on a taxonomy."""
    n, depth = len(prediction.ids), len(taxonomy.levels)
    ids = np.concatenate([above.ids, prediction.ids[:, :1]], 1)
    scores = np.concatenate([above.scores, prediction.scores[:, :1]], 1)
    starts = np.cumsum([0, *(len(level.nodes) for level in taxonomy.levels[:-1])])
    nodes = _node_array(taxonomy)
    names = nodes.take(pa.array((ids + starts).ravel()))
    level_names = pa.array([level.name for level in taxonomy.levels] * n, pa.string())
    levels = pa.StructArray.from_arrays([level_names, names, pa.array(scores.ravel())], fields=list(LEVEL))
    # Scores only fall from coarse to fine, so the number of levels that reach `min_score` gives the finest of them.
    reached = (scores >= np.float32(min_score)).sum(1)
    finest = pa.array(np.arange(n) * depth + reached - 1, mask=reached == 0)
    return {
        "levels": pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * depth), levels),
        "answer": names.take(finest),
        "answer_level": level_names.take(finest),
        "answer_score": pa.array(scores.ravel()).take(finest),
    }

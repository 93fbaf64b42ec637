"""Effects: the files of a training run other than the weights: metrics and predictions of held-out images, hashes of images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.evaluation.calibration import softmax
from imgbatch.evaluation.metrics import Estimate
from imgbatch.evaluation.scores import Metrics
from imgbatch.evaluation.training_images import TrainingImages
from imgbatch.schema import CONTENT_HASH, single_chunk

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


def metrics_record(metrics: Metrics | None) -> dict[str, Any]:
    """Return the figures of `metrics.json`; with 95 % intervals by Wilson.

    Args:
        metrics: of held-out images, by networks that were not trained on them; None: no image was held out.
    """
    if metrics is None:
        return {"n": 0, "top1": None, "top5": None, "ece": None, "levels": {}}
    top5, before = metrics.top5, metrics.calibration_before
    return {
        "n": metrics.n,
        "top1": metrics.top1.value,
        "top1_interval": _interval(metrics.top1),
        "top5": top5 and top5.value,
        "top5_interval": top5 and _interval(top5),
        "ece": metrics.calibration.ece.value,
        "ece_before_temperature": before and before.ece.value,
        "loss": metrics.loss,
        "levels": {name: estimate.value for name, estimate in metrics.levels.items()},
        "levels_interval": {name: _interval(estimate) for name, estimate in metrics.levels.items()},
    }


def _interval(estimate: Estimate) -> list[float]:
    return [estimate.low, estimate.high]


def predictions(uris: pa.Array, labels: Sequence[str], classes: Ints, unseen: Floats, final: Floats) -> bytes:
    """Return a Parquet file with a row for each held-out image: its class, and the predictions before and after a refit.

    Args:
        unseen: calibrated logits of networks that were not trained on the image; in the columns `unseen_`.
        final: calibrated logits of the model that is written.
    """
    names = pa.array(labels, pa.string())
    columns = {"uri": uris, "truth": names.take(pa.array(classes))}
    for prefix, logits in (("", final), ("unseen_", unseen)):
        scores = softmax(logits) if len(classes) else np.zeros((0, len(labels)))
        columns[f"{prefix}label"] = names.take(pa.array(scores.argmax(1)))
        columns[f"{prefix}score"] = pa.array(scores.max(1, initial=0.0).astype(np.float32))
    return parquet(pa.table(columns))


def training_images(images: pa.Table, learned: Ints, held_out: Ints, base: TrainingImages | None) -> bytes:
    """Return the file of the images that the model has seen.

    Args:
        images: the prepared images, with the hashes of their bytes.
        learned: the rows that the model that is written was trained on.
        held_out: the rows that were held out; those among `learned` count as trained on.
        base: the images that the base model has seen.
    """
    column = single_chunk(images[CONTENT_HASH])
    trained, selected = (column.take(pa.array(rows)).to_numpy() for rows in (learned, held_out))
    return TrainingImages.of(trained, selected, base).parquet()


def parquet(table: pa.Table) -> bytes:
    """Return the content of a Parquet file."""
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()

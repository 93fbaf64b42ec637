"""Effects: what a training run leaves beside the weights: figures on held-out images, and what it said of each of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.evaluation.calibration import cross_entropy, softmax
from imgbatch.evaluation.metrics import Estimate, calibration, share
from imgbatch.evaluation.training_images import TrainingImages
from imgbatch.models.taxonomy import Taxonomy
from imgbatch.schema import CONTENT_HASH, single_chunk

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


def metrics(unseen: Floats, temperature: float, classes: Ints, taxonomy: Taxonomy | None) -> dict[str, Any]:
    """Return the figures of `metrics.json`, from logits of networks that had not seen the images, not calibrated.

    Intervals are Wilson's 95 % intervals.
    """
    n = len(classes)
    if not n:
        return {"n": 0, "top1": None, "top5": None, "ece": None, "levels": {}}
    scores, raw = softmax(unseen / temperature), softmax(unseen)
    right = scores.argmax(1) == classes
    top5 = share((np.argsort(-scores, axis=1)[:, :5] == classes[:, None]).any(1))
    found: dict[str, Any] = {
        "n": n,
        "top1": float(right.mean()),
        "top1_interval": _interval(share(right)),
        "top5": top5.value,
        "top5_interval": _interval(top5),
        "ece": calibration(scores.max(1), right).ece.value,
        "ece_before_temperature": calibration(raw.max(1), right).ece.value,
        "loss": cross_entropy(unseen / temperature, classes),
        "levels": {},
        "levels_interval": {},
    }
    if taxonomy is not None:
        for level, sums in zip(taxonomy.levels, taxonomy.roll_up(scores), strict=True):
            of_level = share(sums.argmax(1) == np.array(level.node_of)[classes])
            found["levels"][level.name] = of_level.value
            found["levels_interval"][level.name] = _interval(of_level)
    return found


def _interval(found: Estimate) -> list[float]:
    return [found.low, found.high]


def predictions(uris: pa.Array, labels: Sequence[str], classes: Ints, unseen: Floats, final: Floats) -> bytes:
    """Return a Parquet file with a row for each held-out image: the truth, what the model says, and what it said unseen.

    Args:
        unseen: calibrated logits of networks that had not seen the image.
        final: those of the model as it is written.
    """
    names = pa.array(labels, pa.string())
    columns = {"uri": uris, "truth": names.take(pa.array(classes))}
    for prefix, logits in (("", final), ("unseen_", unseen)):
        scores = softmax(logits) if len(classes) else np.zeros((0, len(labels)))
        columns[f"{prefix}label"] = names.take(pa.array(scores.argmax(1)))
        columns[f"{prefix}score"] = pa.array(scores.max(1, initial=0.0).astype(np.float32))
    return parquet(pa.table(columns))


def training_images(images: pa.Table, learned: Ints, held: Ints, base: TrainingImages | None) -> bytes:
    """Return the file that says which images the model has seen.

    Args:
        images: those that were made ready, with the hashes of their bytes.
        learned: the rows that the network as it is written was trained on.
        held: the rows that were held out; those among `learned` count as trained on.
        base: what the model that training started from had seen.
    """
    column = single_chunk(images[CONTENT_HASH])
    trained, selected = (column.take(pa.array(rows)).to_numpy() for rows in (learned, held))
    return TrainingImages.of(trained, selected, base).parquet()


def parquet(table: pa.Table) -> bytes:
    """Return a table as a file."""
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()

"""Values: near duplicates across splits: held-out images that are almost equal to an image that was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer[Any]]

THRESHOLD = 0.93
"""Minimum cosine similarity of the features of near duplicates (docs/LOG.md)."""

_RECORDED = 100  # pairs
_BLOCK = 4_096
_MAX_PRODUCTS = 2**29
"""Maximum number of pairs that are compared, about 20 s on two cores; a part of more held-out images is compared."""
_SEED = 0


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Held-out images and the training images that they are most similar to, the most similar pair first."""

    compared: int
    """Number of held-out images that were compared."""
    held_out: Ints
    """Images, as rows of the features."""
    trained: Ints
    similarity: Floats

    def public(self, uris: pa.ChunkedArray) -> dict[str, Any]:
        """Return the counts and the most similar pairs, for `training.json`.

        Args:
            uris: of all images.
        """
        first = slice(0, _RECORDED)
        names = [uris.take(pa.array(images[first])).to_pylist() for images in (self.held_out, self.trained)]
        keys = ("held_out", "trained", "similarity")
        rows = zip(*names, self.similarity[first].astype(float).round(4).tolist(), strict=True)
        return {
            "compared": self.compared,
            "found": len(self.held_out),
            "threshold": THRESHOLD,
            "pairs": [dict(zip(keys, row, strict=True)) for row in rows],
        }


def near_duplicates(features: Floats, fold: Ints, threshold: float = THRESHOLD) -> NearDuplicates:
    """Compare each held-out image with all images of other folds, by the cosine similarity of their features.

    Args:
        features: (n, d).
        fold: of each image, as in `splits.assign`; images of a negative fold are not held out.

    >>> features = np.array([[1, 0], [0, 1], [1, 0.01], [3, 4]], np.float32)
    >>> found = near_duplicates(features, np.array([-1, -1, 0, 0]))
    >>> found.compared, found.held_out.tolist(), found.trained.tolist()
    (2, [2], [0])
    """
    held_out = np.flatnonzero(fold >= 0)
    limit = max(_MAX_PRODUCTS // max(len(fold), 1), 1)
    if len(held_out) > limit:
        held_out = np.sort(np.random.default_rng(_SEED).choice(held_out, limit, replace=False))
    scale = 1 / np.maximum(np.linalg.norm(features, axis=1), 1e-12)
    best, similarity = np.zeros(len(held_out), np.int64), np.full(len(held_out), -1, np.float32)
    for start in range(0, len(fold), _BLOCK):  # in blocks, since a copy of the features may not fit into memory
        block = features[start : start + _BLOCK] * scale[start : start + _BLOCK, None]
        for first in range(0, len(held_out), _BLOCK):
            rows = held_out[first : first + _BLOCK]
            products = (features[rows] * scale[rows, None]) @ block.T
            products[fold[rows][:, None] == fold[start : start + _BLOCK]] = -1
            nearest = products.argmax(1)
            highest = products[np.arange(len(rows)), nearest]
            better = np.flatnonzero(highest > similarity[first : first + _BLOCK])
            best[first + better], similarity[first + better] = start + nearest[better], highest[better]
    found = np.flatnonzero(similarity >= threshold)
    found = found[np.argsort(-similarity[found], kind="stable")]
    return NearDuplicates(len(held_out), held_out[found], best[found], similarity[found])

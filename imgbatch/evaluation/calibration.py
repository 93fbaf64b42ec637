"""Values: scores that are probabilities: one temperature for all logits, fitted on held-out images (Guo et al. 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

_LEAST, _MOST = 0.1, 10.0


def softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Return the probabilities of (n, classes) logits."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf))
    found: npt.NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return found


def cross_entropy(logits: Logits, classes: Ints) -> float:
    """Return the mean of -log p of the true class; NaN for no image."""
    if not len(classes):
        return float("nan")
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(classes)), classes]).mean())


def fit_temperature(logits: Logits, classes: Ints) -> float:
    """Return the T for which softmax(logits / T) has the least cross-entropy; 1 without images.

    Images that are all right would want T = 0. The targets are therefore 1 - 1/(n + 2), after Platt (1999), and the rest
    spread over all classes.

    >>> logits = np.array([[4.0, 0.0]] * 10)
    >>> right_in_8_of_10 = np.array([0] * 8 + [1] * 2)
    >>> 2.5 < fit_temperature(logits, right_in_8_of_10) < 4
    True
    """
    n = len(classes)
    if not n:
        return 1.0
    x = logits.astype(np.float64) - logits.max(1, keepdims=True)
    unsure = 1 / (n + 2)
    wanted = float(((1 - unsure) * x[np.arange(n), classes] + unsure * x.mean(1)).mean())
    # The loss is convex in 1/T; its slope there is E[x] under the softmax minus what the targets have.
    low, high = 1 / _MOST, 1 / _LEAST
    for _ in range(50):
        middle = (low * high) ** 0.5
        powers = np.exp(middle * x)
        slope = float(((powers * x).sum(1) / powers.sum(1)).mean()) - wanted
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float((low * high) ** -0.5)

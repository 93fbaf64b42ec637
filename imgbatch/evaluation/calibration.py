"""Values: temperature scaling: one temperature for all logits, fitted on held-out images (Guo et al. 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

_MIN, _MAX = 0.1, 10.0  # of the temperature


def softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Return the probabilities of (n, classes) logits."""
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf))
    probabilities: npt.NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return probabilities


def cross_entropy(logits: Logits, classes: Ints) -> float:
    """Return the mean of -log p of the true class; NaN for no image."""
    if not len(classes):
        return float("nan")
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(classes)), classes]).mean())


def calibrated_loss(logits: Logits, classes: Ints) -> float:
    """Return the cross-entropy at the temperature that `fit_temperature` returns for the same images."""
    return cross_entropy(logits / fit_temperature(logits, classes), classes)


def fit_temperature(logits: Logits, classes: Ints) -> float:
    """Return the T for which softmax(logits / T) has the lowest cross-entropy; 1 without images.

    If all images were right, the lowest would be at T = 0. The targets are therefore 1 - 1/(n + 2), after Platt (1999), and the
    rest is spread over all classes.

    >>> logits = np.array([[4.0, 0.0]] * 10)
    >>> right_in_8_of_10 = np.array([0] * 8 + [1] * 2)
    >>> 2.5 < fit_temperature(logits, right_in_8_of_10) < 4
    True
    """
    n = len(classes)
    if not n:
        return 1.0
    x = logits.astype(np.float64) - logits.max(1, keepdims=True)
    smoothing = 1 / (n + 2)
    expected = float(((1 - smoothing) * x[np.arange(n), classes] + smoothing * x.mean(1)).mean())
    # The loss is convex in 1/T. Its slope is E[x] under the softmax minus E[x] under the targets, so bisection finds its zero.
    low, high = 1 / _MAX, 1 / _MIN
    for _ in range(50):
        middle = (low * high) ** 0.5
        powers = np.exp(middle * x)
        slope = float(((powers * x).sum(1) / powers.sum(1)).mean()) - expected
        low, high = (middle, high) if slope < 0 else (low, middle)
    return float((low * high) ** -0.5)

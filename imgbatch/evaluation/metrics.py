"""Values: metrics of labels: proportions with their intervals, per class, confusion, calibration and coverage, of n images.

The interval of a proportion is Wilson's score interval (`wilson`). A bootstrap has no width for a small set without a mistake,
as if its accuracy were certain. Other figures, which are no proportions (the difference of two models, the calibration error),
have the 2.5 % and 97.5 % points of a bootstrap over images (Efron 1979). Resampling n images of a few kinds with replacement
is one draw of a multinomial distribution over the counts of the kinds. So an interval costs the same for a hundred images and
for millions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
Intervals = npt.NDArray[np.floating[Any]]
"""Lower and upper ends, (n, 2)."""

BINS = 15
"""Number of bins of scores, as in Guo et al. (2017)."""
_Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
_RESAMPLES = 2_000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2%} ({self.low:.2%} to {self.high:.2%})"


def bootstrap(counts: Ints, statistic: Callable[[Floats], Floats]) -> Estimate:
    """Return a figure of n images of a few kinds, and its interval.

    Args:
        counts: number of images of each kind.
        statistic: from (resamples, kinds) counts to (resamples,) figures.
    """
    n = int(counts.sum())
    drawn = np.random.default_rng(_SEED).multinomial(n, counts / n, _RESAMPLES)
    low, high = np.quantile(statistic(drawn.astype(float)), [0.025, 0.975])
    return Estimate(float(statistic(counts[None].astype(float))[0]), float(low), float(high))


def wilson(part: Ints, total: Ints) -> Intervals:
    """Return the lower and upper ends of the 95 % intervals of proportions, (n, 2); NaN where the total is 0.

    It is the score interval of Wilson (1927), without continuity correction: the proportions p that a z-test at 5 % does not
    refute,

        (k + z²/2 ± z sqrt(k (n - k) / n + z²/4)) / (n + z²),   z = 1.96.

    Brown, Cai and DasGupta (2001) recommend it for small n: it holds near 0 and 1, where the textbook's interval and the
    bootstrap have no width. It assumes independent images; for several pictures of one thing it is too narrow.

    >>> wilson(np.array([96, 0, 0]), np.array([96, 10, 0])).round(3).tolist()
    [[0.962, 1.0], [0.0, 0.278], [nan, nan]]
    """
    k, n = np.asarray(part, float), np.where(np.asarray(total) > 0, total, np.nan).astype(float)
    spread = _Z * np.sqrt(k * (n - k) / n + _Z**2 / 4)
    ends = (k + _Z**2 / 2 + np.stack([-spread, spread])) / (n + _Z**2)
    intervals: Intervals = np.clip(ends, 0, 1).T
    return intervals


def proportion_of(part: int, total: int) -> Estimate:
    """Return part / total, with Wilson's interval."""
    ((low, high),) = wilson(np.array([part]), np.array([total])).tolist()
    return Estimate(part / total, low, high)


def proportion(right: Mask) -> Estimate:
    """Return the proportion of images that are right, with Wilson's interval.

    >>> print(proportion(np.array([True] * 90 + [False] * 10)))
    90.00% (82.56% to 94.48%)
    """
    return proportion_of(int(np.count_nonzero(right)), len(right))


def difference(right: Mask, other: Mask) -> Estimate:
    """Return the proportion of right images minus that of another labelling of the same images."""
    counts = np.array(
        [np.count_nonzero(right & ~other), np.count_nonzero(~right & other), np.count_nonzero(right == other)]
    )
    return bootstrap(counts, lambda drawn: (drawn[:, 0] - drawn[:, 1]) / drawn.sum(1))


def not_worse(right: Mask, reference: Mask) -> bool:
    """Return whether a labelling is not worse than a reference, within one standard deviation of chance.

    If both are equally good, each image that only one of them labels correctly is as likely to be won as lost (McNemar 1947):
    the standard deviation of the difference is sqrt(lost + won).

    >>> reference = np.ones(100, bool)
    >>> not_worse(np.arange(100) > 0, reference), not_worse(np.arange(100) > 4, reference)
    (True, False)
    """
    lost, won = np.count_nonzero(reference & ~right), np.count_nonzero(right & ~reference)
    return bool(lost - won <= (lost + won) ** 0.5)


@dataclass(frozen=True, slots=True)
class Confusion:
    """A confusion matrix: the cells that are not empty."""

    classes: int
    truth: Ints
    predicted: Ints
    count: Ints

    @classmethod
    def of(cls, truth: Ints, predicted: Ints, classes: int) -> Confusion:
        """Count n images by their true and their predicted class."""
        cells, count = np.unique(truth.astype(np.int64) * classes + predicted, return_counts=True)
        return cls(classes, cells // classes, cells % classes, count)

    def matrix(self) -> Ints:
        """Return (classes, classes) counts, a row for each true class."""
        matrix = np.zeros((self.classes, self.classes), np.int64)
        matrix[self.truth, self.predicted] = self.count
        return matrix

    def mistakes(self) -> Confusion:
        """Return the cells off the diagonal, by descending count."""
        wrong = np.flatnonzero(self.truth != self.predicted)
        wrong = wrong[np.argsort(-self.count[wrong], kind="stable")]
        return Confusion(self.classes, self.truth[wrong], self.predicted[wrong], self.count[wrong])


@dataclass(frozen=True, slots=True)
class PerClass:
    """Figures of each class; NaN where a denominator is 0: a class that was never predicted has no precision."""

    support: Ints
    """Images that truly are of the class."""
    predicted: Ints
    right: Ints

    @classmethod
    def of(cls, confusion: Confusion) -> PerClass:
        """Sum up the rows, the columns and the diagonal."""
        right = confusion.truth == confusion.predicted
        return cls(
            _sums(confusion.truth, confusion.count, confusion.classes),
            _sums(confusion.predicted, confusion.count, confusion.classes),
            _sums(confusion.truth[right], confusion.count[right], confusion.classes),
        )

    @property
    def precision(self) -> Floats:
        """The proportion of the images predicted as the class that are right."""
        return _ratio(self.right, self.predicted)

    @property
    def recall(self) -> Floats:
        """The proportion of the images of the class that are predicted as the class."""
        return _ratio(self.right, self.support)

    @property
    def precision_interval(self) -> Intervals:
        """Wilson's 95 % interval of each precision."""
        return wilson(self.right, self.predicted)

    @property
    def recall_interval(self) -> Intervals:
        """Wilson's 95 % interval of each recall."""
        return wilson(self.right, self.support)

    @property
    def f1(self) -> Floats:
        """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN) (van Rijsbergen 1979)."""
        return _ratio(2 * self.right, self.support + self.predicted)

    def macro(self, figure: Floats) -> float:
        """Return the mean over the classes that have images; a figure that a class lacks counts as zero."""
        return float(np.nan_to_num(figure[self.support > 0]).mean())


def _sums(classes: Ints, count: Ints, number: int) -> Ints:
    return np.bincount(classes, weights=count, minlength=number).astype(np.int64)


def _ratio(part: Ints, total: Ints) -> Floats:
    ratio: Floats = np.divide(part, total, out=np.full(len(total), np.nan), where=total > 0)
    return ratio


@dataclass(frozen=True, slots=True)
class Calibration:
    """The reliability of scores, in bins of equal width over [0, 1]; bins without images are omitted."""

    low: Floats
    high: Floats
    count: Ints
    score: Floats
    """Mean of the images' scores."""
    accuracy: Floats
    interval: Intervals
    """Wilson's, of the accuracy."""
    ece: Estimate


def calibration(score: Floats, right: Mask, bins: int = BINS) -> Calibration:
    """Return the reliability curve and the expected calibration error.

    ECE is the mean over images of |accuracy - mean score| of their bin (Naeini et al. 2015). It is biased upwards: it is above
    zero even for perfect probabilities, more so for fewer images, and more in a resample than in the sample. So its interval
    is too high.

    >>> result = calibration(np.array([0.9, 0.9, 0.9, 0.1]), np.array([True, True, False, False]))
    >>> [round(float(value), 3) for value in (*result.accuracy, result.ece.value)]
    [0.0, 0.667, 0.2]
    """
    number = np.minimum((score * bins).astype(np.int64), bins - 1)
    # A kind of images for the bootstrap is a bin, right or wrong. Within a kind all scores count as their mean.
    kind = number * 2 + right
    count = np.bincount(kind, minlength=2 * bins)
    mean = np.bincount(kind, weights=score, minlength=2 * bins) / np.maximum(count, 1)

    def error(drawn: Floats) -> Floats:
        sums = (drawn * mean).reshape(len(drawn), bins, 2).sum(2)
        errors: Floats = np.abs(drawn[:, 1::2] - sums).sum(1) / drawn.sum(1)
        return errors

    totals = count.reshape(bins, 2).sum(1)
    used = np.flatnonzero(totals)
    sums = (count * mean).reshape(bins, 2).sum(1)
    return Calibration(
        used / bins,
        (used + 1) / bins,
        totals[used],
        sums[used] / totals[used],
        count[1::2][used] / totals[used],
        wilson(count[1::2][used], totals[used]),
        bootstrap(count, error),
    )


@dataclass(frozen=True, slots=True)
class Coverage:
    """Coverage and accuracy if only labels from a minimum score on are accepted (El-Yaniv and Wiener 2010)."""

    score: Floats
    """The minimum score."""
    coverage: Floats
    """Proportion of the images that are accepted."""
    accuracy: Floats
    """Of the accepted images; NaN if there is none."""
    interval: Intervals
    """Wilson's, of the accuracy; NaN if no image is accepted."""


def coverage(score: Floats, right: Mask, steps: int = 100) -> Coverage:
    """Return coverage and accuracy for minimum scores from 0 to 1.

    >>> curve = coverage(np.array([0.9, 0.6, 0.3]), np.array([True, True, False]), steps=2)
    >>> curve.coverage.round(2).tolist(), curve.accuracy.round(2).tolist()
    ([1.0, 0.67, 0.0], [0.67, 1.0, nan])
    """
    minimum = np.linspace(0, 1, steps + 1)
    # Number of minimum scores that a score reaches. Compared in float32, as a float32 score of 0.3 is less than 0.3 in float64.
    reached = np.searchsorted(minimum.astype(np.float32), score.astype(np.float32), side="right")
    images = np.bincount(reached, minlength=steps + 2)[::-1].cumsum()[::-1][1:]
    right_images = np.bincount(reached, weights=right, minlength=steps + 2)[::-1].cumsum()[::-1][1:]
    right_images = right_images.astype(np.int64)
    return Coverage(minimum, images / len(score), _ratio(right_images, images), wilson(right_images, images))


def before_temperature(probabilities: Floats, temperature: float) -> Floats:
    """Return the best probability as it was before logits were divided by a temperature (Guo et al. 2017).

    Args:
        probabilities: (n, classes), sorted in descending order.

    softmax(z) is softmax(z / T) to the power of T, normalised.

    >>> z = np.array([[2.0, 1.0, 0.0]])
    >>> soft = lambda z: np.exp(z) / np.exp(z).sum()
    >>> bool(np.isclose(before_temperature(soft(z / 3), 3.0), soft(z)[:, 0]))
    True
    """
    powers = probabilities.astype(np.float64) ** temperature
    best: Floats = powers[:, 0] / powers.sum(1)
    return best

"""Values: how good labels are: shares with their intervals, per class, confusion, calibration, coverage. Pure, on arrays
of n images.

The interval of a proportion is Wilson's score interval (`wilson`). A bootstrap would say of a small set without a mistake that
its accuracy is 100 % for certain. Other figures, which are no proportions (the difference of two models, the calibration
error), have the 2.5 % and 97.5 % points of a bootstrap over images (Efron 1979). Resampling n images of a few kinds with
replacement is one draw of a multinomial distribution over the kinds' counts, so that an interval costs the same for a
hundred images and for millions.
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
"""Of the scores' calibration, as Guo et al. (2017) have it."""
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
        counts: how many images there are of each kind.
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
    bootstrap have no width. It takes images as independent; of several pictures of one thing it is too narrow.

    >>> wilson(np.array([96, 0, 0]), np.array([96, 10, 0])).round(3).tolist()
    [[0.962, 1.0], [0.0, 0.278], [nan, nan]]
    """
    k, n = np.asarray(part, float), np.where(np.asarray(total) > 0, total, np.nan).astype(float)
    spread = _Z * np.sqrt(k * (n - k) / n + _Z**2 / 4)
    ends = (k + _Z**2 / 2 + np.stack([-spread, spread])) / (n + _Z**2)
    found: Intervals = np.clip(ends, 0, 1).T
    return found


def proportion_of(part: int, total: int) -> Estimate:
    """Return a part of a total, with Wilson's interval."""
    ((low, high),) = wilson(np.array([part]), np.array([total])).tolist()
    return Estimate(part / total, low, high)


def proportion(right: Mask) -> Estimate:
    """Return the proportion of images that are right, with Wilson's interval.

    >>> print(proportion(np.array([True] * 90 + [False] * 10)))
    90.00% (82.56% to 94.48%)
    """
    return proportion_of(int(np.count_nonzero(right)), len(right))


def difference(right: Mask, other: Mask) -> Estimate:
    """Return by how much more is right than in another labelling of the same images: share minus share, image by image."""
    counts = np.array(
        [np.count_nonzero(right & ~other), np.count_nonzero(~right & other), np.count_nonzero(right == other)]
    )
    return bootstrap(counts, lambda drawn: (drawn[:, 0] - drawn[:, 1]) / drawn.sum(1))


def as_well(one: Mask, other: Mask) -> bool:
    """Return whether one way tells images as well as the other: what it loses is within a standard deviation of chance.

    Where they differ, either is right as often by chance (McNemar 1947): a deviation of sqrt(lost + won).

    >>> other = np.ones(100, bool)
    >>> as_well(np.arange(100) > 0, other), as_well(np.arange(100) > 4, other)
    (True, False)
    """
    lost, won = np.count_nonzero(other & ~one), np.count_nonzero(one & ~other)
    return bool(lost - won <= (lost + won) ** 0.5)


@dataclass(frozen=True, slots=True)
class Confusion:
    """Which class was taken for which: the cells that are not empty."""

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
        found = np.zeros((self.classes, self.classes), np.int64)
        found[self.truth, self.predicted] = self.count
        return found

    def mistakes(self) -> Confusion:
        """Return the cells of what is wrong, the fullest first."""
        wrong = np.flatnonzero(self.truth != self.predicted)
        wrong = wrong[np.argsort(-self.count[wrong], kind="stable")]
        return Confusion(self.classes, self.truth[wrong], self.predicted[wrong], self.count[wrong])


@dataclass(frozen=True, slots=True)
class PerClass:
    """Figures of each class. NaN where there is nothing to divide by: a class never predicted has no precision."""

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
        """Of the images predicted as the class, the share that are right."""
        return _ratio(self.right, self.predicted)

    @property
    def recall(self) -> Floats:
        """Of the images of the class, the share that are found."""
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


def _ratio(part: Ints, whole: Ints) -> Floats:
    found: Floats = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return found


@dataclass(frozen=True, slots=True)
class Calibration:
    """Are scores probabilities? Bins of equal width over [0, 1]; those without images are left out."""

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

    ECE is the mean over images of |accuracy - mean score| of their bin (Naeini et al. 2015). It is above zero by chance even
    where scores are right, the more so the fewer images there are, and in a resample more than in the sample: its interval
    leans to the high side.

    >>> found = calibration(np.array([0.9, 0.9, 0.9, 0.1]), np.array([True, True, False, False]))
    >>> [round(float(each), 3) for each in (*found.accuracy, found.ece.value)]
    [0.0, 0.667, 0.2]
    """
    number = np.minimum((score * bins).astype(np.int64), bins - 1)
    # Kinds of images: a bin, right or wrong. Within one the scores count as their mean.
    kind = number * 2 + right
    count = np.bincount(kind, minlength=2 * bins)
    mean = np.bincount(kind, weights=score, minlength=2 * bins) / np.maximum(count, 1)

    def error(drawn: Floats) -> Floats:
        sums = (drawn * mean).reshape(len(drawn), bins, 2).sum(2)
        found: Floats = np.abs(drawn[:, 1::2] - sums).sum(1) / drawn.sum(1)
        return found

    all_of = count.reshape(bins, 2).sum(1)
    used = np.flatnonzero(all_of)
    sums = (count * mean).reshape(bins, 2).sum(1)
    return Calibration(
        used / bins,
        (used + 1) / bins,
        all_of[used],
        sums[used] / all_of[used],
        count[1::2][used] / all_of[used],
        wilson(count[1::2][used], all_of[used]),
        bootstrap(count, error),
    )


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is left, and how much of that is right, when labels below a score are not taken (El-Yaniv and Wiener 2010)."""

    score: Floats
    coverage: Floats
    """Share of the images whose score reaches it."""
    accuracy: Floats
    """Of those; NaN where none does."""
    interval: Intervals
    """Wilson's, of the accuracy; NaN where no score reaches it."""


def coverage(score: Floats, right: Mask, steps: int = 100) -> Coverage:
    """Return coverage and accuracy for scores asked for from 0 to 1.

    >>> found = coverage(np.array([0.9, 0.6, 0.3]), np.array([True, True, False]), steps=2)
    >>> found.coverage.round(2).tolist(), found.accuracy.round(2).tolist()
    ([1.0, 0.67, 0.0], [0.67, 1.0, nan])
    """
    asked = np.linspace(0, 1, steps + 1)
    # How many steps a score reaches. Compared in 32 bits, in which 0.3 is not less than 0.3.
    reached = np.searchsorted(asked.astype(np.float32), score.astype(np.float32), side="right")
    images = np.bincount(reached, minlength=steps + 2)[::-1].cumsum()[::-1][1:]
    good = np.bincount(reached, weights=right, minlength=steps + 2)[::-1].cumsum()[::-1][1:]
    good = good.astype(np.int64)
    return Coverage(asked, images / len(score), _ratio(good, images), wilson(good, images))


def before_temperature(probabilities: Floats, temperature: float) -> Floats:
    """Return the best probability as it was before logits were divided by a temperature (Guo et al. 2017).

    Args:
        probabilities: (n, classes): all of them, the best first.

    softmax(z) is softmax(z / T) to the power of T, normalised.

    >>> z = np.array([[2.0, 1.0, 0.0]])
    >>> soft = lambda z: np.exp(z) / np.exp(z).sum()
    >>> bool(np.isclose(before_temperature(soft(z / 3), 3.0), soft(z)[:, 0]))
    True
    """
    powers = probabilities.astype(np.float64) ** temperature
    found: Floats = powers[:, 0] / powers.sum(1)
    return found

"""Values: drift between two sets of counts: its size, the size that chance alone explains, and what changed most.

Two samples of one distribution differ. Their squared Jensen-Shannon distance is about (K - 1)(1/n1 + 1/n2) / 8 for K labels
and n1 and n2 images, so that a fixed threshold is exceeded on every run with many labels and few images. Here the noise is
measured: the images of both samples are put together and divided at random again, many times. The counts of such a division
follow a multivariate hypergeometric distribution, so that the cost depends on the number of labels, not of images. Under the
hypothesis of no drift, all divisions are equally probable, so the rate of false alarms is exact for any number of images.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DIVISIONS = 999
"""The number of random divisions."""
EXTREME = 3
"""A value is beyond noise if fewer than 3 of the 999 divisions reach it: a false alarm in 0.3 % of comparisons. A run
makes three comparisons (labels, scores, rejects), so it has a false alarm in less than 1 % of runs."""

MIN_PER_LABEL = 5
"""The number of images per label and sample from which a level is fine enough; see `finest_level`."""

_BLOCK = 1 << 19  # counts in memory at a time
_MAX_ROWS = 400_000_000  # NumPy divides less than 10^9 rows in all

Statistic = Callable[[Counts, Counts], Floats]
"""Returns a value for each row of two matrices of counts, (m, K): the reference and the current sample."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A statistic of two samples, and its distribution under no drift."""

    value: float
    """Of the samples as they are."""
    expected: float
    """Its mean under no drift."""
    bound: float
    """A value above it has a probability of 0.3 % under no drift."""

    @property
    def excess(self) -> float:
        """How much larger the value is than expected."""
        return self.value - self.expected

    @property
    def noise(self) -> float:
        """How much larger than expected it may be by chance."""
        return max(0.0, self.bound - self.expected)  # rounding may make it negative if all divisions are equal


def compare(reference: Counts, current: Counts, statistic: Statistic) -> Comparison:
    """Compare two samples; equal arguments give equal results.

    Args:
        reference: the number of rows of each category, (K,).
        current: the same of the other sample.
        statistic: a value that drift increases.
    """
    reference, current = _limited(np.asarray(reference, np.int64)), _limited(np.asarray(current, np.int64))
    pooled = reference + current
    seed = zlib.crc32(np.concatenate([reference, current]).astype("<i8").tobytes())
    generator = np.random.default_rng(seed)
    present = pooled > 0
    values: list[Floats] = []
    rows = max(1, _BLOCK // max(1, int(np.count_nonzero(present))))
    for start in range(0, DIVISIONS, rows):
        size = min(rows, DIVISIONS - start)
        drawn = np.zeros((size, len(pooled)), np.int64)
        drawn[:, present] = generator.multivariate_hypergeometric(
            pooled[present], int(reference.sum()), size=size, method="marginals"
        )
        values.append(statistic(drawn, pooled - drawn))
    null = np.sort(np.concatenate(values))
    value = float(statistic(reference[None], current[None])[0])
    return Comparison(value, float(null.mean()), float(null[-EXTREME]))


def _limited(counts: Counts) -> Counts:
    total = int(counts.sum())
    return counts if total < _MAX_ROWS else np.asarray(counts * (_MAX_ROWS / total), np.int64)


def squared_distance(reference: Counts, current: Counts) -> Floats:
    """Return the squared Jensen-Shannon distance of each row, with the natural logarithm: from 0 to ln 2.

    >>> round(float(squared_distance(np.array([[5, 0]]), np.array([[0, 8]]))[0]), 4)
    0.6931
    """
    totals: Floats = label_terms(reference, current).sum(axis=1)
    return totals


def label_terms(reference: Counts, current: Counts) -> Floats:
    """Return the part of each label in the squared distance, (m, K); none is negative."""
    p = reference / np.maximum(reference.sum(axis=1, keepdims=True), 1)
    q = current / np.maximum(current.sum(axis=1, keepdims=True), 1)
    mean = (p + q) / 2
    terms: Floats = (_entropy(p) + _entropy(q)) / 2 - _entropy(mean)
    return np.maximum(terms, 0.0)


def _entropy(proportions: Floats) -> Floats:
    """Return x ln x, 0 for 0."""
    return proportions * np.log(np.where(proportions > 0, proportions, 1.0))


def mean_drop(values: Floats) -> Statistic:
    """Return the statistic "by how much the mean has fallen", for categories with these values."""

    def drop(reference: Counts, current: Counts) -> Floats:
        means = [(counts @ values) / np.maximum(counts.sum(axis=1), 1) for counts in (reference, current)]
        return np.asarray(means[0] - means[1], np.float64)

    return drop


@dataclass(frozen=True, slots=True)
class Change:
    """A label, and its proportion of the images before and now."""

    label: str
    before: float
    now: float


@dataclass(frozen=True, slots=True)
class Shift:
    """The change of the label mix at one level."""

    level: str
    labels: int
    """The number of labels that occur in either sample."""
    comparison: Comparison
    """Of the squared distances."""
    changes: tuple[Change, ...]
    """The labels that changed most, first."""

    @property
    def size(self) -> float:
        """The Jensen-Shannon distance without the part that is expected by chance; 0 for no drift, at most 0.83."""
        return float(np.sqrt(max(self.comparison.excess, 0.0)))


Mix = Mapping[str, int]
"""The number of images of each label."""


def label_shift(levels: Sequence[tuple[str, Mix, Mix]], *, shown: int = 10) -> Shift:
    """Return the change of the label mix, at the finest level that the number of images supports.

    Args:
        levels: name, reference and current mix of each level, coarse to fine.
        shown: the maximum number of changes.
    """
    name, reference, current = finest_level(levels)
    labels = sorted({*reference, *current})
    before, now = (np.array([mix.get(label, 0) for label in labels], np.int64) for mix in (reference, current))
    terms = label_terms(before[None], now[None])[0]
    shares = before / max(1, before.sum()), now / max(1, now.sum())
    order = np.argsort(-terms, kind="stable")[:shown]
    changes = [Change(labels[at], float(shares[0][at]), float(shares[1][at])) for at in order if terms[at] > 0]
    return Shift(name, len(labels), compare(before, now, squared_distance), tuple(changes))


def finest_level(levels: Sequence[tuple[str, Mix, Mix]]) -> tuple[str, Mix, Mix]:
    """Return the finest level at which both samples have at least 5 images per label that occurs; else the coarsest.

    With fewer images, noise hides all but the largest changes, and a coarser level shows more. The choice depends only on the
    labels that occur in both samples together, so it does not change the rate of false alarms.

    >>> fine = ("label", {"gala": 9, "fuji": 2, "pear": 4}, {"gala": 8, "fuji": 1, "pear": 5})
    >>> finest_level([("kind", {"apple": 11, "pear": 4}, {"apple": 9, "pear": 5}), fine])[0]
    'kind'
    """
    for level in reversed(levels):
        _, reference, current = level
        if min(sum(reference.values()), sum(current.values())) >= MIN_PER_LABEL * len({*reference, *current}):
            return level
    return levels[0]


def widest(spread: Sequence[float], noise: float) -> float:
    """Return the noise, but never less than the largest difference between earlier runs.

    Runs differ by more than chance: the images of one day are not independent of each other.

    Args:
        spread: the differences between earlier runs. Those in the other direction have no effect: a recovery after a bad day
            is no reason to expect another one.
        noise: the largest difference by chance, on the same scale.
    """
    return max([noise, *spread])

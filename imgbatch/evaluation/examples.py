"""Values: which images of an evaluation are worth looking at: confused pairs of classes, confident errors, doubtful labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.evaluation.metrics import Confusion
from imgbatch.evaluation.scores import Scores

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]

PAIRS, ERRORS, DOUBTFUL = 8, 24, 12
"""Maximum numbers of pairs of classes, of confident errors and of doubtful labels with pictures on a page."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two classes that are confused with each other."""

    first: int
    second: int
    first_as_second: int
    """Number of images of the first class that are labelled as the second one."""
    second_as_first: int

    @property
    def count(self) -> int:
        """The number of images that are confused, in both directions."""
        return self.first_as_second + self.second_as_first


@dataclass(frozen=True, slots=True)
class PairExamples:
    """Images of a pair of classes, by their numbers: those with the highest scores."""

    pair: Pair
    first: int | None
    """An image of the first class: with the right label if there is one; None: the class has no other image."""
    confused: int
    """An image of one class that is labelled as the other one."""
    second: int | None


@dataclass(frozen=True, slots=True)
class Doubtful:
    """Images whose given label is doubtful, and classes whose labels look swapped."""

    images: Ints
    """Numbers, by descending score of the predicted class."""
    swapped: tuple[Pair, ...]
    """Pairs of classes of which most images of each are labelled as the other one."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Images worth looking at, by their numbers."""

    pairs: tuple[PairExamples, ...]
    errors: Ints
    """Wrong labels with the highest scores, the highest first."""
    doubtful: Doubtful

    @property
    def images(self) -> Ints:
        """The numbers of all images whose pictures are on a page, ascending."""
        of_pairs = [n for each in self.pairs for n in (each.first, each.confused, each.second) if n is not None]
        return np.unique(np.concatenate([np.array(of_pairs, np.int64), self.errors, self.doubtful.images[:DOUBTFUL]]))


def pairs_of(confusion: Confusion) -> tuple[Pair, ...]:
    """Return the pairs of classes that are confused, in either direction, by descending number of images.

    >>> truth, predicted = np.array([0, 0, 1, 2]), np.array([1, 1, 0, 2])
    >>> pairs_of(Confusion.of(truth, predicted, 3))
    (Pair(first=0, second=1, first_as_second=2, second_as_first=1),)
    """
    wrong = confusion.mistakes()
    low, high = np.minimum(wrong.truth, wrong.predicted), np.maximum(wrong.truth, wrong.predicted)
    key, at = np.unique(low.astype(np.int64) * confusion.classes + high, return_inverse=True)
    forward = wrong.truth < wrong.predicted
    counts = [np.bincount(at[mask], weights=wrong.count[mask], minlength=len(key)) for mask in (forward, ~forward)]
    order = np.argsort(-(counts[0] + counts[1]), kind="stable")
    columns = (key // confusion.classes, key % confusion.classes, counts[0].astype(int), counts[1].astype(int))
    return tuple(Pair(*row) for row in zip(*(column[order].tolist() for column in columns), strict=True))


def examples(scores: Scores, confusion: Confusion) -> Examples:
    """Choose images; equal scores are in the order of the images."""
    by_score = np.argsort(-scores.score, kind="stable")
    wrong = by_score[~scores.right[by_score]]
    right = by_score[scores.right[by_score]]
    of_class = np.concatenate([right, wrong])  # right labels first
    low, high = np.minimum(scores.truth, scores.label)[wrong], np.maximum(scores.truth, scores.label)[wrong]
    confused = _first_of_each(low.astype(np.int64) * confusion.classes + high, wrong)
    pairs = pairs_of(confusion)
    chosen = []
    for pair in pairs[:PAIRS]:
        shown = confused[pair.first * confusion.classes + pair.second]
        others = of_class[of_class != shown]
        best = [others[scores.truth[others] == number][:1].tolist() for number in (pair.first, pair.second)]
        first, second = (found[0] if found else None for found in best)
        chosen.append(PairExamples(pair, first, shown, second))
    return Examples(tuple(chosen), wrong[:ERRORS], Doubtful(_doubtful(scores, wrong), _swapped(pairs, confusion)))


def _first_of_each(keys: Ints, images: Ints) -> dict[int, int]:
    """Return the first image of each key."""
    key, at = np.unique(keys, return_index=True)
    return dict(zip(key.tolist(), images[at].tolist(), strict=True))


def _doubtful(scores: Scores, wrong: Ints) -> Ints:
    """Return wrong images that the model labels as confidently as images that truly are of the predicted class.

    This is the criterion of confident learning (Northcutt, Jiang and Chuang 2021), with the score of the label that was
    predicted: it is not below the mean score of the images of that class that are labelled right. A class without such images
    has no criterion.
    """
    right = scores.right
    count = np.bincount(scores.label[right], minlength=scores.number_of_classes)
    total = np.bincount(scores.label[right], weights=scores.score[right], minlength=scores.number_of_classes)
    threshold = np.divide(total, count, out=np.full(len(count), np.inf), where=count > 0)
    doubtful: Ints = wrong[scores.score[wrong] >= threshold[scores.label[wrong]]]
    return doubtful


def _swapped(pairs: tuple[Pair, ...], confusion: Confusion) -> tuple[Pair, ...]:
    support = np.bincount(confusion.truth, weights=confusion.count, minlength=confusion.classes)
    return tuple(
        pair
        for pair in pairs
        if 2 * pair.first_as_second > support[pair.first] and 2 * pair.second_as_first > support[pair.second]
    )

"""Effects: which images are held out to choose on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from imgbatch.errors import InputError
from imgbatch.sources.split_words import TEST, TRAIN, VAL
from imgbatch.terminal.plurals import counted
from imgbatch.training.labels import NO_CLASS, Labelled

Ints = npt.NDArray[np.int64]

ALWAYS, NEVER = -1, -2
"""Folds of images that are always trained on, and of those that are never: they have no label, or are for testing."""

_MANY = 2_000


def assign(found: Labelled, folds: int | None, seed: int, usable: npt.NDArray[np.bool_]) -> Ints:
    """Return the fold of each image: it is held out when that fold is.

    Where the input names a val split, that is fold 0, and there is no other. Elsewhere each class is cut into `folds`
    runs of images that are neighbours in the listing, since those are often pictures of one thing in a row; they go to
    the folds in an order that the seed gives. A class of one image is always trained on.

    Args:
        usable: False for images that cannot be read.

    Raises:
        InputError: a class has images to choose on and none to train on.
    """
    taken = usable & (found.classes != NO_CLASS) & (found.splits != TEST)
    fold = np.where(taken, ALWAYS, NEVER).astype(np.int64)
    trained, chosen_on = taken & (found.splits == TRAIN), taken & (found.splits == VAL)
    lacking = np.setdiff1d(found.classes[chosen_on], found.classes[trained])
    if len(lacking):
        names = ", ".join(found.labels[number] for number in lacking[:5].tolist())
        raise InputError(
            f"{counted(len(lacking), 'class', 'classes')} with images in the val split and none to train on: {names}"
        )
    if chosen_on.any():
        fold[chosen_on] = 0
    elif found.groups is None:
        _by_runs(fold, found.classes, folds or default_folds(int(taken.sum())), np.random.default_rng(seed))
    else:
        _by_groups(fold, found, folds or default_folds(int(taken.sum())), np.random.default_rng(seed))
    return fold


def default_folds(n: int) -> int:
    """Return in how many parts n images are cut, of which one is held out: fewer where there are few."""
    return 5 if n < _MANY else 10


def _by_runs(fold: Ints, classes: Ints, folds: int, rng: np.random.Generator) -> None:
    """Cut each class into runs of one length, give or take an image."""
    for number in np.unique(classes[fold == ALWAYS]):
        members = np.flatnonzero((fold == ALWAYS) & (classes == number))
        if len(members) > 1:
            runs = np.arange(len(members)) * folds // max(folds, len(members))
            fold[members] = rng.permutation(folds)[runs]


def _by_groups(fold: Ints, found: Labelled, folds: int, rng: np.random.Generator) -> None:
    """Give each group to the fold that has least of its classes so far, the large ones first."""
    assert found.groups is not None
    members = np.flatnonzero(fold == ALWAYS)
    members = members[np.argsort(found.groups[members], kind="stable")]
    starts = np.flatnonzero(np.diff(found.groups[members], prepend=-1))
    parts = np.split(members, starts[1:])
    all_of = np.bincount(found.classes[members], minlength=len(found.labels))
    held = np.zeros((folds, len(found.labels)))
    for number in sorted(rng.permutation(len(parts)).tolist(), key=lambda part: -len(parts[part])):
        classes, counts = np.unique(found.classes[parts[number]], return_counts=True)
        after = held[:, classes] + counts
        leaves_some = (after < all_of[classes]).all(1)  # a class that is held out whole is not learned meanwhile
        if leaves_some.any():
            best = int(np.argmin(np.where(leaves_some, held[:, classes].sum(1), np.inf)))
            held[best, classes] += counts
            fold[parts[number]] = best


def one_alone(fold: Ints) -> Ints:
    """Return folds of which one is left, that with most images, as number 0.

    >>> one_alone(np.array([ALWAYS, 1, 1, 0, 2, NEVER])).tolist()
    [-1, 0, 0, -1, -1, -2]
    """
    most = np.bincount(fold[fold >= 0], minlength=1).argmax()
    return np.where(fold == most, 0, np.minimum(fold, ALWAYS))


def held_out(fold: Ints, number: int) -> tuple[Ints, Ints]:
    """Return the images to train on and those to choose on while one fold is held out."""
    return np.flatnonzero((fold >= ALWAYS) & (fold != number)), np.flatnonzero(fold == number)

"""Effects: folds: which images are held out to select the model."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from imgbatch.errors import InputError
from imgbatch.sources.split_words import TEST, TRAIN, VAL
from imgbatch.terminal.plurals import counted
from imgbatch.training.labels import NO_CLASS, Labelled

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

ALWAYS, NEVER = -1, -2
"""Folds of images that are always trained on, and of those that never are: they have no label, or are test images."""

_TEN_FOLDS_FROM = 2_000  # images


def assign(labelled: Labelled, folds: int | None, seed: int, usable: npt.NDArray[np.bool_]) -> Ints:
    """Return the fold of each image; the images of a fold are held out together.

    If the input has a val split, it is the only fold, 0. Otherwise each class is cut into `folds` runs of images that are
    neighbours in the listing, since neighbours often show the same object. The seed determines which run goes to which fold. A
    class of one image is always trained on.

    Args:
        usable: False for images that cannot be read.

    Raises:
        InputError: a class has images in the val split and none to train on.
    """
    used = usable & (labelled.classes != NO_CLASS) & (labelled.splits != TEST)
    fold = np.where(used, ALWAYS, NEVER).astype(np.int64)
    trained, validation = used & (labelled.splits == TRAIN), used & (labelled.splits == VAL)
    lacking = np.setdiff1d(labelled.classes[validation], labelled.classes[trained])
    if len(lacking):
        names = ", ".join(labelled.labels[number] for number in lacking[:5].tolist())
        raise InputError(
            f"{counted(len(lacking), 'class', 'classes')} with images in the val split and none to train on: {names}"
        )
    if validation.any():
        fold[validation] = 0
    elif labelled.groups is None:
        _by_runs(fold, labelled.classes, folds or default_folds(int(used.sum())), np.random.default_rng(seed))
    else:
        _by_groups(fold, labelled, folds or default_folds(int(used.sum())), np.random.default_rng(seed))
    return fold


def default_folds(n: int) -> int:
    """Return the default number of folds of n images."""
    return 5 if n < _TEN_FOLDS_FROM else 10


def _by_runs(fold: Ints, classes: Ints, folds: int, rng: np.random.Generator) -> None:
    """Cut each class into runs of the same length; some may be an image longer."""
    for number in np.unique(classes[fold == ALWAYS]):
        members = np.flatnonzero((fold == ALWAYS) & (classes == number))
        if len(members) > 1:
            runs = np.arange(len(members)) * folds // max(folds, len(members))
            fold[members] = rng.permutation(folds)[runs]


def _by_groups(fold: Ints, labelled: Labelled, folds: int, rng: np.random.Generator) -> None:
    """Assign each group to the fold with the fewest images of its classes so far; large groups first."""
    assert labelled.groups is not None
    members = np.flatnonzero(fold == ALWAYS)
    members = members[np.argsort(labelled.groups[members], kind="stable")]
    starts = np.flatnonzero(np.diff(labelled.groups[members], prepend=-1))
    parts = np.split(members, starts[1:])
    class_sizes = np.bincount(labelled.classes[members], minlength=len(labelled.labels))
    held_out_counts = np.zeros((folds, len(labelled.labels)))
    for number in sorted(rng.permutation(len(parts)).tolist(), key=lambda part: -len(parts[part])):
        classes, counts = np.unique(labelled.classes[parts[number]], return_counts=True)
        after = held_out_counts[:, classes] + counts
        # A fold must not hold out all images of a class: the model of that fold could not learn the class.
        is_allowed = (after < class_sizes[classes]).all(1)
        if is_allowed.any():
            smallest = int(np.argmin(np.where(is_allowed, held_out_counts[:, classes].sum(1), np.inf)))
            held_out_counts[smallest, classes] += counts
            fold[parts[number]] = smallest


def only_largest(fold: Ints) -> Ints:
    """Return the largest fold as number 0; the images of the others are always trained on.

    >>> only_largest(np.array([ALWAYS, 1, 1, 0, 2, NEVER])).tolist()
    [-1, 0, 0, -1, -1, -2]
    """
    largest = np.bincount(fold[fold >= 0], minlength=1).argmax()
    return np.where(fold == largest, 0, np.minimum(fold, ALWAYS))


def held_out(fold: Ints, number: int) -> tuple[Ints, Ints]:
    """Return the images to train on, and the held-out ones, for one fold."""
    return np.flatnonzero((fold >= ALWAYS) & (fold != number)), np.flatnonzero(fold == number)


def describe(fold: Ints) -> str:
    """Describe how the prepared images are divided.

    >>> describe(np.array([0, 1, 2, 0, 1])), describe(np.array([ALWAYS, ALWAYS, 0]))
    ('5 images, 3-fold cross-validation', '2 images to learn from, 1 held out to select the model')
    >>> describe(np.array([ALWAYS, 0, 1])), describe(np.array([ALWAYS, NEVER]))
    ('3 images, 2-fold cross-validation of 2 of them', '1 image to learn from, none held out')
    """
    used, held_out_images = int(np.count_nonzero(fold != NEVER)), int(np.count_nonzero(fold >= 0))
    folds = int(fold.max(initial=NEVER)) + 1
    if folds > 1:
        part = "" if held_out_images == used else f" of {held_out_images:,} of them"
        return f"{counted(used, 'image')}, {folds}-fold cross-validation{part}"
    part = f"{held_out_images:,} held out to select the model" if held_out_images else "none held out"
    return f"{counted(used - held_out_images, 'image')} to learn from, {part}"


def warn_of_single_images(labelled: Labelled, fold: Ints) -> None:
    """Log the classes with one image, which cannot be held out."""
    counts = np.bincount(labelled.classes[fold >= ALWAYS], minlength=len(labelled.labels))
    single = [labelled.labels[number] for number in np.flatnonzero(counts == 1).tolist()]
    if single:
        shown = ", ".join(single[:5]) + (", …" if len(single) > 5 else "")
        log.warning(
            "%s with one image, from which little is learned and which cannot be held out: %s",
            counted(len(single), "class", "classes"),
            shown,
        )

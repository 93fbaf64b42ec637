"""Effects: the classes, splits and groups that training learns from.

Where the label and the split of an image come from is decided in `imgbatch/sources/declared.py`; this module numbers the
classes and checks that training can use them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.sources.patterns import is_junk
from imgbatch.sources.spelling import require_distinct
from imgbatch.sources.split_words import SPLIT_NAMES, TEST, TRAIN, VAL
from imgbatch.terminal.plurals import counted

log = logging.getLogger(__name__)

NO_CLASS = -1

_SHOWN = 5

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Class, split and group of n images, in the order of the listing."""

    labels: tuple[str, ...]
    """The names of the classes, sorted; the outputs of the head have the same order."""
    classes: Ints
    """NO_CLASS for an image without a label, or with one that only test images have."""
    splits: Ints
    """TRAIN, VAL or TEST."""
    groups: Ints | None
    """The number of each image's group; all images of a group belong to one split. None: there are no groups."""


def number_classes(names: pa.Array, splits: Ints, groups: pa.Array) -> Labelled:
    """Number the classes of images.

    Args:
        names: the label of each image, normalised; null where it has none.
        splits: TRAIN, VAL or TEST.
        groups: the name of each image's group; null where it has none.

    Raises:
        InputError: there are fewer than two classes, no image to train on, names that differ only in spelling, or a group in
            two splits.
    """
    named = pc.is_valid(names)
    learned = pc.unique(names.filter(pc.and_(named, pa.array(splits != TEST)))).sort()
    labels = tuple(learned.to_pylist())
    classes = pc.fill_null(pc.index_in(names, learned), NO_CLASS).to_numpy().astype(np.int64)
    counts = {row["values"]: row["counts"] for row in names.drop_null().value_counts().to_pylist()}
    require_distinct(sorted(counts), "labels", counts)
    _require_two(labels, names, splits)
    _require_trained(labels, classes, splits)
    if test_only := pc.unique(names.filter(pc.and_(named, pa.array(classes == NO_CLASS)))).to_pylist():
        log.warning(
            "%s with test images only, which are not learned: %s",
            counted(len(test_only), "class", "classes"),
            ", ".join(test_only[:_SHOWN]),
        )
    require_distinct(pc.unique(groups.drop_null()).to_pylist(), "groups")
    group_numbers = _number_groups(groups)
    if group_numbers is not None:
        _require_undivided(group_numbers, splits, groups)
    return Labelled(labels, classes, splits, group_numbers)


def _require_two(labels: Sequence[str], names: pa.Array, splits: Ints) -> None:
    """Refuse fewer than two classes, and inputs without an image to train on."""
    valid = np.asarray(pc.is_valid(names))
    if valid.any() and not (valid & (splits == TRAIN)).any():
        present = " and ".join(SPLIT_NAMES[code] for code in np.unique(splits[valid]).tolist())
        raise InputError(
            f"all labelled images are of the split {present}: there is none to train on. If that is not a split, set "
            "source.splits=none"
        )
    if len(labels) < 2:
        only = f" ({labels[0]})" if labels else ""
        without = f"; {counted(int(np.count_nonzero(~valid)), 'image')} without a label" if not valid.all() else ""
        raise InputError(
            f"the input holds {counted(len(labels), 'class', 'classes')}{only}{without}: at least two are needed. A class "
            "is a folder of images, a value of a table's column 'label', or the content of .cls or .json next to an image in a "
            "tar. If a table names the labels, give it as --input (source.label_column, source.uri_template name its "
            "columns); source.label_depth sets which folder is the class. docs/labels-and-splits.md has an example of each"
        )


def _require_trained(labels: Sequence[str], classes: Ints, splits: Ints) -> None:
    """Refuse classes with validation images and without training images."""
    lacking = np.setdiff1d(classes[(splits == VAL) & (classes != NO_CLASS)], classes[splits == TRAIN])
    if len(lacking):
        names = ", ".join(labels[number] for number in lacking[:_SHOWN].tolist())
        raise InputError(
            f"{counted(len(lacking), 'class', 'classes')} with images in the val split and none to train on: {names}"
        )


def _number_groups(names: pa.Array) -> Ints | None:
    """Return the number of each image's group; an image without one is a group of its own."""
    alone = np.asarray(pc.fill_null(pc.equal(names, ""), True))
    if alone.all():
        return None
    groups: Ints = pc.fill_null(names, "").dictionary_encode().indices.to_numpy().astype(np.int64)
    groups[alone] = len(names) + np.arange(int(alone.sum()))
    return groups


def _require_undivided(groups: Ints, splits: Ints, names: pa.Array) -> None:
    """Refuse a group with images in two splits."""
    order = np.argsort(groups, kind="stable")
    divided = np.flatnonzero((np.diff(groups[order]) == 0) & (np.diff(splits[order]) != 0))
    if len(divided):
        kinds = [SPLIT_NAMES[splits[at]] for at in order[divided[0] : divided[0] + 2]]
        raise InputError(
            f"group {names[int(order[divided[0]])].as_py()!r} has images in the splits {' and '.join(kinds)}: all images of a "
            "group belong to one split; correct the columns 'group' and 'split'"
        )


def empty_folders(place: str, folders: Sequence[str], uris: pa.ChunkedArray) -> list[str]:
    """Return the folders directly below a place that hold no image.

    >>> empty_folders("/data", ["cat", "dog", "@eaDir"], pa.chunked_array([["/data/cat/1.jpg", "/data/2.jpg"]]))
    ['dog']
    """
    below = uris.filter(pc.starts_with(uris, f"{place}/"))
    parts = pc.split_pattern(pc.utf8_slice_codeunits(below, len(place) + 1), "/", max_splits=1)
    full = set(pc.unique(pc.list_element(parts, 0)).to_pylist())
    return [name for name in folders if name not in full and not is_junk(name)]


def class_counts(labelled: Labelled) -> dict[str, Any]:
    """Return the number of images of each class, for the record."""
    counts = np.bincount(labelled.classes[labelled.classes >= 0], minlength=len(labelled.labels))
    return {"classes": dict(zip(labelled.labels, counts.tolist(), strict=True))}

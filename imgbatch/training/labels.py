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
    """The names of the classes, sorted: the order of the head."""
    classes: Ints
    """NO_CLASS where an image has no label, or one that only images for testing have."""
    splits: Ints
    """TRAIN, VAL or TEST."""
    groups: Ints | None
    """Images of one group are all on one side of a split."""


def read(names: pa.Array, splits: Ints, groups: pa.Array) -> Labelled:
    """Number the classes of images.

    Args:
        names: the label of each image, normalised; null where it has none.
        splits: TRAIN, VAL or TEST.
        groups: the name of each image's group; null where it has none.

    Raises:
        InputError: there are fewer than two classes, no image to train on, names that a person would take for one, or a group
            in two splits.
    """
    named = pc.is_valid(names)
    known = pc.unique(names.filter(pc.and_(named, pa.array(splits != TEST)))).sort()
    labels = tuple(known.to_pylist())
    classes = pc.fill_null(pc.index_in(names, known), NO_CLASS).to_numpy().astype(np.int64)
    counts = {each["values"]: each["counts"] for each in names.drop_null().value_counts().to_pylist()}
    require_distinct(sorted(counts), "labels", counts)
    _require_two(labels, names, splits)
    _require_trained(labels, classes, splits)
    if for_testing := pc.unique(names.filter(pc.and_(named, pa.array(classes == NO_CLASS)))).to_pylist():
        log.warning(
            "%s with images for testing alone: not learned: %s",
            counted(len(for_testing), "class", "classes"),
            ", ".join(for_testing[:_SHOWN]),
        )
    require_distinct(pc.unique(groups.drop_null()).to_pylist(), "groups")
    numbered = _groups(groups)
    if numbered is not None:
        _require_whole(numbered, splits, groups)
    return Labelled(labels, classes, splits, numbered)


def _require_two(labels: Sequence[str], names: pa.Array, splits: Ints) -> None:
    """Refuse what nothing can be learned from."""
    valid = np.asarray(pc.is_valid(names))
    if valid.any() and not (valid & (splits == TRAIN)).any():
        there = " and ".join(SPLIT_NAMES[code] for code in np.unique(splits[valid]).tolist())
        raise InputError(
            f"all labelled images are of the split {there}: there is none to train on. If that is not a split, say "
            "source.splits=none"
        )
    if len(labels) < 2:
        only = f" ({labels[0]})" if labels else ""
        without = f"; {counted(int(np.count_nonzero(~valid)), 'image')} without a label" if not valid.all() else ""
        raise InputError(
            f"the input holds {counted(len(labels), 'class', 'classes')}{only}{without}: at least two are needed. A class "
            "is a folder of images, a value of a table's column 'label', or what .cls or .json say beside an image in a "
            "tar. If a table names the labels, give it as --input (source.label_column, source.uri_template name its "
            "columns); source.label_depth says which folder is the class. docs/labels-and-splits.md has an example of each"
        )


def _require_trained(labels: Sequence[str], classes: Ints, splits: Ints) -> None:
    """Refuse classes that images are chosen on, and none is trained on."""
    lacking = np.setdiff1d(classes[(splits == VAL) & (classes != NO_CLASS)], classes[splits == TRAIN])
    if len(lacking):
        names = ", ".join(labels[number] for number in lacking[:_SHOWN].tolist())
        raise InputError(
            f"{counted(len(lacking), 'class', 'classes')} with images in the val split and none to train on: {names}"
        )


def _groups(names: pa.Array) -> Ints | None:
    """Return a number for each group; what has none is a group of its own."""
    alone = np.asarray(pc.fill_null(pc.equal(names, ""), True))
    if alone.all():
        return None
    groups: Ints = pc.fill_null(names, "").dictionary_encode().indices.to_numpy().astype(np.int64)
    groups[alone] = len(names) + np.arange(int(alone.sum()))
    return groups


def _require_whole(groups: Ints, splits: Ints, names: pa.Array) -> None:
    """Refuse a group of which the input puts some images into one split and some into another."""
    order = np.argsort(groups, kind="stable")
    torn = np.flatnonzero((np.diff(groups[order]) == 0) & (np.diff(splits[order]) != 0))
    if len(torn):
        kinds = [SPLIT_NAMES[splits[at]] for at in order[torn[0] : torn[0] + 2]]
        raise InputError(
            f"group {names[int(order[torn[0]])].as_py()!r} has images in the splits {' and '.join(kinds)}: all images of a "
            "group belong to one split; correct the columns 'group' and 'split'"
        )


def empty_folders(place: str, folders: Sequence[str], uris: pa.ChunkedArray) -> list[str]:
    """Return which folders directly below a place hold no image.

    >>> empty_folders("/data", ["cat", "dog", "@eaDir"], pa.chunked_array([["/data/cat/1.jpg", "/data/2.jpg"]]))
    ['dog']
    """
    below = uris.filter(pc.starts_with(uris, f"{place}/"))
    parts = pc.split_pattern(pc.utf8_slice_codeunits(below, len(place) + 1), "/", max_splits=1)
    full = set(pc.unique(pc.list_element(parts, 0)).to_pylist())
    return [name for name in folders if name not in full and not is_junk(name)]


def summary(found: Labelled) -> dict[str, Any]:
    """Return what the record says of the data."""
    counts = np.bincount(found.classes[found.classes >= 0], minlength=len(found.labels))
    return {"classes": dict(zip(found.labels, counts.tolist(), strict=True))}

"""Which class and which split each listed image has: from the manifest's columns, or from the folder that it lies in. Pure.

A table's columns `label`, `split` and `group` say it, whatever the source; a tar's members bring a label along. Where
nobody says anything, an object's class is the folder that holds it, and the split the first folder below the input, if that is
called train, val or test; a tar or a Parquet file may lie in it as well.
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
from imgbatch.schema import CARRIED
from imgbatch.sources.labelled import TEST, TRUTH, split_names, splits_of, text
from imgbatch.sources.names import is_junk

log = logging.getLogger(__name__)

LABEL, GROUP = TRUTH, CARRIED + "group"
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
    """Images of one group never stand on both sides of a split."""


def read(listed: pa.Table, roots: Sequence[str]) -> Labelled:
    """Read the classes off images.

    Args:
        listed: the columns `uri` and, where there are any, `container`, LABEL, SPLIT and GROUP.
        roots: the folders that were given as inputs. Below them, and everywhere if there is no LABEL, an object that LABEL
            says nothing of has the class of its folder.

    Raises:
        InputError: there are fewer than two classes, labels that a person would take for one, or a group in two splits.
    """
    names = text(listed, LABEL)
    silent = pc.and_(pc.is_null(names), pc.is_null(text(listed, "container")))
    if pc.any(silent).as_py():
        below_alone = not pc.all(pc.is_null(names)).as_py()
        labels = _from_folders(listed["uri"].filter(silent), roots, below_alone=below_alone)
        names = pc.replace_with_mask(names, silent, labels)
    names, codes = pc.fill_null(names, ""), splits_of(listed, roots)
    named = pc.not_equal(names, "")
    known = pc.unique(names.filter(pc.and_(named, pa.array(codes != TEST)))).sort()
    labels = tuple(known.to_pylist())
    classes = pc.fill_null(pc.index_in(names, known), NO_CLASS).to_numpy().astype(np.int64)
    _require_distinct(labels, classes)
    if len(labels) < 2:
        only = f" ({labels[0]})" if labels else ""
        raise InputError(
            f"the input holds {len(labels)} class{'es' * (len(labels) != 1)}{only}: at least two are needed. A class is a "
            "folder of images, a value of a table's column 'label', or what .cls or .json say beside an image in a tar"
        )
    if unlabelled := pc.sum(pc.invert(named)).as_py():
        log.warning("%s images have no label and are left out", f"{unlabelled:,}")
    if for_testing := pc.unique(names.filter(pc.and_(named, pa.array(classes == NO_CLASS)))).to_pylist():
        log.warning(
            "%d classes have images for testing alone and are not learned: %s",
            len(for_testing),
            ", ".join(for_testing[:_SHOWN]),
        )
    together = text(listed, GROUP)
    groups = _groups(together)
    if groups is not None:
        _require_whole(groups, codes, together)
    return Labelled(labels, classes, codes, groups)


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
        kinds = [("train", "val", "test")[splits[at]] for at in order[torn[0] : torn[0] + 2]]
        raise InputError(
            f"group {names[int(order[torn[0]])].as_py()!r} has images in the splits {' and '.join(kinds)}: a group "
            "stands in one of them; mend the columns 'group' and 'split'"
        )


def _from_folders(uris: pa.ChunkedArray, roots: Sequence[str], *, below_alone: bool) -> pa.Array:
    """Return the label of each object by its folders, empty where they say nothing."""
    places = pc.replace_substring_regex(uris.combine_chunks(), pattern="/[^/]*$", replacement="")
    places = places.chunk(0) if isinstance(places, pa.ChunkedArray) else places
    unique = pc.unique(places).to_pylist()
    splits = split_names(pa.table({"uri": [f"{place}/" for place in unique]}), roots).to_pylist()
    first: dict[tuple[str, str | None], str] = {}
    found = []
    for place, split in zip(unique, splits, strict=True):
        below = [root for root in roots if f"{place}/".startswith(f"{root}/")]
        label = "" if below_alone and not below else _of_folder(place, max(below, key=len, default=""), roots)
        if label and (other := first.setdefault((label, split), place)) != place:
            raise InputError(
                f"the class {label!r} stands in two places, {other} and {place}: put its images together, or rename "
                "one of the folders, or give a table with the columns uri and label"
            )
        found.append(label)
    return pa.array(found, pa.string()).take(pc.index_in(places, pa.array(unique, pa.string())))


def _of_folder(place: str, root: str, roots: Sequence[str]) -> str:
    """Return the label of the images in a folder."""
    path = place.removeprefix(root).strip("/").split("/")
    # One of several inputs may be the folder of a class itself.
    label = path[-1] or (root.rpartition("/")[2] if len(roots) > 1 else "")
    if not label:
        raise InputError(
            f"images lie in {place} itself: each class needs a folder of its own below it, or give a table with the "
            "columns uri and label"
        )
    return label


def _require_distinct(labels: Sequence[str], classes: Ints) -> None:
    """Refuse labels that differ in case or in spaces alone: one class would be taught as two."""
    alike: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        alike.setdefault(" ".join(label.casefold().replace("_", " ").split()), []).append(number)
    counts = np.bincount(classes[classes >= 0], minlength=len(labels))
    pairs = [
        " and ".join(f"{labels[number]!r} ({counts[number]:,} images)" for number in numbers)
        for numbers in alike.values()
        if len(numbers) > 1
    ]
    if pairs:
        more = f"; and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        raise InputError(
            f"labels that differ in case or spaces alone: {'; '.join(pairs[:_SHOWN])}{more}: give each class one spelling"
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

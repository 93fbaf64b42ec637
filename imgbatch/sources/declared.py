"""Effects: the decision where the labels and splits of each input come from, and the label and split of each image.

docs/labels-and-splits.md has the rules, with an example each. In short, labels come from a column or sidecars, else from class
folders; splits come from a column, else from split folders or split words in the names of tables and archives. Ambiguous inputs
are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config.sections import SourceConfig
from imgbatch.schema import single_chunk
from imgbatch.sources.label_rules import decide_labels
from imgbatch.sources.labelled import SPLIT, TRUTH, Columns
from imgbatch.sources.places import OBJECT, Place, Places
from imgbatch.sources.split_rules import decide_splits, splits_of_roots
from imgbatch.sources.split_words import TRAIN, split_codes

Ints = npt.NDArray[np.int64]

_MAX_CHECKED = 1_000


@dataclass(frozen=True, slots=True)
class Origin:
    """Texts that say where the labels and splits of one input come from."""

    uri: str
    labels: str
    splits: str


@dataclass
class Declaration:
    """The decision for all inputs."""

    config: SourceConfig
    places: Places
    origins: list[Origin] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    """Objects without a suffix that are not images."""
    overridden: int = 0
    """Number of images whose column or sidecar has another class than their class folder."""
    classes: dict[str, str | None] = field(default_factory=dict)
    """The classes of the places, by key."""
    splits: dict[str, int] = field(default_factory=dict)
    """The splits of the places, by key."""

    def apply(self, listed: pa.Table | pa.RecordBatch) -> tuple[pa.Array, Ints]:
        """Return the label of each image, null if it has none, and TRAIN, VAL or TEST.

        Args:
            listed: rows with TRUTH and SPLIT.

        Raises:
            InputError: a value in the column names no split.
        """
        keys = self.places.keys(listed).dictionary_encode()
        distinct = keys.dictionary.to_pylist()
        by_place = pa.array([self.classes.get(key) for key in distinct], pa.string()).take(keys.indices)
        declared = single_chunk(listed[TRUTH])
        if self.config.labels == "folders":
            labels = by_place
        else:
            labels = pc.coalesce(declared, by_place)
            self.overridden += pc.sum(pc.fill_null(pc.not_equal(declared, by_place), False)).as_py() or 0
        if self.ignored:
            labels = pc.if_else(self.is_ignored(listed), None, labels)
        codes = [self.splits.get(key) for key in distinct]
        splits = np.array([TRAIN if code is None else code for code in codes], np.int64)[keys.indices.to_numpy()]
        if self.config.splits in ("auto", "column", "names"):  # with names, SPLIT has the split in the name of a table
            column = split_codes(single_chunk(listed[SPLIT]), self.config.split_column or "split")
            splits = np.where(column >= 0, column, splits)
        return labels, splits

    def is_ignored(self, listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return a mask of the rows that are not images."""
        return pc.is_in(single_chunk(listed["uri"]), pa.array(sorted(self.ignored), pa.string()))


def decide(
    places: Places, columns: Sequence[Columns], config: SourceConfig, are_images: Callable[[list[str]], list[bool]]
) -> Declaration:
    """Decide where labels and splits come from.

    Args:
        places: the places of all images.
        columns: the columns of each input.
        are_images: tells from the first bytes which of some objects are images.

    Raises:
        InputError: an input is ambiguous; the message names two examples and the option that decides.
    """
    declaration = Declaration(config, places)
    places.strip_common()
    _drop_non_images(declaration, are_images)
    of_roots = splits_of_roots(places.roots, config)
    by_group: dict[int, list[tuple[str, Place]]] = {root.group: [] for root in places.roots}
    for key, place in places.by_key.items():
        place.split = None
        by_group[places.roots[place.number].group].append((key, place))
    for group, in_group in by_group.items():
        numbers = [number for number, root in enumerate(places.roots) if root.group == group]
        root, merged = places.roots[numbers[0]], Columns.merge([columns[number] for number in numbers])
        column = config.split_column or "split"
        by_column = config.splits in ("auto", "column") and column in merged.names
        splits, of_splits = ({}, f"column {column!r}") if by_column else decide_splits(in_group, root, config, of_roots)
        classes, of_labels = decide_labels(in_group, places.roots, merged, splits, config)
        declaration.splits |= splits
        declaration.classes |= classes
        declaration.origins.append(Origin(root.input or root.uri, of_labels, of_splits))
    return declaration


def _drop_non_images(declaration: Declaration, are_images: Callable[[list[str]], list[bool]]) -> None:
    """Check whether objects without a suffix are images, if they would influence what a folder means."""
    with_suffix: Counter[int] = Counter()
    for place in declaration.places.by_key.values():
        if place.kind == OBJECT:
            with_suffix[place.number] += place.images - place.bare_count
    checked: list[tuple[Place, str]] = []
    for place in declaration.places.by_key.values():
        all_names_kept = 0 < place.bare_count == len(place.bare)
        if place.kind == OBJECT and all_names_kept and (with_suffix[place.number] or not place.own):
            checked += [(place, uri) for uri in place.bare]
    checked = checked[:_MAX_CHECKED]
    results = are_images([uri for _, uri in checked]) if checked else []
    for (place, uri), is_image in zip(checked, results, strict=True):
        if not is_image:
            declaration.ignored.add(uri)
            place.images, place.unlabelled = place.images - 1, max(place.unlabelled - 1, 0)
            place.bare.remove(uri)
            place.bare_count -= 1

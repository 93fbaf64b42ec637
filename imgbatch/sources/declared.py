"""Effects: where the labels and splits of the inputs come from, decided once for each input, and what follows for each image.

The rules, with an example each, are in docs/labels-and-splits.md. In short: a column or sidecars, else class folders; a column,
else split folders or split words in the names of tables and archives. What can be meant in two ways is refused.
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
from imgbatch.sources.split_words import TRAIN, codes

Ints = npt.NDArray[np.int64]

_MAX_ASKED = 1_000


@dataclass(frozen=True, slots=True)
class Origin:
    """Where labels and splits of one input come from, in words."""

    uri: str
    labels: str
    splits: str


@dataclass
class Declaration:
    """What is decided for the inputs."""

    config: SourceConfig
    places: Places
    origins: list[Origin] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    """Objects without a suffix that turned out to be no images."""
    overridden: int = 0
    """Images whose class folder says another class than their column or sidecar."""
    classes: dict[str, str | None] = field(default_factory=dict)
    """Of the places, by their keys."""
    splits: dict[str, int] = field(default_factory=dict)

    def apply(self, listed: pa.Table | pa.RecordBatch) -> tuple[pa.Array, Ints]:
        """Return the label of each image, null where it has none, and TRAIN, VAL or TEST.

        Args:
            listed: rows whose places are known, with TRUTH and SPLIT.

        Raises:
            InputError: a column holds what names no split.
        """
        keys = self.places.keys(listed).dictionary_encode()
        known = keys.dictionary.to_pylist()
        by_place = pa.array([self.classes.get(key) for key in known], pa.string()).take(keys.indices)
        said = single_chunk(listed[TRUTH])
        if self.config.labels == "folders":
            labels = by_place
        else:
            labels = pc.coalesce(said, by_place)
            self.overridden += pc.sum(pc.fill_null(pc.not_equal(said, by_place), False)).as_py() or 0
        if self.ignored:
            labels = pc.if_else(self.is_ignored(listed), None, labels)
        found = [self.splits.get(key) for key in known]
        splits = np.array([TRAIN if code is None else code for code in found], np.int64)[keys.indices.to_numpy()]
        if self.config.splits in ("auto", "column", "names"):  # with names, what the name of a table says
            column = codes(single_chunk(listed[SPLIT]), self.config.split_column or "split")
            splits = np.where(column >= 0, column, splits)
        return labels, splits

    def is_ignored(self, listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return a mask of the rows that are no images."""
        return pc.is_in(single_chunk(listed["uri"]), pa.array(sorted(self.ignored), pa.string()))


def decide(
    places: Places, columns: Sequence[Columns], config: SourceConfig, are_images: Callable[[list[str]], list[bool]]
) -> Declaration:
    """Decide where labels and splits come from.

    Args:
        places: all images that are known, counted.
        columns: of each input.
        are_images: says of objects, from their first bytes, which are images.

    Raises:
        InputError: it can be meant in two ways; the message names two examples and the option that decides.
    """
    found = Declaration(config, places)
    places.strip_common()
    _drop_what_is_no_image(found, are_images)
    of_roots = splits_of_roots(places.roots, config)
    by_group: dict[int, list[tuple[str, Place]]] = {root.group: [] for root in places.roots}
    for key, place in places.known.items():
        place.split = None
        by_group[places.roots[place.number].group].append((key, place))
    for group, mine in by_group.items():
        numbers = [number for number, root in enumerate(places.roots) if root.group == group]
        root, together = places.roots[numbers[0]], Columns.of([columns[number] for number in numbers])
        column = config.split_column or "split"
        by_column = config.splits in ("auto", "column") and column in together.names
        splits, of_splits = ({}, f"column {column!r}") if by_column else decide_splits(mine, root, config, of_roots)
        classes, of_labels = decide_labels(mine, places.roots, together, splits, config)
        found.splits |= splits
        found.classes |= classes
        found.origins.append(Origin(root.given or root.uri, of_labels, of_splits))
    return found


def _drop_what_is_no_image(found: Declaration, are_images: Callable[[list[str]], list[bool]]) -> None:
    """Ask of objects without a suffix whether they are images, where they could decide what a folder means."""
    mixed: Counter[int] = Counter()
    for place in found.places.known.values():
        if place.kind == OBJECT:
            mixed[place.number] += place.images - place.bare_count
    asked: list[tuple[Place, str]] = []
    for place in found.places.known.values():
        few = 0 < place.bare_count == len(place.bare)
        if place.kind == OBJECT and few and (mixed[place.number] or not place.own):
            asked += [(place, uri) for uri in place.bare]
    asked = asked[:_MAX_ASKED]
    for (place, uri), good in zip(asked, are_images([uri for _, uri in asked]) if asked else [], strict=True):
        if not good:
            found.ignored.add(uri)
            place.images, place.unlabelled = place.images - 1, max(place.unlabelled - 1, 0)
            place.bare.remove(uri)
            place.bare_count -= 1

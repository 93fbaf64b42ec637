"""Values: where the labels and splits of the inputs come from, decided once for each input, and what follows for each image.

The rules, with an example each, are in docs/labels-and-splits.md. In short: a column or sidecars, else class folders; a column,
else split folders or split words in the names of tables and archives. What can be meant in two ways is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config import SourceConfig
from imgbatch.errors import InputError
from imgbatch.schema import whole
from imgbatch.sources.labelled import SPLIT, TRUTH, Columns
from imgbatch.sources.places import MEMBER, NAMED, OBJECT, ROW, Place, Places, Root
from imgbatch.sources.split_words import SPLIT_NAMES, TRAIN, WORDS, codes, of_file, of_folder

Ints = npt.NDArray[np.int64]

_PARTS = re.compile(
    r"(?i)(?P<stem>.*(?:part|batch|chunk|shard|folder|dir|dis[ck]|vol|volume|page|bucket|split|fold|images?|imgs?|photos?|pics?"
    r"|data|set))[-_ ]*\d+"
)
_DATE = re.compile(r"(?P<stem>)\d{4}[-_.]\d{2}([-_.]\d{2})?")
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
    columns: Sequence[Columns]
    origins: list[Origin] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    """Objects without a suffix that turned out to be no images."""
    overridden: int = 0
    """Images whose class folder says another class than their column or sidecar."""
    _classes: dict[str, str | None] = field(default_factory=dict)
    _splits: dict[str, int | None] = field(default_factory=dict)

    def apply(self, listed: pa.Table | pa.RecordBatch) -> tuple[pa.Array, Ints]:
        """Return the label of each image, null where it has none, and TRAIN, VAL or TEST.

        Args:
            listed: rows whose places are known, with TRUTH and SPLIT.

        Raises:
            InputError: a column holds what names no split.
        """
        keys = self.places.keys(listed).dictionary_encode()
        known = keys.dictionary.to_pylist()
        by_place = pa.array([self._classes.get(key) for key in known], pa.string()).take(keys.indices)
        said = whole(listed[TRUTH])
        if self.config.labels == "folders":
            labels = by_place
        else:
            labels = pc.coalesce(said, by_place)
            self.overridden += pc.sum(pc.fill_null(pc.not_equal(said, by_place), False)).as_py() or 0
        if self.ignored:
            labels = pc.if_else(self.is_ignored(listed), None, labels)
        found = [self._splits.get(key) for key in known]
        splits = np.array([TRAIN if code is None else code for code in found], np.int64)[keys.indices.to_numpy()]
        if self.config.splits in ("auto", "column"):
            column = codes(whole(listed[SPLIT]), self.config.split_column or "split")
            splits = np.where(column >= 0, column, splits)
        return labels, splits

    def is_ignored(self, listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return a mask of the rows that are no images."""
        return pc.is_in(whole(listed["uri"]), pa.array(sorted(self.ignored), pa.string()))


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
    found = Declaration(config, places, columns)
    places.strip_common()
    _drop_what_is_no_image(found, are_images)
    by_input: dict[int, list[tuple[str, Place]]] = {number: [] for number in range(len(places.roots))}
    for key, place in places.known.items():
        by_input[place.number].append((key, place))
    named_roots = _splits_of_roots(places.roots) if config.splits in ("auto", "folders") else {}
    for number, mine in by_input.items():
        splits = _decide_splits(found, number, mine, named_roots.get(number))
        labels = _decide_labels(found, number, mine)
        found.origins.append(Origin(places.roots[number].given or places.roots[number].uri, labels, splits))
    return found


def _decide_splits(found: Declaration, number: int, mine: list[tuple[str, Place]], of_root: int | None) -> str:
    """Note the split of each place; return where it comes from, in words."""
    config, root = found.config, found.places.roots[number]
    column = config.split_column or "split"
    if config.splits == "none":
        return "none"
    if config.splits in ("auto", "column") and column in found.columns[number].names:
        return f"column {column!r}"
    if config.splits == "column":
        return "none"
    by_folder = by_name = 0
    for key, place in mine:
        folder = of_root if config.splits != "names" else None
        split = place.split if config.splits != "names" else None
        folder = split.code if split is not None else folder
        name = of_file(place.file or root.own) if config.splits != "folders" and place.kind != OBJECT else None
        if split is not None and split.in_archive:  # which says more than the name of the archive
            name = None
        if folder is not None and name is not None and folder != name:
            raise InputError(
                f"{place.example} lies in a folder of the split {SPLIT_NAMES[folder]}, and {place.file or root.own} names the "
                f"split {SPLIT_NAMES[name]}: say source.splits=folders or source.splits=names"
            )
        found._splits[key] = folder if folder is not None else name
        by_folder, by_name = by_folder + (folder is not None), by_name + (name is not None)
    _require_all_in_splits(mine, root)
    return " and ".join(word for word, count in (("folders", by_folder), ("names", by_name)) if count) or "none"


def _require_all_in_splits(mine: Iterable[tuple[str, Place]], root: Root) -> None:
    """Refuse folders of images that lie beside split folders, where nothing else says the labels."""
    for kind in (OBJECT, MEMBER):
        own = [place for _, place in mine if place.kind == kind and place.own and place.unlabelled]
        inside = [place for place in own if (at := place.split) is not None and at.in_archive == (kind == MEMBER)]
        beside = [place for place in own if place.split is None]
        if inside and beside:
            raise InputError(
                f"{root.uri} holds split folders, with {inside[0].example}, and beside them images that lie in none, such as "
                f"{beside[0].example}: give the split folders alone as inputs, or say source.splits=none, with which every "
                "folder of images is a class"
            )


def _splits_of_roots(roots: Sequence[Root]) -> dict[int, int]:
    """Return the split of each input that is a folder named after one, if they are of several splits."""
    named = {
        number: of_folder(root.uri.rpartition("/")[2]) for number, root in enumerate(roots) if root.kind == "folder"
    }
    found = {number: split for number, split in named.items() if split is not None}
    return found if len(set(found.values())) > 1 else {}


def _decide_labels(found: Declaration, number: int, mine: list[tuple[str, Place]]) -> str:
    """Note the class of each place; return where labels come from, in words."""
    config, root, columns = found.config, found.places.roots[number], found.columns[number]
    column = config.label_column or "label"
    if config.labels != "folders":
        if column in columns.names and config.labels in ("auto", "column"):
            return f"column {column!r}"
        if any(place.kind == MEMBER and place.unlabelled < place.images for _, place in mine):
            return "sidecars"
        if config.labels != "auto":
            return "none"
    kinds = (OBJECT, MEMBER) if config.labels == "auto" else (OBJECT, MEMBER, ROW, NAMED)
    by_folder = [(key, place) for key, place in mine if place.kind in kinds and place.images]
    for key, place in by_folder:
        found._classes[key] = _class_of(place, root, config, several=len(found.places.roots) > 1)
    # What another input labels may lie anywhere.
    wanted = [(key, place) for key, place in by_folder if place.unlabelled or config.labels == "folders"]
    if not wanted:
        return "none"
    if config.label_depth is None:
        _require_folders(found, wanted, root)
        _require_no_nesting([place for _, place in wanted], root, config)
        _require_one_place(found, wanted, root)
    if config.labels == "auto":
        _require_classes({name for key, _ in wanted if (name := found._classes[key])}, wanted, found)
    return f"folders (source.label_depth={config.label_depth})" if config.label_depth else "folders"


def _class_of(place: Place, root: Root, config: SourceConfig, *, several: bool) -> str | None:
    """Return the class of the images of a place; None: its folders name none."""
    by_split = config.splits in ("auto", "folders")
    if config.label_depth is not None:
        folders = place.folders(without_split=by_split, all_of_them=True)
        return folders[config.label_depth - 1] if len(folders) >= config.label_depth else None
    if by_split and place.in_split_folder:
        return None
    own = place.folders(without_split=by_split)
    if own or place.kind == MEMBER:
        return own[-1] if own else None
    # One of several inputs may be the folder of a class itself.
    may_be_class = several or root.kind in ("glob", "object")
    return _name(root) or None if may_be_class and not (by_split and of_folder(_name(root)) is not None) else None


def _name(root: Root) -> str:
    return root.uri.rstrip("/").rpartition("/")[2]


def _require_folders(found: Declaration, wanted: Iterable[tuple[str, Place]], root: Root) -> None:
    """Refuse objects that lie in an input itself, whose class no folder names."""
    for key, place in wanted:
        if found._classes[key] is None and not place.own and place.kind != MEMBER and of_folder(_name(root)) is None:
            raise InputError(
                f"images lie in {root.uri} itself, such as {place.example}: each class needs a folder of its own below it, or "
                "give a table with the columns uri and label"
            )


def _require_no_nesting(places: Sequence[Place], root: Root, config: SourceConfig) -> None:
    """Refuse folders that hold both images and folders of images."""
    first: dict[tuple[str, ...], Place] = {}
    for place in places:
        first.setdefault((place.kind, *place.own), place)
    for path, place in first.items():
        for length in range(1 + (place.kind == MEMBER), len(path)):
            if (above := first.get(path[:length])) is not None:
                depth = max(len(above.folders(without_split=config.splits in ("auto", "folders"))), 1)
                raise InputError(
                    f"a folder holds images, such as {above.example}, and a folder of images, such as {place.example}: which "
                    f"one is the class? source.label_depth={depth} takes the folder at depth {depth} below {root.uri}, not "
                    "counting split folders, for all of them"
                )


def _require_one_place(found: Declaration, wanted: Iterable[tuple[str, Place]], root: Root) -> None:
    """Refuse a class whose objects lie in two places of one split."""
    first: dict[tuple[str, int | None], Place] = {}
    for key, place in wanted:
        name = found._classes[key]
        if place.kind != OBJECT or name is None:
            continue
        other = first.setdefault((name, found._splits.get(key)), place)
        if other.own != place.own:
            raise InputError(
                f"the class {name!r} is in two places, with {other.example} and {place.example}: put its images together, "
                f"rename one of the folders, or say with source.label_depth which folder below {root.uri} is the class"
            )


def _require_classes(names: set[str], wanted: Sequence[tuple[str, Place]], found: Declaration) -> None:
    """Refuse folders whose names are those of splits, or of parts of a set, rather than of classes."""
    for key, place in wanted:
        name = found._classes[key]
        if name is not None and name.casefold() in WORDS and found.config.splits in ("auto", "folders"):
            raise InputError(
                f"{place.example} lies in a folder called {name!r}, like a split: if it is a class, say "
                "source.labels=folders, or source.splits=none"
            )
    for pattern, what in ((_PARTS, "numbered parts of one set"), (_DATE, "dates")):
        stems = {match["stem"] if (match := pattern.fullmatch(name)) else None for name in names}
        if len(names) > 1 and len(stems) == 1 and None not in stems:
            shown = ", ".join(sorted(names)[:3])
            raise InputError(
                f"the folders {shown}{', …' if len(names) > 3 else ''} look like {what}, not like classes: give a table with "
                "the columns uri and label (source.label_column, source.uri_template), or say source.labels=folders if they "
                "are classes"
            )


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


def require_sidecars(origins: Sequence[Origin], number: int, problems: Iterable[tuple[str, str]]) -> None:
    """Refuse tars whose `.json` members may hold labels, but in another form, where folders would take their place.

    Args:
        problems: pairs of an image's URI and what is wrong with its sidecar.

    Raises:
        InputError: naming the first one.
    """
    for uri, problem in problems:
        if not origins[number].labels.startswith(("sidecars", "column")):
            raise InputError(
                f"{uri}: {problem}; or say source.labels=folders if the folders in the tar are the classes"
            )

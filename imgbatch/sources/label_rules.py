"""Effects: the class of each place, according to its folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.sources.labelled import Columns
from imgbatch.sources.places import MEMBER, NAMED, OBJECT, ROW, Place, Root
from imgbatch.sources.split_words import split_of_folder

_PARTS = re.compile(
    r"(?i)(?P<stem>.*(?:part|batch|chunk|shard|folder|dir|dis[ck]|vol|volume|page|bucket|split|fold|images?|imgs?|photos?|pics?"
    r"|data|set))[-_ ]*\d+"
)
_DATE = re.compile(r"(?P<stem>)\d{4}[-_.]\d{2}([-_.]\d{2})?")
_FOLDERS = ("folder", "glob", "object", "inventory")

Keyed = tuple[str, Place]
Classes = Mapping[str, str | None]


def decide_labels(
    places: Sequence[Keyed], roots: Sequence[Root], columns: Columns, splits: Mapping[str, int], config: SourceConfig
) -> tuple[dict[str, str | None], str]:
    """Return the class of each place of an input, by key, and a text that says where labels come from.

    Args:
        places: the places of the input, with their keys.
        roots: the folders of all inputs.
        columns: the columns of this input.
        splits: the splits of the places, by key.

    Raises:
        InputError: the folders are ambiguous.
    """
    column = config.label_column or "label"
    if config.labels != "folders":
        if column in columns.names and config.labels in ("auto", "column"):
            return {}, f"column {column!r}"
        if any(place.kind == MEMBER and place.unlabelled < place.images for _, place in places):
            return {}, "sidecars"
        if config.labels != "auto":
            return {}, "none"
    kinds = (OBJECT, MEMBER) if config.labels == "auto" else (OBJECT, MEMBER, ROW, NAMED)
    by_folder = [(key, place) for key, place in places if place.kind in kinds and place.images]
    several = len({root.group for root in roots if root.kind in _FOLDERS}) > 1
    classes = {key: _class_of(place, roots[place.number], config, several=several) for key, place in by_folder}
    # Images that another input labels may be in any folder.
    required = [(key, place) for key, place in by_folder if place.unlabelled or config.labels == "folders"]
    if not required:
        return classes, "none"
    if config.label_depth is None:
        _require_folders(classes, required, roots)
        _require_no_nesting([place for _, place in required], roots)
        _require_one_place(classes, splits, required)
    if config.labels == "auto":
        _require_no_split_words(classes, required, config)
        _require_no_parts({name for key, _ in required if (name := classes[key])})
        _require_no_loose_sidecars(columns)
    return classes, f"folders (source.label_depth={config.label_depth})" if config.label_depth else "folders"


def _class_of(place: Place, root: Root, config: SourceConfig, *, several: bool) -> str | None:
    """Return the class of the images in a place; None if no folder names it."""
    if config.label_depth is not None:
        folders = place.folders(with_archive=True)
        return folders[config.label_depth - 1] if len(folders) >= config.label_depth else None
    own = () if place.in_split_folder else place.folders()
    if own or place.in_split_folder or place.kind == MEMBER:
        return own[-1] if own else None
    # Each of several inputs may itself be the folder of a class, unless a table labels some of its images.
    may_be_class = (several or root.kind in ("glob", "object")) and place.unlabelled == place.images
    return (_name(root) or None) if may_be_class and split_of_folder(_name(root)) is None else None


def _name(root: Root) -> str:
    return root.uri.rstrip("/").rpartition("/")[2]


def _require_folders(classes: Classes, places: Iterable[Keyed], roots: Sequence[Root]) -> None:
    """Refuse images directly in the folder of the input, which have no class folder."""
    for key, place in places:
        root = roots[place.number]
        in_itself = classes[key] is None and not place.own and place.kind != MEMBER
        if in_itself and place.unlabelled == place.images and split_of_folder(_name(root)) is None:
            raise InputError(
                f"images are directly in {root.uri}, such as {place.example}. Move each class to a folder of its own below it, "
                "or give a table with the columns uri and label"
            )


def _require_no_nesting(places: Sequence[Place], roots: Sequence[Root]) -> None:
    """Refuse folders with both images and folders of images."""
    first: dict[tuple[object, ...], Place] = {}
    for place in places:
        first.setdefault((place.number, place.kind, *place.own), place)
    for path, place in first.items():
        for length in range(2 + (place.kind == MEMBER), len(path)):
            if (above := first.get(path[:length])) is not None:
                depth = max(len(above.folders(with_archive=True)), 1)
                raise InputError(
                    f"a folder has images, such as {above.example}, and a folder of images, such as {place.example}: which one "
                    f"is the class? source.label_depth={depth} takes the folder at depth {depth} below "
                    f"{roots[place.number].uri}, not counting split folders"
                )


def _require_one_place(classes: Classes, splits: Mapping[str, int], places: Iterable[Keyed]) -> None:
    """Refuse a class in two places of one split: two folders of objects, or two folders of one archive."""
    first: dict[tuple[object, ...], Place] = {}
    for key, place in places:
        name = classes[key]
        if name is not None:
            archive = (place.number, place.outer, place.file) if place.kind == MEMBER else ()
            other = first.setdefault((archive, name, splits.get(key)), place)
            if (other.kind, other.own) != (place.kind, place.own) and other.kind == place.kind:
                raise InputError(
                    f"the class {name!r} is in two places, with {other.example} and {place.example}. Put its images "
                    "together, rename one of the folders, or set source.label_depth to the depth of the class folders"
                )


def _require_no_split_words(classes: Classes, places: Iterable[Keyed], config: SourceConfig) -> None:
    for key, place in places:
        name = classes[key]
        if name is not None and split_of_folder(name) is not None and config.splits in ("auto", "folders"):
            raise InputError(
                f"{place.example} is in a folder {name!r}, which is the name of a split. If it is a class, set "
                "source.labels=folders"
            )


def _require_no_parts(names: set[str]) -> None:
    """Refuse folders whose names look like parts of a dataset or dates."""
    for pattern, what in ((_PARTS, "numbered parts of one set"), (_DATE, "dates")):
        stems = {match["stem"] if (match := pattern.fullmatch(name)) else None for name in names}
        if len(names) > 1 and len(stems) == 1 and None not in stems:
            examples = ", ".join(sorted(names)[:3])
            raise InputError(
                f"the folders {examples}{', …' if len(names) > 3 else ''} look like {what}, not like classes. If they are "
                "classes, set source.labels=folders. Otherwise give a table with the columns uri and label "
                "(source.label_column, source.uri_template)"
            )


def _require_no_loose_sidecars(columns: Columns) -> None:
    """Refuse folders as classes if files next to the images may hold their labels."""
    if columns.sidecar:
        raise InputError(
            f"{columns.sidecar} may hold labels, but is not read: .cls files are read in tars only, and metadata files need a "
            "column file_name (source.uri_column names another). Give a table with the columns uri and label, or set "
            "source.labels=folders if the folders are the classes"
        )

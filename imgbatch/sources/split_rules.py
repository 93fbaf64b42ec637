"""Effects: the split of each place, according to its folders and the names of tables and archives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.sources.places import MEMBER, NAMED, OBJECT, Folders, Place, Root, SplitFolder
from imgbatch.sources.split_words import SPLIT_NAMES, split_of_file, split_of_folder

_DEPTH = 2
"""The split folder may be among this number of folders below an input, or in an archive."""

SplitOfName = Callable[[str], int | None]
Keyed = tuple[str, Place]


def splits_of_roots(roots: Sequence[Root], config: SourceConfig) -> dict[int, int]:
    """Return the splits in the paths of several inputs, if they differ: `set/train` and `set/test`."""
    if config.splits not in ("auto", "folders"):
        return {}
    paths = [root.uri.rstrip("/").split("/") for root in roots]
    shared = len(os.path.commonprefix(paths))  # noqa: RUF071 - of lists, name by name
    first = [_first_split(path[shared:], _split_of_name(config)) for path in paths]
    splits = {number: position[1] for number, position in enumerate(first) if position is not None}
    return splits if len({position and position[1] for position in first}) > 1 else {}


def decide_splits(
    places: Sequence[Keyed], root: Root, config: SourceConfig, of_root: dict[int, int]
) -> tuple[dict[str, int], str]:
    """Return the splits of an input's places by key, without places that have none, and a text that says where they come from.

    Also sets `Place.split`, the folder that names the split.

    Args:
        places: the places of the input, with their keys.
        of_root: the splits in the paths of the inputs, by number.

    Raises:
        InputError: the folders or names are ambiguous.
    """
    if config.splits not in ("auto", "folders", "names"):
        return {}, "none"
    if config.splits != "names":
        _set_split_folders([place for _, place in places], root, config)
    splits: dict[str, int] = {}
    used = dict.fromkeys(("folders", "names"), 0)
    for key, place in places:
        folder = place.split.code if place.split is not None else of_root.get(place.number)
        file = place.file or root.file
        name = split_of_file(file) if config.splits != "folders" and place.kind != OBJECT else None
        if place.split is not None and place.split.in_archive:  # takes precedence over the name of the archive
            name = None
        if folder is not None and name is not None and folder != name:
            raise InputError(
                f"{place.example} is in a folder of the split {SPLIT_NAMES[folder]}, but {file} names the split "
                f"{SPLIT_NAMES[name]}. Set source.splits=folders or source.splits=names"
            )
        code = folder if folder is not None else name
        if code is not None:
            splits[key] = code
        used["folders"] += folder is not None
        used["names"] += name is not None
    _require_all_in_splits(places, root)
    return splits, " and ".join(origin for origin, count in used.items() if count) or "none"


def _split_of_name(config: SourceConfig) -> SplitOfName:
    """Return the function for names of folders. With source.splits=folders, a name may have other words too."""
    return split_of_file if config.splits == "folders" else split_of_folder


def _set_split_folders(places: Sequence[Place], root: Root, config: SourceConfig) -> None:
    anywhere = config.splits == "folders"
    for place in places:
        depth = None if anywhere or place.kind == NAMED else _DEPTH
        for in_archive, folders in ((False, place.outer), (True, place.inner)):
            position = _first_split(folders[:depth], _split_of_name(config))
            if position is not None and place.split is None:
                place.split = SplitFolder(in_archive, *position)
    named = [place for place in places if place.kind == NAMED]
    if len({place.split and place.split.code for place in named}) == 1:  # one split for all of them is no split
        for place in named:
            place.split = None
    if not anywhere:
        _require_no_other_names(places)
        _require_none_deeper(places, root)


def _first_split(folders: Iterable[str], split_of: SplitOfName) -> tuple[int, int] | None:
    """Return the position and the split of the first split folder, None if there is none."""
    return next(((at, code) for at, name in enumerate(folders) if (code := split_of(name)) is not None), None)


def _require_no_other_names(places: Iterable[Place]) -> None:
    """Refuse sibling folders whose names have split words of different splits among other words."""
    siblings: dict[tuple[bool, Folders], dict[int, tuple[str, bool]]] = {}
    for place in places:
        for in_archive, folders in ((False, place.outer), (True, place.inner)):
            for at, name in enumerate(folders[:_DEPTH] if place.kind != NAMED else ()):
                if (code := split_of_file(name)) is not None:
                    strict = split_of_folder(name) is not None
                    siblings.setdefault((in_archive, folders[:at]), {}).setdefault(code, (place.example, strict))
    for codes in siblings.values():
        if len(codes) > 1 and not all(strict for _, strict in codes.values()):
            (first, (one, _)), (second, (other, _)), *_ = codes.items()
            raise InputError(
                f"{one} and {other} are in folders that may be the splits {SPLIT_NAMES[first]} and {SPLIT_NAMES[second]}. Set "
                "source.splits=folders if they are, or source.splits=none if they are not"
            )


def _require_none_deeper(places: Iterable[Place], root: Root) -> None:
    """Refuse split folders that are too deep."""
    deep: dict[int, str] = {}
    for place in places:
        if place.split is None and place.kind != NAMED:
            for folders in (place.outer, place.inner):
                if (position := _first_split(folders[_DEPTH:], split_of_folder)) is not None:
                    deep.setdefault(position[1], place.example)
    if len(deep) > 1:
        examples = " and ".join(list(deep.values())[:2])
        raise InputError(
            f"{examples} are in split folders more than {_DEPTH} folders below {root.input or root.uri}. Give their parent "
            "folder as the input, or set source.splits=folders (at any depth) or source.splits=none"
        )


def _require_all_in_splits(places: Iterable[Keyed], root: Root) -> None:
    """Refuse folders of images next to split folders, if the folders are the labels."""
    for kind in (OBJECT, MEMBER):
        unlabelled = [place for _, place in places if place.kind == kind and place.own and place.unlabelled]
        inside = [
            place for place in unlabelled if (at := place.split) is not None and at.in_archive == (kind == MEMBER)
        ]
        outside = [place for place in unlabelled if place.split is None]
        if inside and outside:
            raise InputError(
                f"{root.uri} has split folders, with {inside[0].example}, and images outside of them, such as "
                f"{outside[0].example}. Give only the split folders as inputs, or set source.splits=none, so that each folder "
                "of images is a class"
            )

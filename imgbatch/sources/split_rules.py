"""Effects: which split each place has, from folders and from the names of tables and archives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.sources.places import MEMBER, NAMED, OBJECT, Folders, Place, Root, SplitFolder
from imgbatch.sources.split_words import SPLIT_NAMES, of_file, of_folder

_DEPTH = 2
"""How many folders below an input, or in an archive, may say the split."""

Word = Callable[[str], int | None]
Keyed = tuple[str, Place]


def splits_of_roots(roots: Sequence[Root], config: SourceConfig) -> dict[int, int]:
    """Return the splits that the paths of several inputs say, where they differ: `set/train` and `set/test`."""
    if config.splits not in ("auto", "folders"):
        return {}
    paths = [root.uri.rstrip("/").split("/") for root in roots]
    shared = len(os.path.commonprefix(paths))  # noqa: RUF071 - of lists, name by name
    words = [_first(path[shared:], _word(config)) for path in paths]
    found = {number: word[1] for number, word in enumerate(words) if word is not None}
    return found if len({word and word[1] for word in words}) > 1 else {}


def decide_splits(
    mine: Sequence[Keyed], root: Root, config: SourceConfig, of_root: dict[int, int]
) -> tuple[dict[str, int], str]:
    """Return the split of each place of an input that has one, by its key, and where splits come from, in words.

    The folder that says the split is noted in each place.

    Args:
        of_root: the splits that the paths of the inputs say, by their number.

    Raises:
        InputError: it can be meant in two ways.
    """
    if config.splits not in ("auto", "folders", "names"):
        return {}, "none"
    if config.splits != "names":
        _note_split_folders([place for _, place in mine], root, config)
    found: dict[str, int] = {}
    used = dict.fromkeys(("folders", "names"), 0)
    for key, place in mine:
        folder = place.split.code if place.split is not None else of_root.get(place.number)
        name = of_file(place.file or root.own) if config.splits != "folders" and place.kind != OBJECT else None
        if place.split is not None and place.split.in_archive:  # which says more than the name of the archive
            name = None
        if folder is not None and name is not None and folder != name:
            raise InputError(
                f"{place.example} lies in a folder of the split {SPLIT_NAMES[folder]}, and {place.file or root.own} names the "
                f"split {SPLIT_NAMES[name]}: say source.splits=folders or source.splits=names"
            )
        code = folder if folder is not None else name
        if code is not None:
            found[key] = code
        used["folders"] += folder is not None
        used["names"] += name is not None
    _require_all_in_splits(mine, root)
    return found, " and ".join(word for word, count in used.items() if count) or "none"


def _word(config: SourceConfig) -> Word:
    """Return what tells the split of a folder's name: with source.splits=folders a split word among others is enough."""
    return of_file if config.splits == "folders" else of_folder


def _note_split_folders(places: Sequence[Place], root: Root, config: SourceConfig) -> None:
    anywhere = config.splits == "folders"
    for place in places:
        depth = None if anywhere or place.kind == NAMED else _DEPTH
        for in_archive, folders in ((False, place.outer), (True, place.inner)):
            word = _first(folders[:depth], _word(config))
            if word is not None and place.split is None:
                place.split = SplitFolder(in_archive, *word)
    named = [place for place in places if place.kind == NAMED]
    if len({place.split and place.split.code for place in named}) == 1:  # it tells none of them from others
        for place in named:
            place.split = None
    if not anywhere:
        _require_no_other_names(places)
        _require_none_deeper(places, root)


def _first(folders: Iterable[str], word: Word) -> tuple[int, int] | None:
    """Return the position and the split of the first folder that is named after one."""
    return next(((at, code) for at, name in enumerate(folders) if (code := word(name)) is not None), None)


def _require_no_other_names(places: Iterable[Place]) -> None:
    """Refuse folders beside each other whose names hold words for different splits, among other words."""
    beside: dict[tuple[bool, Folders], dict[int, tuple[str, bool]]] = {}
    for place in places:
        for in_archive, folders in ((False, place.outer), (True, place.inner)):
            for at, name in enumerate(folders[:_DEPTH] if place.kind != NAMED else ()):
                if (code := of_file(name)) is not None:
                    strict = of_folder(name) is not None
                    beside.setdefault((in_archive, folders[:at]), {}).setdefault(code, (place.example, strict))
    for codes in beside.values():
        if len(codes) > 1 and not all(strict for _, strict in codes.values()):
            (first, (one, _)), (second, (other, _)), *_ = codes.items()
            raise InputError(
                f"{one} and {other} lie in folders that may be the splits {SPLIT_NAMES[first]} and {SPLIT_NAMES[second]}: say "
                "source.splits=folders if they are, or source.splits=none if they are not"
            )


def _require_none_deeper(places: Iterable[Place], root: Root) -> None:
    """Refuse split folders that lie too deep to count."""
    deep: dict[int, str] = {}
    for place in places:
        if place.split is None and place.kind != NAMED:
            for folders in (place.outer, place.inner):
                if (word := _first(folders[_DEPTH:], of_folder)) is not None:
                    deep.setdefault(word[1], place.example)
    if len(deep) > 1:
        examples = " and ".join(list(deep.values())[:2])
        raise InputError(
            f"{examples} lie in split folders that are more than {_DEPTH} folders below {root.given or root.uri}: give the "
            "folder above them as the input, or say source.splits=folders, which takes them at any depth, or "
            "source.splits=none"
        )


def _require_all_in_splits(mine: Iterable[Keyed], root: Root) -> None:
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

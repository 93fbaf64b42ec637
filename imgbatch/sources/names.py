"""Which names are those of images."""

from __future__ import annotations

import re

from imgbatch.config import IMAGE_SUFFIXES

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

NOTHING = r"[^\s\S]"
"""A pattern that matches no name."""


def candidate_pattern(suffixes: str) -> str | None:
    """Return the pattern of a candidate's base name, None if every name is one.

    >>> pattern = candidate_pattern("images")
    >>> [bool(re.search(pattern, name)) for name in ("a/b.JPG", "a/b", "a/.b.jpg", "a/b.txt", "a.d/b", "a/_b.png")]
    [True, True, False, False, True, True]
    """
    if suffixes == "*":
        return None
    named = [part.strip(" .") for part in suffixes.split(",")]
    known = IMAGE_SUFFIXES if suffixes == "images" else [part for part in named if part]
    bare = r"[^./\n][^./]*" if suffixes == "images" else NOTHING
    return rf"(?i)(^|/)({bare}|[^./][^/]*\.({'|'.join(map(re.escape, known))}))$"


def numbered(uri: str) -> list[str]:
    """Return the names that `{FIRST..LAST}` in a name stands for, as wide as they are written.

    >>> numbered("a-{08..10}.tar"), numbered("a.tar")
    (['a-08.tar', 'a-09.tar', 'a-10.tar'], ['a.tar'])
    """
    found = _RANGE.search(uri)
    if found is None:
        return [uri]
    first, last, width = int(found[1]), int(found[2]), len(found[1])
    before, after = uri[: found.start()], numbered(uri[found.end() :])
    return [f"{before}{number:0{width}d}{rest}" for number in range(first, last + 1) for rest in after]

"""Values: Which names are those of images.

A name is looked at from the input on: `2024/a.jpg` for `s3://bucket/.cache/2024/a.jpg` below the input `s3://bucket/.cache`.
All patterns are RE2's, in which Arrow matches whole columns; Python's `re` differs from it in `\\z` alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config.sections import IMAGE_SUFFIXES

JUNK = (
    "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "ehthumbs.db", "desktop.ini",  # Windows
    "__MACOSX", "Network Trash Folder", "Temporary Items",  # macOS, on its own disks and on others
)  # fmt: skip
"""Folders and files that systems leave behind, whose file systems do not tell upper from lower case."""

JUNK_AS_WRITTEN = (
    "lost+found", "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot",  # Linux; Synology, QNAP
    "_temporary", "_delta_log",  # what Spark and Hadoop have not committed, and Delta's log
)  # fmt: skip

NO_IMAGES = (
    "_SUCCESS", "_metadata", "_common_metadata", "_committed_*", "_started_*",  # Spark, Hadoop, Databricks
    "LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "PATENTS", "README", "CHANGELOG", "CHANGES", "AUTHORS",
    "CONTRIBUTORS", "CONTRIBUTING", "CITATION", "CODEOWNERS", "VERSION", "INSTALL", "TODO", "MANIFEST",
    "Makefile", "Dockerfile", "Jenkinsfile", "Snakefile",
    "MD5SUMS", "SHA1SUMS", "SHA256SUMS", "SHA512SUMS", "CHECKSUMS",
    "DICOMDIR",  # the index of a DICOM medium
    "Icon\r",  # the macOS Finder's, empty
    "*_$folder$",  # Hadoop's and EMR's marker of a folder in S3
)  # fmt: skip
"""Names without a suffix that are not those of images, in any case. `*` stands for anything."""

NOTHING = r"[^\s\S]"
"""A pattern that matches no name."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def _any_of(names: tuple[str, ...]) -> str:
    return "|".join(re.escape(name).replace(r"\*", "[^/]*") for name in names)


# `.` and `..` themselves, as in `./a.jpg`, hide nothing.
_HIDDEN = r"\.[^./][^/]*|\.\.[^/]+"
_JUNK_PATTERN = rf"(^|/)({_HIDDEN}|(?i:{_any_of(JUNK)})|{_any_of(JUNK_AS_WRITTEN)})(/|\z)"
_NO_IMAGE_PATTERN = rf"(^|/)(?i:{_any_of(NO_IMAGES)})\z|/\z"


def candidate_pattern(suffixes: str) -> str:
    """Return the pattern of a candidate's name: what `source.suffixes` says, before what is never a candidate."""
    if suffixes == "*":
        return ""
    named = [part.strip(" .") for part in suffixes.split(",")]
    known = IMAGE_SUFFIXES if suffixes == "images" else [part for part in named if part]
    bare = r"[^./\n][^./]*" if suffixes == "images" else NOTHING
    return rf"(?i)(^|/)({bare}|[^./][^/]*\.({'|'.join(map(re.escape, known))}))\z"


def junk(names: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a mask of the names that are hidden or a system's own, or lie in a folder that is.

    >>> junk(pa.array(["a/.git/x.jpg", "@eaDir/x.jpg", "./a..b/x.jpg", "THUMBS.DB"])).to_pylist()
    [True, True, False, True]
    """
    return pc.match_substring_regex(names, pattern=_JUNK_PATTERN)


def is_junk(name: str) -> bool:
    """Return what `junk` says of one name."""
    return _junk.search(name) is not None


def is_no_image(name: str) -> bool:
    """Return whether a name is junk, or among NO_IMAGES."""
    return _never.search(name) is not None


@dataclass(frozen=True)
class Candidates:
    """Tells candidates from other names by `source.suffixes`, by what is junk, and by NO_IMAGES."""

    suffixes: str

    def among(self, names: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """Return a mask of the candidates.

        >>> names = pa.array(["a/b.JPG", "a/b", "a/.b.jpg", "a/b.txt", "a.d/b", "a/_b.png", "a/LICENSE", ".a/b.jpg"])
        >>> Candidates("images").among(names).to_pylist()
        [True, True, False, False, True, True, False, False]
        """
        named = pc.match_substring_regex(names, pattern=candidate_pattern(self.suffixes))
        return pc.and_not(named, pc.match_substring_regex(names, pattern=f"{_JUNK_PATTERN}|{_NO_IMAGE_PATTERN}"))

    def __contains__(self, name: str) -> bool:
        return self._named.search(name) is not None and not is_no_image(name)

    @cached_property
    def _named(self) -> re.Pattern[str]:
        return _python(candidate_pattern(self.suffixes))


def _python(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(r"\z", r"\Z"))


_junk, _never = _python(_JUNK_PATTERN), _python(f"{_JUNK_PATTERN}|{_NO_IMAGE_PATTERN}")


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

"""Values: which names are candidates for images.

Names are relative to the input: `2024/a.jpg` for `s3://bucket/.cache/2024/a.jpg` below the input `s3://bucket/.cache`.
Patterns are in the syntax of RE2, with which Arrow matches whole columns. In Python's `re`, only `\\z` is written differently.
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
"""Folders and files that operating systems create. Matched in any case, like the file systems of these systems."""

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
"""Names without a suffix that are never images, in any case. `*` matches anything."""

NOTHING = r"[^\s\S]"
"""A pattern that matches no name."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def _any_of(names: tuple[str, ...]) -> str:
    return "|".join(re.escape(name).replace(r"\*", "[^/]*") for name in names)


# `.` and `..`, as in `./a.jpg`, are not hidden names.
_HIDDEN = r"\.[^./][^/]*|\.\.[^/]+"
_JUNK_PATTERN = rf"(^|/)({_HIDDEN}|(?i:{_any_of(JUNK)})|{_any_of(JUNK_AS_WRITTEN)})(/|\z)"
_NO_IMAGE_PATTERN = rf"(^|/)(?i:{_any_of(NO_IMAGES)})\z|/\z"


def candidate_pattern(suffixes: str) -> str:
    """Return the pattern of `source.suffixes`. It also matches names that are never candidates, such as junk."""
    if suffixes == "*":
        return ""
    parts = [part.strip(" .") for part in suffixes.split(",")]
    accepted = IMAGE_SUFFIXES if suffixes == "images" else [part for part in parts if part]
    bare = r"[^./\n][^./]*" if suffixes == "images" else NOTHING
    return rf"(?i)(^|/)({bare}|[^./][^/]*\.({'|'.join(map(re.escape, accepted))}))\z"


def junk(names: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return a mask of the names that are hidden or junk, or are in a folder that is.

    >>> junk(pa.array(["a/.git/x.jpg", "@eaDir/x.jpg", "./a..b/x.jpg", "THUMBS.DB"])).to_pylist()
    [True, True, False, True]
    """
    return pc.match_substring_regex(names, pattern=_JUNK_PATTERN)


def is_junk(name: str) -> bool:
    """Return the result of `junk` for one name."""
    return _junk.search(name) is not None


def is_no_image(name: str) -> bool:
    """Return whether a name is junk or matches NO_IMAGES."""
    return _never.search(name) is not None


@dataclass(frozen=True)
class Candidates:
    """The set of candidate names: those of `source.suffixes` without junk and NO_IMAGES."""

    suffixes: str

    def mask(self, names: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """Return a mask of the candidates.

        >>> names = pa.array(["a/b.JPG", "a/b", "a/.b.jpg", "a/b.txt", "a.d/b", "a/_b.png", "a/LICENSE", ".a/b.jpg"])
        >>> Candidates("images").mask(names).to_pylist()
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


def expand_range(uri: str) -> list[str]:
    """Expand `{FIRST..LAST}` in a name, with the same number of digits.

    >>> expand_range("a-{08..10}.tar"), expand_range("a.tar")
    (['a-08.tar', 'a-09.tar', 'a-10.tar'], ['a.tar'])
    """
    match = _RANGE.search(uri)
    if match is None:
        return [uri]
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    before, after = uri[: match.start()], expand_range(uri[match.end() :])
    return [f"{before}{number:0{width}d}{rest}" for number in range(first, last + 1) for rest in after]

"""Images that are objects: below a folder, matching a glob, or a single one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.utils import glob_translate

from imgbatch.config import IMAGE_SUFFIXES
from imgbatch.errors import InputError
from imgbatch.listing import Found
from imgbatch.schema import LISTING
from imgbatch.storage import Folder, Meta, Stores

MAGIC = re.compile(r"[*?\[]")


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
    bare = r"[^./\n][^./]*" if suffixes == "images" else r"[^\s\S]"
    return rf"(?i)(^|/)({bare}|[^./][^/]*\.({'|'.join(map(re.escape, known))}))$"


def below(stores: Stores, uri: str, suffixes: str) -> Iterator[Found]:
    """Yield the candidates below a folder, recursively; names that begin with a dot are passed over."""
    yield from _select(stores, uri, candidate_pattern(suffixes), lambda paths: None)


@dataclass(frozen=True, slots=True)
class Glob:
    """A pattern in which `*` stays within a folder and `**` does not, and the folder to look for it in."""

    base: str
    pattern: str

    @classmethod
    def of(cls, stores: Stores, uri: str) -> Glob:
        """Read a URI as a glob.

        Raises:
            InputError: it cannot be one.
        """
        before, _, _ = uri[: MAGIC.search(uri).start()].rpartition("/")  # type: ignore[union-attr]
        if before.endswith(":/"):
            raise InputError(f"{uri}: the name of a bucket or host cannot be a pattern")
        try:
            # Arrow matches with RE2, which spells the end of the text in its own way.
            pattern = "^" + glob_translate(stores.resolve(uri)[1]).replace(r"\Z", r"\z")
            pc.match_substring_regex(pa.array([""]), pattern=pattern)
        except ValueError as error:
            raise InputError(f"{uri} is no glob that can be read: {error}") from error
        return cls(before or "/", pattern)

    def found(self, stores: Stores, suffixes: str) -> Iterator[Found]:
        """Yield the candidates that match."""

        def match(paths: pa.Array) -> pa.Array:
            return pc.match_substring_regex(paths, pattern=self.pattern)

        yield from _select(stores, self.base, candidate_pattern(suffixes), match)


def is_folder(stores: Stores, uri: str) -> bool:
    """Return whether something lies below a name."""
    return any(len(found) for found in Folder(stores, uri).found())


def single(stores: Stores, uri: str, meta: Meta) -> Iterator[Found]:
    """Yield one object, whatever its name: it was asked for."""
    row = {"uri": uri, "size": meta.size, "etag": meta.etag, "last_modified": meta.last_modified}
    yield Found(pa.RecordBatch.from_pylist([row], schema=LISTING))


def _select(
    stores: Stores, base: str, candidate: str | None, match: Callable[[pa.Array], pa.Array | None]
) -> Iterator[Found]:
    _, path = stores.resolve(base)
    # Every URI is its store's path behind a fixed beginning, which is thus spelt as the user spelt it.
    prefix = base.removesuffix(path) if path else f"{base.rstrip('/')}/"
    for found in Folder(stores, base).found():
        chosen = match(found["path"])
        if chosen is not None:
            found = found.filter(chosen)
        total, example = len(found), ""
        if candidate is not None:
            chosen = pc.match_substring_regex(found["path"], pattern=candidate)
            passed_over = found["path"].filter(pc.invert(chosen))
            example = passed_over[0].as_py() if len(passed_over) else ""
            found = found.filter(chosen)
        uris = pc.binary_join_element_wise(prefix, found["path"], "") if prefix else found["path"]
        batch = pa.record_batch([uris, found["size"], found["etag"], found["last_modified"]], schema=LISTING)
        yield Found(batch, ignored=total - len(found), example=example)

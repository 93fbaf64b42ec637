"""Images that are objects: below a folder, matching a glob, or a single one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.utils import glob_translate

from imgbatch.config import IMAGE_SUFFIXES
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
    known = IMAGE_SUFFIXES if suffixes == "images" else [part.strip(" .").lower() for part in suffixes.split(",")]
    bare = r"[^./\n][^./]*" if suffixes == "images" else r"[^\s\S]"
    return rf"(?i)(^|/)({bare}|[^./][^/]*\.({'|'.join(map(re.escape, known))}))$"


def below(stores: Stores, uri: str, suffixes: str) -> Iterator[Found]:
    """Yield the candidates below a folder, recursively; names that begin with a dot are passed over."""
    yield from _select(stores, uri, candidate_pattern(suffixes), lambda paths: None)


def matching(stores: Stores, uri: str, suffixes: str) -> Iterator[Found]:
    """Yield the candidates that match a glob, in which `*` stays within a folder and `**` does not."""
    base = uri[: MAGIC.search(uri).start()].rpartition("/")[0] or "/"  # type: ignore[union-attr]
    pattern = glob_translate(stores.resolve(uri)[1])

    def match(paths: pa.Array) -> pa.Array:
        return pc.match_substring_regex(paths, pattern=_for_re2(pattern))

    yield from _select(stores, base, candidate_pattern(suffixes), match)


def single(stores: Stores, uri: str, meta: Meta) -> Iterator[Found]:
    """Yield one object, whatever its name: it was asked for."""
    row = {"uri": uri, "size": meta.size, "etag": meta.etag, "last_modified": meta.last_modified}
    yield Found(pa.RecordBatch.from_pylist([row], schema=LISTING))


def _select(
    stores: Stores, base: str, candidate: str | None, match: Callable[[pa.Array], pa.Array | None]
) -> Iterator[Found]:
    store, _ = stores.resolve(base)
    prefix = store.uri("")  # every store's URI is its path behind a fixed beginning
    for found in Folder(stores, base).found():
        chosen = match(found["path"])
        if chosen is not None:
            found = found.filter(chosen)
        total = len(found)
        if candidate is not None:
            found = found.filter(pc.match_substring_regex(found["path"], pattern=candidate))
        uris = pc.binary_join_element_wise(prefix, found["path"], "") if prefix else found["path"]
        batch = pa.record_batch([uris, found["size"], found["etag"], found["last_modified"]], schema=LISTING)
        yield Found(batch, ignored=total - len(found))


def _for_re2(pattern: str) -> str:
    """Return a pattern of Python's `re` in the dialect of RE2, which Arrow matches with."""
    return pattern.replace(r"\Z", r"\z")

"""Effects: where images lie below the inputs, in folders and in archives, counted place by place.

A place is a folder of objects, a file of rows, or a folder in an archive. There are as many as there are folders, not images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.schema import PARQUET, TAR, single_chunk
from imgbatch.sources.labelled import OBJECT_OF, TABLE_OF, TRUTH
from imgbatch.sources.spelling import normalise
from imgbatch.sources.split_words import split_folder_in

OBJECT, ROW, MEMBER, NAMED = "object", "row", "member", "named"
"""What lies in a place: objects; rows of a Parquet file; a tar, or its members; images that a table alone names."""

_SEPARATOR = "\0"
_MAX_BARE = 100
"""Images without a suffix whose names are kept for each place."""

Folders = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Root:
    """The folder of one input below which folders may be classes and splits."""

    uri: str
    kind: str
    """Of the input: folder, glob, object, manifest, parquet, inventory or tar."""
    own: str = ""
    """The name of the input's own file, where it is a table."""
    given: str = ""
    """The input, where it is not the folder itself."""
    group: int = 0
    """The number of the input as the user gave it: `{000..099}` stands for many."""


@dataclass(frozen=True, slots=True)
class SplitFolder:
    """Which folder of a place says the split."""

    in_archive: bool
    at: int
    code: int


@dataclass(slots=True)
class Place:
    """One place."""

    number: int
    """Of the input."""
    kind: str
    outer: Folders
    """The folders below the input."""
    file: str
    """The table or archive that holds the images; empty for objects."""
    inner: Folders
    """The folders in the archive."""
    images: int = 0
    unlabelled: int = 0
    """Of which no column and no sidecar says the label."""
    bare: list[str] = field(default_factory=list)
    """Images without a suffix, the first ones."""
    bare_count: int = 0
    example: str = ""
    split: SplitFolder | None = None
    """The folder that says the split, once that is decided."""

    @property
    def own(self) -> Folders:
        """The folders of which the innermost one holds the images: in an archive those in it alone."""
        return self.inner if self.kind == MEMBER else self.outer

    @property
    def in_split_folder(self) -> bool:
        """Whether the images lie in the split folder itself."""
        split = self.split
        return split is not None and split.in_archive == (self.kind == MEMBER) and split.at == len(self.own) - 1

    def folders(self, *, all_of_them: bool = False) -> Folders:
        """Return `own`, or also those around its archive, without the folder that says the split."""
        split = self.split
        outer = [name for at, name in enumerate(self.outer) if split is None or split.in_archive or at != split.at]
        inner = [name for at, name in enumerate(self.inner) if split is None or not split.in_archive or at != split.at]
        if all_of_them:
            return (*outer, *inner)
        return tuple(inner if self.kind == MEMBER else outer)


class Places:
    """All places of the inputs. Memory: some 1.5 kB for each.

    Of images that a table alone names, a place is the folder that says the split: there may be as many folders as images.
    """

    def __init__(self, roots: Sequence[Root], *, folders_of_tables: bool = False) -> None:
        """Take the inputs, and whether the folders of images that tables name are their classes."""
        self.roots, self._folders_of_tables = roots, folders_of_tables
        self.known: dict[str, Place] = {}

    def keys(self, listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return the key of the place of each image.

        Args:
            listed: `uri`, `container`, OBJECT_OF, TABLE_OF and, where there are members of tars, `tar`: the URI of the tar.
        """
        uris, container = single_chunk(listed["uri"]), single_chunk(listed["container"])
        by_object, by_table = single_chunk(listed[OBJECT_OF]), single_chunk(listed[TABLE_OF])
        kinds = pc.if_else(pc.is_valid(by_object), OBJECT, NAMED)
        kinds = pc.if_else(pc.fill_null(pc.equal(container, PARQUET), False), ROW, kinds)
        kinds = pc.if_else(pc.fill_null(pc.equal(container, TAR), False), MEMBER, kinds)
        held = pc.if_else(pc.equal(kinds, ROW), pc.replace_substring_regex(uris, r"#[0-9]+$", ""), uris)
        inner = pa.repeat("", len(uris))
        if "tar" in listed.schema.names:
            held, inner = _in_tars(held, single_chunk(listed["tar"]))
        numbers = pc.coalesce(by_object, by_table)
        held = self._below_roots(held, numbers)
        outer, file = _folder_of(held), pc.replace_substring_regex(held, r"(?s)^.*/", "")
        if not self._folders_of_tables:
            outer = pc.if_else(pc.equal(kinds, NAMED), split_folder_in(outer), outer)
        file = pc.if_else(pc.is_in(kinds, pa.array([ROW, MEMBER])), file, "")
        return pc.binary_join_element_wise(numbers.cast(pa.string()), kinds, outer, file, _folder_of(inner), _SEPARATOR)

    def _below_roots(self, paths: pa.Array, numbers: pa.Array) -> pa.Array:
        """Return what follows the root of its input in each path that lies below it."""
        inputs = pc.unique(numbers)
        uris = [self.roots[number].uri.rstrip("/") + "/" for number in inputs.to_pylist()]
        for uri in set(uris):
            mine = pa.array(
                [number for number, own in zip(inputs.to_pylist(), uris, strict=True) if own == uri], pa.int32()
            )
            below = pc.and_(pc.is_in(numbers, mine), pc.starts_with(paths, uri))
            paths = pc.if_else(below, pc.utf8_slice_codeunits(paths, len(uri)), paths)
        return paths

    def add(self, listed: pa.Table | pa.RecordBatch) -> None:
        """Count some images; TRUTH is what columns and sidecars say. A tar that is not read yet is a place without images."""
        names = pc.replace_substring_regex(single_chunk(listed["uri"]), r"(?s)^.*/", "")
        image = pc.invert(self.is_unread(listed))
        silent = pc.and_(image, pc.is_null(single_chunk(listed[TRUTH])))
        bare = pc.and_(image, pc.invert(pc.match_substring(names, ".")))
        columns = {"key": self.keys(listed), "uri": listed["uri"], "image": image, "silent": silent, "bare": bare}
        table = pa.table(columns)
        sums = [("uri", "min"), *((name, "sum") for name in ("image", "silent", "bare"))]
        for row in table.group_by("key").aggregate(sums).to_pylist():
            place = self.known.get(row["key"]) or self._new(row["key"])
            place.images += row["image_sum"]
            place.unlabelled += row["silent_sum"]
            place.bare_count += row["bare_sum"]
            place.example = place.example or row["uri_min"]
        bare_ones = table.filter(table["bare"])
        for key, uri in zip(bare_ones["key"].to_pylist(), bare_ones["uri"].to_pylist(), strict=True):
            if len(self.known[key].bare) < _MAX_BARE:
                self.known[key].bare.append(uri)

    @staticmethod
    def is_unread(listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return a mask of the rows that stand for the members of a tar."""
        tars = pc.fill_null(pc.equal(single_chunk(listed["container"]), TAR), False)
        return pc.and_(tars, pc.is_null(single_chunk(listed["tar"]))) if "tar" in listed.schema.names else tars

    def strip_common(self) -> None:
        """Omit the folders that all objects of an inventory share: its root is not known before."""
        for number, root in enumerate(self.roots):
            if root.kind != "inventory":
                continue
            mine = [place for place in self.known.values() if place.number == number and place.kind == OBJECT]
            if mine:
                shared = os.path.commonprefix([place.outer for place in mine])  # noqa: RUF071 - of tuples, name by name
                for place in mine:
                    place.outer = place.outer[len(shared) :]

    def _new(self, key: str) -> Place:
        number, kind, outer, file, inner = key.split(_SEPARATOR)
        place = Place(int(number), kind, _folders(outer), file, _folders(inner))
        self.known[key] = place
        return place


def _in_tars(uris: pa.Array, tars: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return what holds each image, and the path in it: of members of tars the tar and the member's name."""
    pairs = zip(uris.to_pylist(), tars.to_pylist(), strict=True)
    inner = [uri[len(tar) + 1 :] if tar is not None else "" for uri, tar in pairs]
    return pc.coalesce(tars, uris), pa.array(inner, pa.string())


def _folder_of(paths: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(paths, r"(?s)/?[^/]*$", "")


def _folders(path: str) -> Folders:
    return tuple(name for part in path.split("/") if (name := normalise(part)) not in ("", ".", ".."))

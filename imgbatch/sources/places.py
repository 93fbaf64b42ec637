"""Effects: the places of images below the inputs, with the number of images in each.

A place is a folder of objects, a file of rows, or a folder in an archive. The number of places grows with the number of
folders, not of images.
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
"""Kinds of places: objects; rows of a Parquet file; a tar or its members; images that only a table names."""

_SEPARATOR = "\0"
_MAX_BARE = 100
"""Maximum number of images without a suffix whose names are kept for each place."""

Folders = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Root:
    """The folder of an input. Folders below it may be classes and splits."""

    uri: str
    kind: str
    """The kind of the input: folder, glob, object, manifest, parquet, inventory or tar."""
    file: str = ""
    """The name of the file, if the input is a table."""
    input: str = ""
    """The input, if it is not the folder itself."""
    group: int = 0
    """The number of the input on the command line: `{000..099}` expands to several roots with one number."""


@dataclass(frozen=True, slots=True)
class SplitFolder:
    """The folder of a place that names the split."""

    in_archive: bool
    at: int
    code: int


@dataclass(slots=True)
class Place:
    """One place."""

    number: int
    """The number of its root."""
    kind: str
    outer: Folders
    """The folders below the input."""
    file: str
    """The table or archive with the images; empty for objects."""
    inner: Folders
    """The folders in the archive."""
    images: int = 0
    unlabelled: int = 0
    """Number of images without a label in a column or sidecar."""
    bare: list[str] = field(default_factory=list)
    """The first images without a suffix."""
    bare_count: int = 0
    example: str = ""
    split: SplitFolder | None = None
    """The folder that names the split; set by `decide_splits`."""

    @property
    def own(self) -> Folders:
        """The folders that may name the class: those in the archive for members of archives, else those below the input."""
        return self.inner if self.kind == MEMBER else self.outer

    @property
    def in_split_folder(self) -> bool:
        """Whether the images are directly in the split folder."""
        split = self.split
        return split is not None and split.in_archive == (self.kind == MEMBER) and split.at == len(self.own) - 1

    def folders(self, *, with_archive: bool = False) -> Folders:
        """Return `own`, without the split folder.

        Args:
            with_archive: include the folders that contain the archive.
        """
        split = self.split
        outer = [name for at, name in enumerate(self.outer) if split is None or split.in_archive or at != split.at]
        inner = [name for at, name in enumerate(self.inner) if split is None or not split.in_archive or at != split.at]
        if with_archive:
            return (*outer, *inner)
        return tuple(inner if self.kind == MEMBER else outer)


class Places:
    """All places of the inputs. Memory: about 1.5 kB for each.

    For images that only a table names, the place is the split folder, since there may be as many folders as images.
    """

    def __init__(self, roots: Sequence[Root], *, folders_of_tables: bool = False) -> None:
        """Create an empty set of places.

        Args:
            roots: the folders of the inputs.
            folders_of_tables: whether folders are also the classes of images that tables name.
        """
        self.roots, self._folders_of_tables = roots, folders_of_tables
        self.by_key: dict[str, Place] = {}

    def keys(self, listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return the key of the place of each image.

        Args:
            listed: `uri`, `container`, OBJECT_OF, TABLE_OF and, if there are members of tars, `tar`: the URI of the tar.
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
        """Return each path relative to the root of its input, if it is below it."""
        inputs = pc.unique(numbers)
        uris = [self.roots[number].uri.rstrip("/") + "/" for number in inputs.to_pylist()]
        for uri in set(uris):
            with_root = pa.array(
                [number for number, root in zip(inputs.to_pylist(), uris, strict=True) if root == uri], pa.int32()
            )
            below = pc.and_(pc.is_in(numbers, with_root), pc.starts_with(paths, uri))
            paths = pc.if_else(below, pc.utf8_slice_codeunits(paths, len(uri)), paths)
        return paths

    def add(self, listed: pa.Table | pa.RecordBatch) -> None:
        """Count images. TRUTH has the labels of columns and sidecars. A tar that is not read yet is a place without images."""
        names = pc.replace_substring_regex(single_chunk(listed["uri"]), r"(?s)^.*/", "")
        image = pc.invert(self.is_unread(listed))
        unlabelled = pc.and_(image, pc.is_null(single_chunk(listed[TRUTH])))
        bare = pc.and_(image, pc.invert(pc.match_substring(names, ".")))
        columns = {
            "key": self.keys(listed),
            "uri": listed["uri"],
            "image": image,
            "unlabelled": unlabelled,
            "bare": bare,
        }
        table = pa.table(columns)
        sums = [("uri", "min"), *((name, "sum") for name in ("image", "unlabelled", "bare"))]
        for row in table.group_by("key").aggregate(sums).to_pylist():
            place = self.by_key.get(row["key"]) or self._new(row["key"])
            place.images += row["image_sum"]
            place.unlabelled += row["unlabelled_sum"]
            place.bare_count += row["bare_sum"]
            place.example = place.example or row["uri_min"]
        without_suffix = table.filter(table["bare"])
        for key, uri in zip(without_suffix["key"].to_pylist(), without_suffix["uri"].to_pylist(), strict=True):
            if len(self.by_key[key].bare) < _MAX_BARE:
                self.by_key[key].bare.append(uri)

    @staticmethod
    def is_unread(listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return a mask of the rows that are tars in place of their members."""
        tars = pc.fill_null(pc.equal(single_chunk(listed["container"]), TAR), False)
        return pc.and_(tars, pc.is_null(single_chunk(listed["tar"]))) if "tar" in listed.schema.names else tars

    def strip_common(self) -> None:
        """Remove the folders that all objects of an inventory share, since an inventory has no root folder."""
        for number, root in enumerate(self.roots):
            if root.kind != "inventory":
                continue
            objects = [place for place in self.by_key.values() if place.number == number and place.kind == OBJECT]
            if objects:
                shared = os.path.commonprefix([place.outer for place in objects])  # noqa: RUF071 - tuples of names
                for place in objects:
                    place.outer = place.outer[len(shared) :]

    def _new(self, key: str) -> Place:
        number, kind, outer, file, inner = key.split(_SEPARATOR)
        place = Place(int(number), kind, _folders(outer), file, _folders(inner))
        self.by_key[key] = place
        return place


def _in_tars(uris: pa.Array, tars: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return the tar of each member and its name in the tar; for other images, the URI and an empty name."""
    pairs = zip(uris.to_pylist(), tars.to_pylist(), strict=True)
    inner = [uri[len(tar) + 1 :] if tar is not None else "" for uri, tar in pairs]
    return pc.coalesce(tars, uris), pa.array(inner, pa.string())


def _folder_of(paths: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(paths, r"(?s)/?[^/]*$", "")


def _folders(path: str) -> Folders:
    return tuple(name for part in path.split("/") if (name := normalise(part)) not in ("", ".", ".."))

"""Effects: images that are objects: below a folder, matching a glob, or a single one; and the Parquet files and tars
among them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.utils import glob_translate

from imgbatch.concurrency.prefetch import prefetch_streams
from imgbatch.config.sections import SourceConfig
from imgbatch.errors import BadPath, Conflict, Forbidden, InputError, NotFound, StoreError
from imgbatch.schema import LISTING
from imgbatch.sources import tars
from imgbatch.sources.base import ListingBatch
from imgbatch.sources.formats import TableFormats
from imgbatch.sources.manifest import METADATA, Manifest
from imgbatch.sources.naming import DID_YOU_MEAN
from imgbatch.sources.parquet import ImageTable
from imgbatch.sources.patterns import NOTHING, Candidates, junk
from imgbatch.storage.stores import Folder, Meta, Stores

_FILES_AT_ONCE = 4
_HEADS_AT_ONCE, _HEAD_BYTES = 16, 2_048

log = logging.getLogger(__name__)

_TABLE = r"(?i)(^|/)[^./][^/]*\.parquet$"
_SIDECAR = r"(?i)[^/]\.cls$"
_TAR = r"(?i)(^|/)[^./][^/]*\.(tar|tar\.gz|tgz)$"

MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Below:
    """Everything below a folder, recursively."""

    base: str

    def match(self, paths: pa.Array) -> pa.Array | None:
        """Return a mask of the paths that are meant; None: all."""
        return None


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

    def match(self, paths: pa.Array) -> pa.Array | None:
        """Return a mask of the paths that match."""
        return pc.match_substring_regex(paths, pattern=self.pattern)


def is_folder(stores: Stores, uri: str) -> bool:
    """Return whether something lies below a name."""
    return any(len(found) for found in Folder(stores, uri).list_objects())


def single(uri: str, meta: Meta) -> Iterator[ListingBatch]:
    """Yield one object, whatever its name: it was asked for."""
    row = {"uri": uri, "size": meta.size, "etag": meta.etag, "last_modified": meta.last_modified}
    yield ListingBatch(pa.RecordBatch.from_pylist([row], schema=LISTING))


def are_images(stores: Stores, uris: Sequence[str]) -> list[bool]:
    """Return which objects are images by their first bytes, in two requests each, several at a time; for a few of them.

    One that is gone, or may not be read, counts as an image: reading it tells what is wrong with it.

    Raises:
        StoreError: the store is away.
    """
    with ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
        return list(pool.map(partial(_is_image, stores), uris))


def _is_image(stores: Stores, uri: str) -> bool:
    from imgbatch.decode.formats import sniff

    try:
        meta = stores.call("look at", uri, lambda store, path: store.head(path))
        if meta.size == 0:  # of which no store gives a range
            return False
        end = _HEAD_BYTES if meta.size is None else min(meta.size, _HEAD_BYTES)
        return sniff(stores.call("read", uri, lambda store, path: store.read_range(path, 0, end, None))) is not None
    except (NotFound, Forbidden, BadPath, Conflict):
        return True


@dataclass(frozen=True, slots=True)
class Objects:
    """The candidates among the objects that a folder or a glob means."""

    stores: Stores
    meant: Below | Glob
    config: SourceConfig

    def list_images(self) -> Iterator[ListingBatch]:
        """Yield them, the tars, the rows of the Parquet files of images, and those of Hugging Face's metadata files."""
        for found in self._listed():
            is_list = self._are(found.batch, METADATA, "auto")
            yield from self._found(replace(found, batch=found.batch.filter(pc.invert(is_list))))
            lists = found.batch.filter(is_list)
            rows = [partial(self._rows_of_list, lists.slice(at, 1)) for at in range(len(lists))]
            yield from prefetch_streams(rows, concurrency=_FILES_AT_ONCE, max_pending=1)

    def _found(self, found: ListingBatch) -> Iterator[ListingBatch]:
        objects = found.batch
        is_table, is_tar = self._are(objects, _TABLE, "parquet"), self._are(objects, _TAR, "tar")
        candidates = self._candidates(objects.filter(pc.invert(pc.or_(is_table, is_tar))))
        ignored, example = candidates.ignored + found.ignored, candidates.example or found.example
        sidecar = candidates.sidecar or found.sidecar
        yield replace(candidates, ignored=ignored, example=example, sidecar=sidecar)
        if len(shards := objects.filter(is_tar)):
            yield tars.in_place_of_members(shards)
        tables = objects.filter(is_table)
        if len(gone := tables.filter(pc.is_null(tables["size"]))):  # links that lead nowhere
            yield ListingBatch(gone, unread=True)
        rows = [partial(_rows_of, table) for table in self._tables(tables)]
        yield from prefetch_streams(rows, concurrency=_FILES_AT_ONCE, max_pending=1)

    def _meant(self) -> Iterator[pa.RecordBatch]:
        """Yield what is meant, as LISTING batches, without what is junk."""
        return (found.batch for found in self._listed())

    def _listed(self) -> Iterator[ListingBatch]:
        """Yield what is meant; what is junk counts as passed over.

        Raises:
            InputError: Parquet files of a table format, such as Delta's, are among it.
        """
        base, prefix = self.meant.base, self._prefix
        _, path = self.stores.resolve(base)
        formats = TableFormats(self.stores, base)
        for found in Folder(self.stores, base).list_objects():
            names = pc.utf8_slice_codeunits(found["path"], len(path.rstrip("/")) + 1) if path else found["path"]
            keep = pc.invert(junk(names))
            chosen = self.meant.match(found["path"])
            read = keep if chosen is None else pc.and_(keep, chosen)
            formats.require_none(names, names.filter(pc.and_(self._are_called(names, _TABLE, "parquet"), read)))
            if chosen is not None:
                found, keep = found.filter(chosen), keep.filter(chosen)
            uris = pc.binary_join_element_wise(prefix, found["path"], "") if prefix else found["path"]
            columns = [uris, found["size"], found["etag"], found["last_modified"], pa.nulls(len(found), pa.string())]
            yield _passing_over(pa.record_batch(columns, schema=LISTING), keep)

    @property
    def _prefix(self) -> str:
        """What every URI begins with, before its store's path: so it is spelt as the user spelt it."""
        base = self.meant.base
        _, path = self.stores.resolve(base)
        return base.removesuffix(path) if path else f"{base.rstrip('/')}/"

    def _candidates(self, objects: pa.RecordBatch) -> ListingBatch:
        if self.config.format in ("parquet", "tar"):
            return _passing_over(objects, pa.array([False] * len(objects), pa.bool_()))
        names = pc.utf8_slice_codeunits(objects["uri"], len(f"{self.meant.base.rstrip('/')}/"))
        return _passing_over(objects, Candidates(self.config.suffixes).among(names))

    def _rows_of_list(self, listed: pa.RecordBatch) -> Iterator[ListingBatch]:
        """Yield the rows of a metadata file that are candidates of the folder or glob, too."""
        uri = listed["uri"][0].as_py()
        try:
            metadata = Manifest(self.stores, uri, self.config, beside=True)
        except InputError as error:
            log.info("%s is not read as a list of the images beside it: %s", uri, error)
            yield from self._found(ListingBatch(listed, sidecar=uri if DID_YOU_MEAN in str(error) else ""))
            return
        for found in metadata.list_images():
            batch, ignored = found.batch, found.ignored
            meant = self.meant.match(pc.utf8_slice_codeunits(batch["uri"], len(self._prefix)))
            if meant is not None:
                batch = batch.filter(meant)
                ignored += len(found.batch) - len(batch)
            candidates = self._candidates(batch)
            example = found.example or candidates.example
            yield ListingBatch(candidates.batch, ignored=ignored + candidates.ignored, example=example, by_table=True)

    def _are(self, objects: pa.RecordBatch, pattern: str, kind: str) -> pa.Array:
        return self._are_called(objects["uri"], pattern, kind)

    def _are_called(self, names: pa.Array, pattern: str, kind: str) -> pa.Array:
        wanted = self.config.format in ("auto", kind)
        return pc.match_substring_regex(names, pattern=pattern if wanted else NOTHING)

    def _tables(self, objects: pa.RecordBatch) -> Iterator[ImageTable]:
        for row in objects.filter(pc.is_valid(objects["size"])).to_pylist():
            meta = Meta(row["size"], row["etag"], row["last_modified"])
            yield ImageTable(self.stores, row["uri"], meta, self.config.image_column)


def _passing_over(objects: pa.RecordBatch, keep: pa.Array) -> ListingBatch:
    """Return the objects of a mask; the others are counted."""
    passed_over = objects["uri"].filter(pc.invert(keep))
    example = passed_over[0].as_py() if len(passed_over) else ""
    sidecars = passed_over.filter(pc.match_substring_regex(passed_over, _SIDECAR))
    sidecar = sidecars[0].as_py() if len(sidecars) else ""
    return ListingBatch(objects.filter(keep), ignored=len(passed_over), example=example, sidecar=sidecar)


def _rows_of(table: ImageTable) -> Iterator[ListingBatch]:
    """Yield the rows of a Parquet file, or itself: one that cannot be read becomes a reject, like an image that cannot.

    Raises:
        InputError: it can be read, but several of its columns could be images, or have one name.
    """
    try:
        _ = table.columns
    except (StoreError, InputError):
        yield from (replace(found, unread=True) for found in single(table.uri, table.meta))
        return
    if table.column is None:
        yield ListingBatch(pa.RecordBatch.from_pylist([], schema=LISTING), ignored=1, example=table.uri)
        return
    yield from table.list_images()

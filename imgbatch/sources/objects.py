"""Effects: images that are objects: all below a folder, all that match a glob, or a single one.

Parquet files and tars among them are listed too.
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
from imgbatch.sources.manifest import METADATA, Manifest
from imgbatch.sources.naming import DID_YOU_MEAN
from imgbatch.sources.parquet import ImageTable
from imgbatch.sources.patterns import NOTHING, Candidates, junk
from imgbatch.sources.table_formats import TableFormats
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
        """Return a mask of the selected paths; None: all."""
        return None


@dataclass(frozen=True, slots=True)
class Glob:
    """A pattern in which `*` matches within a folder and `**` across folders, and the folder to list."""

    base: str
    pattern: str

    @classmethod
    def of(cls, stores: Stores, uri: str) -> Glob:
        """Parse a URI as a glob.

        Raises:
            InputError: it is not a valid glob.
        """
        before, _, _ = uri[: MAGIC.search(uri).start()].rpartition("/")  # type: ignore[union-attr]
        if before.endswith(":/"):
            raise InputError(f"{uri}: the name of a bucket or host cannot be a pattern")
        try:
            # Arrow uses RE2, where the end of the text is \z.
            pattern = "^" + glob_translate(stores.resolve(uri)[1]).replace(r"\Z", r"\z")
            pc.match_substring_regex(pa.array([""]), pattern=pattern)
        except ValueError as error:
            raise InputError(f"{uri} is not a valid glob: {error}") from error
        return cls(before or "/", pattern)

    def match(self, paths: pa.Array) -> pa.Array | None:
        """Return a mask of the paths that match."""
        return pc.match_substring_regex(paths, pattern=self.pattern)


def is_folder(stores: Stores, uri: str) -> bool:
    """Return whether an object exists below a name."""
    return any(len(batch) for batch in Folder(stores, uri).list_objects())


def list_single(uri: str, meta: Meta) -> Iterator[ListingBatch]:
    """Yield one object, whatever its name, since the user has named it."""
    row = {"uri": uri, "size": meta.size, "etag": meta.etag, "last_modified": meta.last_modified}
    yield ListingBatch(pa.RecordBatch.from_pylist([row], schema=LISTING))


def are_images(stores: Stores, uris: Sequence[str]) -> list[bool]:
    """Return which objects are images according to their first bytes. Takes two requests each, several at a time.

    An object that is missing or cannot be read counts as an image: reading it later reports what is wrong.

    Raises:
        StoreError: the store is unreachable.
    """
    with ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
        return list(pool.map(partial(_is_image, stores), uris))


def _is_image(stores: Stores, uri: str) -> bool:
    from imgbatch.decode.formats import sniff

    try:
        meta = stores.call("look at", uri, lambda store, path: store.head(path))
        if meta.size == 0:  # stores refuse a range of an empty object
            return False
        end = _HEAD_BYTES if meta.size is None else min(meta.size, _HEAD_BYTES)
        return sniff(stores.call("read", uri, lambda store, path: store.read_range(path, 0, end, None))) is not None
    except (NotFound, Forbidden, BadPath, Conflict):
        return True


@dataclass(frozen=True, slots=True)
class Objects:
    """The candidates among the objects that a folder or a glob selects."""

    stores: Stores
    selection: Below | Glob
    config: SourceConfig

    def list_images(self) -> Iterator[ListingBatch]:
        """Yield the candidates, the tars, the rows of Parquet files of images, and the rows of metadata files."""
        for selected in self._selected():
            is_list = self._matches(selected.batch["uri"], METADATA, "auto")
            yield from self._by_kind(replace(selected, batch=selected.batch.filter(pc.invert(is_list))))
            lists = selected.batch.filter(is_list)
            rows = [partial(self._rows_of_list, lists.slice(at, 1)) for at in range(len(lists))]
            yield from prefetch_streams(rows, concurrency=_FILES_AT_ONCE, max_pending=1)

    def _by_kind(self, selected: ListingBatch) -> Iterator[ListingBatch]:
        """Yield the candidates among the objects, the tars, and the rows of the Parquet files."""
        objects = selected.batch
        is_table, is_tar = self._matches(objects["uri"], _TABLE, "parquet"), self._matches(objects["uri"], _TAR, "tar")
        candidates = self._candidates(objects.filter(pc.invert(pc.or_(is_table, is_tar))))
        ignored, example = candidates.ignored + selected.ignored, candidates.example or selected.example
        sidecar = candidates.sidecar or selected.sidecar
        yield replace(candidates, ignored=ignored, example=example, sidecar=sidecar)
        if len(shards := objects.filter(is_tar)):
            yield tars.tar_rows(shards)
        tables = objects.filter(is_table)
        if len(broken := tables.filter(pc.is_null(tables["size"]))):  # broken links have no size
            yield ListingBatch(broken, unread=True)
        rows = [partial(_rows_of_table, table) for table in self._tables(tables)]
        yield from prefetch_streams(rows, concurrency=_FILES_AT_ONCE, max_pending=1)

    def _selected(self) -> Iterator[ListingBatch]:
        """Yield the selected objects without junk, which counts as ignored.

        Raises:
            InputError: Parquet files of a table format, such as Delta, are among them.
        """
        base, prefix = self.selection.base, self._prefix
        _, path = self.stores.resolve(base)
        formats = TableFormats(self.stores, base)
        for batch in Folder(self.stores, base).list_objects():
            names = pc.utf8_slice_codeunits(batch["path"], len(path.rstrip("/")) + 1) if path else batch["path"]
            keep = pc.invert(junk(names))
            matches = self.selection.match(batch["path"])
            read = keep if matches is None else pc.and_(keep, matches)
            formats.require_none(names, names.filter(pc.and_(self._matches(names, _TABLE, "parquet"), read)))
            if matches is not None:
                batch, keep = batch.filter(matches), keep.filter(matches)
            uris = pc.binary_join_element_wise(prefix, batch["path"], "") if prefix else batch["path"]
            columns = [uris, batch["size"], batch["etag"], batch["last_modified"], pa.nulls(len(batch), pa.string())]
            yield _filtered(pa.record_batch(columns, schema=LISTING), keep)

    @property
    def _prefix(self) -> str:
        """The part of each URI before the path in its store, in the user's spelling."""
        base = self.selection.base
        _, path = self.stores.resolve(base)
        return base.removesuffix(path) if path else f"{base.rstrip('/')}/"

    def _candidates(self, objects: pa.RecordBatch) -> ListingBatch:
        if self.config.format in ("parquet", "tar"):
            return _filtered(objects, pa.array([False] * len(objects), pa.bool_()))
        names = pc.utf8_slice_codeunits(objects["uri"], len(f"{self.selection.base.rstrip('/')}/"))
        return _filtered(objects, Candidates(self.config.suffixes).mask(names))

    def _rows_of_list(self, listed: pa.RecordBatch) -> Iterator[ListingBatch]:
        """Yield the rows of a metadata file that are also candidates of the folder or glob."""
        uri = listed["uri"][0].as_py()
        try:
            metadata = Manifest(self.stores, uri, self.config, in_image_folder=True)
        except InputError as error:
            log.info("%s is not read as a list of the images in its folder: %s", uri, error)
            yield from self._by_kind(ListingBatch(listed, sidecar=uri if DID_YOU_MEAN in str(error) else ""))
            return
        for rows in metadata.list_images():
            batch, ignored = rows.batch, rows.ignored
            matches = self.selection.match(pc.utf8_slice_codeunits(batch["uri"], len(self._prefix)))
            if matches is not None:
                batch = batch.filter(matches)
                ignored += len(rows.batch) - len(batch)
            candidates = self._candidates(batch)
            example = rows.example or candidates.example
            yield ListingBatch(candidates.batch, ignored=ignored + candidates.ignored, example=example, by_table=True)

    def _matches(self, names: pa.Array, pattern: str, format: str) -> pa.Array:
        """Return a mask of the names that match a pattern, if `source.format` admits the format."""
        admitted = self.config.format in ("auto", format)
        return pc.match_substring_regex(names, pattern=pattern if admitted else NOTHING)

    def _tables(self, objects: pa.RecordBatch) -> Iterator[ImageTable]:
        for row in objects.filter(pc.is_valid(objects["size"])).to_pylist():
            meta = Meta(row["size"], row["etag"], row["last_modified"])
            yield ImageTable(self.stores, row["uri"], meta, self.config.image_column)


def _filtered(objects: pa.RecordBatch, keep: pa.Array) -> ListingBatch:
    """Return the objects in a mask, and count the others as ignored."""
    ignored = objects["uri"].filter(pc.invert(keep))
    example = ignored[0].as_py() if len(ignored) else ""
    sidecars = ignored.filter(pc.match_substring_regex(ignored, _SIDECAR))
    sidecar = sidecars[0].as_py() if len(sidecars) else ""
    return ListingBatch(objects.filter(keep), ignored=len(ignored), example=example, sidecar=sidecar)


def _rows_of_table(table: ImageTable) -> Iterator[ListingBatch]:
    """Yield the rows of a Parquet file. A file that cannot be read is one row, and becomes a reject like a damaged image.

    Raises:
        InputError: several columns could be images, or have the same name.
    """
    try:
        _ = table.columns
    except (StoreError, InputError):
        yield from (replace(batch, unread=True) for batch in list_single(table.uri, table.meta))
        return
    if table.column is None:
        yield ListingBatch(pa.RecordBatch.from_pylist([], schema=LISTING), ignored=1, example=table.uri)
        return
    yield from table.list_images()

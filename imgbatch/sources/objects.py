"""Images that are objects: below a folder, matching a glob, or a single one; and the Parquet files and tars among them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.utils import glob_translate

from imgbatch.ahead import chained
from imgbatch.config import SourceConfig
from imgbatch.errors import InputError, StoreError
from imgbatch.listing import Found
from imgbatch.schema import LISTING, TAR
from imgbatch.sources import tars
from imgbatch.sources.manifest import METADATA, Manifest
from imgbatch.sources.names import NOTHING, candidate_pattern
from imgbatch.sources.parquet import ImageTable
from imgbatch.storage import Folder, Meta, Stores

_FILES_AT_ONCE = 4

log = logging.getLogger(__name__)

_TABLE = r"(?i)(^|/)[^./][^/]*\.parquet$"
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
    return any(len(found) for found in Folder(stores, uri).found())


def single(uri: str, meta: Meta) -> Iterator[Found]:
    """Yield one object, whatever its name: it was asked for."""
    row = {"uri": uri, "size": meta.size, "etag": meta.etag, "last_modified": meta.last_modified}
    yield Found(pa.RecordBatch.from_pylist([row], schema=LISTING))


@dataclass(frozen=True, slots=True)
class Objects:
    """The candidates among the objects that a folder or a glob means; names that begin with a dot are passed over."""

    stores: Stores
    meant: Below | Glob
    config: SourceConfig

    def found(self) -> Iterator[Found]:
        """Yield them, the tars, the rows of the Parquet files of images, and those of Hugging Face's metadata files."""
        for objects in self._meant():
            is_list = self._are(objects, METADATA, "auto")
            yield from self._found(objects.filter(pc.invert(is_list)))
            lists = objects.filter(is_list)
            rows = [partial(self._rows_of_list, lists.slice(at, 1)) for at in range(len(lists))]
            yield from chained(rows, at_once=_FILES_AT_ONCE, most=1)

    def _found(self, objects: pa.RecordBatch) -> Iterator[Found]:
        is_table, is_tar = self._are(objects, _TABLE, "parquet"), self._are(objects, _TAR, "tar")
        yield self._candidates(objects.filter(pc.invert(pc.or_(is_table, is_tar))))
        if len(shards := objects.filter(is_tar)):
            yield Found(shards.set_column(4, LISTING.field("container"), pa.repeat(TAR, len(shards))))
        rows = [partial(_rows_of, table) for table in self._tables(objects.filter(is_table))]
        yield from chained(rows, at_once=_FILES_AT_ONCE, most=1)

    def carried(self) -> pa.Schema:
        """Return the columns that travel along: those of the first Parquet file of images among the first objects, and
        those of tars, if there is one among them."""
        carried = pa.schema([])
        for objects in islice(self._meant(), 1):
            for uri in objects["uri"].filter(self._are(objects, METADATA, "auto")).to_pylist():
                if (metadata := self._metadata(uri)) is not None:
                    carried = pa.unify_schemas([carried, metadata.carried], promote_options="permissive")
            for table in self._tables(objects.filter(self._are(objects, _TABLE, "parquet"))):
                with suppress(StoreError, InputError):
                    if table.column is not None:
                        carried = pa.unify_schemas([carried, table.carried], promote_options="permissive")
                        break
            if pc.any(self._are(objects, _TAR, "tar")).as_py():
                carried = pa.unify_schemas([carried, tars.CARRIED_FIELDS], promote_options="permissive")
        return carried

    def _meant(self) -> Iterator[pa.RecordBatch]:
        """Yield LISTING batches."""
        prefix = self._prefix
        for found in Folder(self.stores, self.meant.base).found():
            chosen = self.meant.match(found["path"])
            if chosen is not None:
                found = found.filter(chosen)
            uris = pc.binary_join_element_wise(prefix, found["path"], "") if prefix else found["path"]
            columns = [uris, found["size"], found["etag"], found["last_modified"], pa.nulls(len(found), pa.string())]
            yield pa.record_batch(columns, schema=LISTING)

    @property
    def _prefix(self) -> str:
        """What every URI begins with, before its store's path: so it is spelt as the user spelt it."""
        base = self.meant.base
        _, path = self.stores.resolve(base)
        return base.removesuffix(path) if path else f"{base.rstrip('/')}/"

    def _candidates(self, objects: pa.RecordBatch) -> Found:
        only_containers = self.config.format in ("parquet", "tar")
        pattern = NOTHING if only_containers else candidate_pattern(self.config.suffixes) or ""
        chosen = pc.match_substring_regex(objects["uri"], pattern=pattern)
        passed_over = objects["uri"].filter(pc.invert(chosen))
        example = passed_over[0].as_py() if len(passed_over) else ""
        return Found(objects.filter(chosen), ignored=len(passed_over), example=example)

    def _rows_of_list(self, listed: pa.RecordBatch) -> Iterator[Found]:
        """Yield the rows of a metadata file that are candidates of the folder or glob, too."""
        metadata = self._metadata(listed["uri"][0].as_py())
        if metadata is None:
            yield from self._found(listed)
            return
        for found in metadata.found():
            batch, ignored = found.batch, found.ignored
            meant = self.meant.match(pc.utf8_slice_codeunits(batch["uri"], len(self._prefix)))
            if meant is not None:
                batch = batch.filter(meant)
                ignored += len(found.batch) - len(batch)
            candidates = self._candidates(batch)
            yield Found(candidates.batch, ignored + candidates.ignored, found.example or candidates.example)

    def _metadata(self, uri: str) -> Manifest | None:
        """Return the metadata file of that name, None if it names no images: then it is an object like others."""
        try:
            return Manifest(self.stores, uri, self.config, beside=True)
        except InputError as error:
            log.info("%s is not read as a list of the images beside it: %s", uri, error)
            return None

    def _are(self, objects: pa.RecordBatch, pattern: str, kind: str) -> pa.Array:
        wanted = self.config.format in ("auto", kind)
        return pc.match_substring_regex(objects["uri"], pattern=pattern if wanted else NOTHING)

    def _tables(self, objects: pa.RecordBatch) -> Iterator[ImageTable]:
        for row in objects.to_pylist():
            meta = Meta(row["size"], row["etag"], row["last_modified"])
            yield ImageTable(self.stores, row["uri"], meta, self.config.image_column)


def _rows_of(table: ImageTable) -> Iterator[Found]:
    """Yield the rows of a Parquet file, or itself: one that cannot be read becomes a reject, like an image that cannot.

    Raises:
        InputError: it can be read, but several of its columns could be images, or have one name.
    """
    try:
        _ = table.columns
    except (StoreError, InputError):
        yield from single(table.uri, table.meta)
        return
    if table.column is None:
        yield Found(pa.RecordBatch.from_pylist([], schema=LISTING), ignored=1, example=table.uri)
        return
    yield from table.found()

"""Effects: where images come from. A source yields LISTING batches; which kind an input is, is recognised here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from fsspec.utils import glob_translate

from imgbatch.concurrency.prefetch import prefetch_streams
from imgbatch.config.sections import SourceConfig
from imgbatch.errors import BadPath, InputError, NotFound, StoreError
from imgbatch.sources import inventory, objects, tars
from imgbatch.sources.base import ListingBatch, Source
from imgbatch.sources.lists import NAMED, NOT_READ, SUFFIXES
from imgbatch.sources.manifest import Manifest
from imgbatch.sources.parquet import ImageTable
from imgbatch.sources.patterns import numbered
from imgbatch.storage.error_mapping import guarded
from imgbatch.storage.stores import Folder, Meta, Stores, absent, absolute, is_local

_INPUTS_AT_ONCE = 4
_UNREAD = (".zip", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")


def recognise(stores: Stores, inputs: Sequence[str], config: SourceConfig) -> list[Source]:
    """Return a source for each input.

    Raises:
        InputError: an input is not there, or is of a kind that is not read.
    """
    if not inputs:
        raise InputError("nothing to classify: give --input a prefix, folder, glob, object or manifest")
    if not all(uri.strip() for uri in inputs):
        raise InputError("--input is empty, which would be the working directory: write --input . if that is meant")
    for uri in inputs:
        require_utf8(uri, "--input")
    found = []
    for number, uri in enumerate(inputs):
        for each in numbered(uri):
            source = replace(_recognise(stores, absolute(each), config), group=number)
            if each != uri and source.kind == "folder" and not objects.is_folder(stores, source.uri):
                raise InputError(f"{source.uri}, one of {uri}, is not there")
            found.append(source)
    return found


def everything(sources: Sequence[Source], *, allow_empty: bool = True) -> Iterator[ListingBatch]:
    """Yield what all sources find, in the order of the inputs; the next ones are listed already.

    Raises:
        InputError: one of several inputs holds not one image, and that is not allowed.
    """

    def found_in(source: Source) -> Iterator[ListingBatch]:
        images = 0
        for found in source.list_images():
            images += len(found.batch)
            yield replace(found, origin=found.origin or source.uri)
        if not images and not allow_empty and len(sources) > 1:
            raise InputError(
                f"no image in {source.uri}, one of {len(sources)} inputs: is it right? source.allow_empty=true accepts it"
            )

    yield from prefetch_streams(
        [partial(found_in, source) for source in sources], concurrency=_INPUTS_AT_ONCE, max_pending=1
    )


def answer(sources: Sequence[Source]) -> bool:
    """Return whether the stores of all sources let us in at all."""
    try:
        return all(next((source.probe or source.list_images)(), None) is not None for source in sources)
    except StoreError:
        return False


def would_find(source: Source, output: Folder) -> bool:
    """Return whether a source lists what is written below an output."""
    if source.kind == "glob":
        pattern = re.compile(glob_translate(source.uri))
        return any(pattern.match(output.at(name)) for name in ("_SUCCESS", "labels/part-1.parquet", "runs/id/run.json"))
    return source.kind == "folder" and f"{output.uri}/".startswith(f"{source.uri}/")


def require_utf8(uri: str, what: str) -> None:
    """Refuse a path whose bytes are not UTF-8, which no table and no record could hold.

    Raises:
        InputError: it is one.
    """
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        name = uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise InputError(
            f"{what} {name} is not UTF-8, so that no table can hold it: rename it, for example with "
            "convmv -f ENCODING -t utf8 --notest, or give the path through a link of another name"
        ) from error


def require_there(uri: str, config: SourceConfig) -> None:
    """Refuse an input on this machine's disk that does not exist, unless inputs may be empty.

    Raises:
        InputError: it is one.
    """
    magic = objects.MAGIC.search(uri)
    if config.allow_empty or (magic and not is_local(uri)):
        return
    folder = uri[: magic.start()].rpartition("/")[0] if magic and not os.path.lexists(absolute(uri)) else uri
    if missing := absent(folder or "/"):
        raise InputError(f"--input {missing}" if folder == uri else f"--input {uri}: {missing}")


def _recognise(stores: Stores, uri: str, config: SourceConfig) -> Source:
    meta = _head(stores, uri)
    if meta is not None:
        return _recognise_object(stores, uri, meta, config)
    if uri.lower().startswith(("http://", "https://")):
        raise InputError(f"{uri} is not there: https:// gives single objects and manifests, not folders")
    if config.format == "manifest":
        raise InputError(f"{absent(uri) or f'{uri} is not there'}: it cannot be read as a manifest")
    is_glob = objects.MAGIC.search(uri) and not objects.is_folder(stores, uri)
    meant = objects.Glob.of(stores, uri) if is_glob else objects.Below(uri)
    require_there(uri, config)
    found = objects.Objects(stores, meant, config)
    return Source(uri, "glob" if is_glob else "folder", found.list_images)


def _recognise_object(stores: Stores, uri: str, meta: Meta, config: SourceConfig) -> Source:
    lower = uri.lower()
    if config.format == "parquet" or (config.format == "auto" and lower.endswith(".parquet")):
        table = ImageTable(stores, uri, meta, config.image_column)
        if config.format == "parquet" or _holds_images(table, config):
            if table.column is None:
                named = "image column" if config.image_column is None else f"column {config.image_column!r} of bytes"
                raise InputError(f"{uri} has no {named}; it has: {', '.join(table.columns.names)}")
            return Source(uri, "parquet", table.list_images)
    if config.format == "inventory" or (config.format == "auto" and lower.endswith(f"/{inventory.NAME}")):
        try:
            report = inventory.Inventory(stores, uri, config.suffixes)
        except InputError:
            # A report is an object, so an array of that name is none.
            if config.format == "auto" and (listed := _manifest(stores, uri, config)) is not None:
                return listed
            raise
        return Source(uri, "inventory", report.list_images)
    if config.format == "manifest" or (config.format == "auto" and lower.endswith(SUFFIXES)):
        manifest = Manifest(stores, uri, config)
        return Source(uri, "manifest", manifest.list_images)
    if config.format == "tar" or (config.format == "auto" and lower.endswith(tars.SUFFIXES)):
        return Source(uri, "tar", lambda: tars.listed(uri, meta))
    if config.format == "auto" and lower.endswith((*NOT_READ, *(f"{suffix}.gz" for suffix in NOT_READ))):
        raise InputError(
            f"{uri} is no form of list that is read, and by its name no image. Lists are {NAMED}. source.format=manifest "
            "reads it as CSV or JSON, by what is in it; source.format=objects takes it as one image"
        )
    if config.format != "objects" and lower.endswith(_UNREAD):
        raise InputError(
            f"{uri}: of archives only .tar, .tar.gz and .tgz are read; give the images in one, or as objects"
        )
    return Source(uri, "object", lambda: objects.single(uri, meta))


def _manifest(stores: Stores, uri: str, config: SourceConfig) -> Source | None:
    """Return a manifest, None if the file is none."""
    try:
        manifest = Manifest(stores, uri, config)
    except InputError:
        return None
    return Source(uri, "manifest", manifest.list_images)


def _holds_images(table: ImageTable, config: SourceConfig) -> bool:
    """Return whether a Parquet file is one of images, and not a manifest."""
    names = table.columns.names
    if config.image_column is not None and (table.column is not None or "uri" not in names):
        return True
    chosen = config.uri_column is not None or config.uri_template is not None
    return not chosen and "uri" not in names and table.column is not None


def _head(stores: Stores, uri: str) -> Meta | None:
    """Return what is known of the object of that name, None if there is none.

    Raises:
        InputError: no store can have such a name.
    """
    try:
        with guarded("open", uri):
            stores.resolve(uri)
    except BadPath as error:
        raise InputError(str(error)) from error
    try:
        return stores.call("look at", uri, lambda store, path: store.head(path) if path else None)
    except (NotFound, BadPath):
        return None

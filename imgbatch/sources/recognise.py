"""Effects: the inputs of a run as sources: recognises the kind of each input, and lists all of them."""

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
from imgbatch.sources.lists import READABLE, SUFFIXES, UNREADABLE
from imgbatch.sources.manifest import Manifest
from imgbatch.sources.parquet import ImageTable
from imgbatch.sources.patterns import expand_range
from imgbatch.storage.error_mapping import guarded
from imgbatch.storage.stores import Folder, Meta, Stores
from imgbatch.storage.uris import absolute, is_local, missing_path

_INPUTS_AT_ONCE = 4
_UNREADABLE_ARCHIVES = (".zip", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")


def recognise(stores: Stores, inputs: Sequence[str], config: SourceConfig) -> list[Source]:
    """Return a source for each input.

    Raises:
        InputError: an input does not exist, or is of a kind that is not supported.
    """
    if not inputs:
        raise InputError("there is no input: give a prefix, folder, glob, object or manifest with --input")
    if not all(uri.strip() for uri in inputs):
        raise InputError("--input is empty. Write --input . for the working directory")
    for uri in inputs:
        require_utf8(uri, "--input")
    sources = []
    for number, uri in enumerate(inputs):
        for expanded in expand_range(uri):
            source = replace(_recognise(stores, absolute(expanded), config), group=number)
            if expanded != uri and source.kind == "folder" and not objects.is_folder(stores, source.uri):
                raise InputError(f"{source.uri}, one of {uri}, is not there")
            sources.append(source)
    return sources


def list_all(sources: Sequence[Source], *, allow_empty: bool = True) -> Iterator[ListingBatch]:
    """Yield the images of all sources in the order of the inputs, while the next inputs are listed.

    Raises:
        InputError: one of several inputs has no image, and `allow_empty` is False.
    """

    def list_source(source: Source) -> Iterator[ListingBatch]:
        images = 0
        for batch in source.list_images():
            images += len(batch.batch)
            yield replace(batch, origin=batch.origin or source.uri)
        if not images and not allow_empty and len(sources) > 1:
            raise InputError(
                f"no image in {source.uri}, one of {len(sources)} inputs. Check the URI, or set source.allow_empty=true"
            )

    yield from prefetch_streams(
        [partial(list_source, source) for source in sources], concurrency=_INPUTS_AT_ONCE, max_pending=1
    )


def store_is_reachable(sources: Sequence[Source]) -> bool:
    """Return whether the stores of all sources can be listed."""
    try:
        return all(next((source.probe or source.list_images)(), None) is not None for source in sources)
    except StoreError:
        return False


def would_list(source: Source, output: Folder) -> bool:
    """Return whether a source lists objects below an output."""
    if source.kind == "glob":
        pattern = re.compile(glob_translate(source.uri))
        return any(pattern.match(output.at(name)) for name in ("_SUCCESS", "labels/part-1.parquet", "runs/id/run.json"))
    return source.kind == "folder" and f"{output.uri}/".startswith(f"{source.uri}/")


def require_utf8(uri: str, what: str) -> None:
    """Refuse a path whose bytes are not UTF-8: tables and records cannot contain it.

    Raises:
        InputError: the path is not UTF-8.
    """
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        name = uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise InputError(
            f"{what} {name} is not UTF-8, so that no table can hold it. Rename it, for example with "
            "convmv -f ENCODING -t utf8 --notest, or use a link with another name"
        ) from error


def require_exists(uri: str, config: SourceConfig) -> None:
    """Refuse a local input that does not exist, unless inputs may be empty.

    Raises:
        InputError: the input does not exist.
    """
    magic = objects.MAGIC.search(uri)
    if config.allow_empty or (magic and not is_local(uri)):
        return
    folder = uri[: magic.start()].rpartition("/")[0] if magic and not os.path.lexists(absolute(uri)) else uri
    if missing := missing_path(folder or "/"):
        raise InputError(f"--input {missing}" if folder == uri else f"--input {uri}: {missing}")


def _recognise(stores: Stores, uri: str, config: SourceConfig) -> Source:
    meta = _head(stores, uri)
    if meta is not None:
        return _recognise_object(stores, uri, meta, config)
    if uri.lower().startswith(("http://", "https://")):
        raise InputError(f"{uri} is not there. https:// URIs must name single objects or manifests, not folders")
    if config.format == "manifest":
        raise InputError(f"{missing_path(uri) or f'{uri} is not there'}: it cannot be read as a manifest")
    is_glob = objects.MAGIC.search(uri) and not objects.is_folder(stores, uri)
    selection = objects.Glob.of(stores, uri) if is_glob else objects.Below(uri)
    require_exists(uri, config)
    selected = objects.Objects(stores, selection, config)
    return Source(uri, "glob" if is_glob else "folder", selected.list_images)


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
            # The manifest of a report is a JSON object; a list of images of that name is an array.
            if config.format == "auto" and (listed := _manifest(stores, uri, config)) is not None:
                return listed
            raise
        return Source(uri, "inventory", report.list_images)
    if config.format == "manifest" or (config.format == "auto" and lower.endswith(SUFFIXES)):
        manifest = Manifest(stores, uri, config)
        return Source(uri, "manifest", manifest.list_images, annotated=manifest.annotated)
    if config.format == "tar" or (config.format == "auto" and lower.endswith(tars.SUFFIXES)):
        return Source(uri, "tar", lambda: tars.list_tar(uri, meta))
    if config.format == "auto" and lower.endswith((*UNREADABLE, *(f"{suffix}.gz" for suffix in UNREADABLE))):
        raise InputError(
            f"{uri} has the suffix of neither an image nor a supported list. Supported lists are {READABLE}. Set "
            "source.format=manifest to read it as CSV or JSON, or source.format=objects to read it as one image"
        )
    if config.format != "objects" and lower.endswith(_UNREADABLE_ARCHIVES):
        raise InputError(
            f"{uri}: of archives only .tar, .tar.gz and .tgz are read. Give the images in a tar, or as objects"
        )
    return Source(uri, "object", lambda: objects.list_single(uri, meta))


def _manifest(stores: Stores, uri: str, config: SourceConfig) -> Source | None:
    """Return a manifest as a source, None if the file is not a manifest."""
    try:
        manifest = Manifest(stores, uri, config)
    except InputError:
        return None
    return Source(uri, "manifest", manifest.list_images, annotated=manifest.annotated)


def _holds_images(table: ImageTable, config: SourceConfig) -> bool:
    """Return whether a Parquet file has images and is not a manifest."""
    names = table.columns.names
    if config.image_column is not None and (table.column is not None or "uri" not in names):
        return True
    names_images = config.uri_column is not None or config.uri_template is not None
    return not names_images and "uri" not in names and table.column is not None


def _head(stores: Stores, uri: str) -> Meta | None:
    """Return the metadata of the object of that name, None if there is none.

    Raises:
        InputError: the URI is invalid.
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

"""Effects: stores by URI: the store of a URI, retries, and errors that name the operation and the URI."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import (
    BadPath,
    ConfigError,
    Conflict,
    Exists,
    NotFound,
    OutputError,
    StoreError,
    TimedOut,
    Unreachable,
)
from imgbatch.storage import cloud
from imgbatch.storage.base import Meta, Store, require_listed_size
from imgbatch.storage.error_mapping import guarded
from imgbatch.storage.file_objects import RangeFile, StreamFile
from imgbatch.storage.fsspec_store import FsspecStore
from imgbatch.storage.local import LocalStore
from imgbatch.storage.retry import backoff
from imgbatch.storage.uris import is_local, split_scheme

__all__ = ["Folder", "Meta", "Stores"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_WEB = ("http", "https")
_WARN_AFTER = 4  # failures: about 5 s
_MAX_CONFLICTS = 1000
_OPEN_BUFFER = 4 << 20


class Stores:
    """All stores of a run, opened when first used. Pickled to the workers, where each process opens its own.

    The pickle contains the options and the credentials from the driver's environment, since the environment itself does
    not reach the workers of a running cluster. No task argument that Ray shows and no `repr` contains them.
    """

    def __init__(self, config: StorageConfig, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._config = config
        self._environment = cloud.travelling(environment)
        self._open: dict[tuple[str, str, bool], Store] = {}

    def __repr__(self) -> str:
        return f"Stores({sorted(self._config.options)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_config": self._config, "_environment": self._environment, "_open": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def resolve(self, uri: str, *, via_fsspec: bool = False) -> tuple[Store, str]:
        """Return the store of a URI and the path in it.

        Args:
            via_fsspec: use fsspec even where obstore could be used.

        Raises:
            BadPath: the URI chains file systems (`::`), or names no bucket.
            ConfigError: fsspec has no such file system, or its package is not installed.
        """
        protocol = "" if is_local(uri) else split_scheme(uri)[0]
        if "::" in protocol:
            raise BadPath(f"{uri}: chained file systems (::) are not supported")
        cloud.require_readable(uri, protocol)
        service, bucket = cloud.BY_SCHEME.get(protocol), ""
        if service is not None:
            protocol, bucket = service.name, service.split(uri)[0]
            if not bucket:
                raise BadPath(f"{uri} names no bucket")
        key = (protocol, bucket, via_fsspec)
        if key not in self._open:
            self._open[key] = self._make(*key)
        store = self._open[key]
        return store, store.path(uri)

    def read(self, uri: str, limit: int | None = None, listed: Meta | None = None) -> tuple[bytes, Meta]:
        """Return the content of an object and the metadata of the version that was read.

        Args:
            limit: the maximum size in bytes.
            listed: the metadata in the listing. A body of another length is an error.

        Raises:
            StoreError: as `call`. Also BadPath for an unknown protocol: a row of a manifest may have one, and that must
                not end the run.
        """

        def read_whole(store: Store, path: str) -> tuple[bytes, Meta]:
            data, read = store.read(path, limit)
            if listed is not None:
                require_listed_size(uri, len(data), read, listed)
            return data, read

        try:
            return self.call("read", uri, read_whole)
        except ConfigError as error:
            if isinstance(error.__cause__, ValueError):
                raise BadPath(f"read {uri}: {error}") from error
            raise

    @contextmanager
    def open(self, uri: str) -> Iterator[BinaryIO]:
        """Open an object for reading forward, and back where that is needed."""
        with guarded("open", uri):
            store, path = self.resolve(uri)
            if isinstance(store, LocalStore | FsspecStore):
                with store.open(path) as file:
                    yield file
                return
            meta = self.call("open", uri, lambda store, path: store.head(path))
            with io.BufferedReader(RangeFile(self, uri, meta), _OPEN_BUFFER) as buffered:
                yield buffered

    def ranges(self, uri: str, meta: Meta) -> BinaryIO:
        """Open an object of known size for random access: each read is a range request."""
        return RangeFile(self, uri, meta)  # type: ignore[return-value]

    def stream(self, uri: str, meta: Meta, start: int = 0) -> StreamFile:
        """Open an object for reading forward from a position on, in one request."""
        return StreamFile(self, uri, meta, start, self._config.retries)

    def call(self, operation: str, uri: str, action: Callable[[Store, str], T]) -> T:
        """Run `action(store, path)`, and repeat it after transient failures, with exponential back-off and jitter.

        Raises:
            StoreError: naming operation and URI; its attribute `attempts` has the number of attempts.
        """
        attempt, via_fsspec = 1, False
        while True:
            try:
                with guarded(operation, uri):
                    return action(*self.resolve(uri, via_fsspec=via_fsspec))
            except BadPath:
                if via_fsspec or split_scheme(uri)[0] not in cloud.BY_SCHEME:
                    raise
                via_fsspec = True  # obstore refuses some keys that fsspec's stores support
                continue
            except StoreError as error:
                error.attempts = attempt
                if not isinstance(error, Unreachable | TimedOut) or attempt > self._config.retries:
                    raise
                if attempt == (1 if isinstance(error, TimedOut) else _WARN_AFTER):
                    log.warning("%s; trying again up to %d times", error, self._config.retries - attempt)
            time.sleep(backoff(attempt))
            attempt += 1

    def _make(self, protocol: str, bucket: str, via_fsspec: bool) -> Store:
        if protocol == "":
            return LocalStore()
        if service := cloud.BY_SCHEME.get(protocol):
            opening = service.open_with_fsspec if via_fsspec else service.open
            return opening(bucket, self._config, self._environment)
        try:
            if protocol in _WEB:  # without the options: credentials of a bucket must not reach a web server
                from imgbatch.storage.http import HttpStore

                return HttpStore(protocol, self._config.timeout_s, private_hosts=self._config.allow_private_hosts)
            options = {name: value for name, value in self._config.options.items() if name not in cloud.SECTIONS}
            return FsspecStore(protocol, options, self._config.timeout_s)
        except (ValueError, ImportError, TypeError) as error:
            raise ConfigError(f"{protocol}://: {error}; see storage.options") from error


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in a store. Its objects are addressed by their names relative to it."""

    stores: Stores
    uri: str

    @property
    def conditional(self) -> bool:
        """Whether creation and replacement are atomic: of two writers, one always fails."""
        return self.stores.resolve(self.uri)[0].conditional

    def at(self, name: str) -> str:
        """Return the URI of a name in this folder."""
        return f"{self.uri}/{name}" if name else self.uri

    def folder(self, name: str) -> Folder:
        """Return the folder `name` in this one."""
        return Folder(self.stores, self.at(name))

    def read(self, name: str) -> bytes:
        """Return the content of an object."""
        return self.stores.read(self.at(name))[0]

    def read_tagged(self, name: str) -> tuple[bytes, str | None]:
        """Return the content of an object and its tag, for `replace`."""
        return self.stores.call("read", self.at(name), lambda store, path: store.read_tagged(path))

    def create(self, name: str, data: bytes) -> None:
        """Write an object that must not exist yet; Exists if it does."""
        self.stores.call("create", self.at(name), lambda store, path: store.create(path, data))

    def put(self, name: str, data: bytes) -> None:
        """Write an object, whether it exists or not."""
        self.stores.call("write", self.at(name), lambda store, path: store.put(path, data))

    def replace(self, name: str, data: bytes, tag: str | None) -> None:
        """Replace an object that still has this tag; Conflict if it has changed."""
        self.stores.call("replace", self.at(name), lambda store, path: store.replace(path, data, tag))

    def change(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace an object by `change(content)`. If another writer is faster, read the new content and try again.

        Args:
            change: receives the content, None if the object does not exist.

        Raises:
            OutputError: other writers were faster each time.
        """
        for _ in range(_MAX_CONFLICTS):
            try:
                old, tag = self.read_tagged(name)
            except NotFound:
                with suppress(Exists):
                    return self.create(name, change(None))
                continue
            with suppress(Conflict, NotFound):
                return self.replace(name, change(old), tag)
        raise OutputError(f"{self.at(name)} keeps changing under another writer")

    def delete(self, name: str, tag: str | None = None) -> None:
        """Remove an object; a missing object is no error. With a tag only that version: Conflict if it is another one and
        the store can check that."""
        self.stores.call("delete", self.at(name), lambda store, path: store.delete(path, tag))

    def exists(self, name: str) -> bool:
        """Return whether an object of that name exists."""
        try:
            self.stores.call("look at", self.at(name), lambda store, path: store.head(path))
        except NotFound:
            return False
        return True

    def folders(self, name: str = "") -> list[str]:
        """Return the names of the folders directly below `name`."""
        return self.stores.call("list", self.at(name), lambda store, path: store.folders(path))

    def names(self, name: str = "") -> list[str]:
        """Return the names of all objects below the folder `name`, relative to it. For folders of parts, not of images."""
        uri = self.at(name)

        def collect(store: Store, path: str) -> list[str]:
            prefix = path.rstrip("/") + "/" if path else ""
            return [
                full.removeprefix(prefix) for batch in store.list_objects(path) for full in batch["path"].to_pylist()
            ]

        return sorted(self.stores.call("list", uri, collect))

    def entries(self) -> list[tuple[str, Meta]]:
        """Return the names of all objects below this folder, relative to it, with their metadata, sorted."""

        def collect(store: Store, path: str) -> list[tuple[str, Meta]]:
            prefix = path.rstrip("/") + "/" if path else ""
            rows = (row for batch in store.list_objects(path) for row in batch.to_pylist())
            return [
                (row["path"].removeprefix(prefix), Meta(row["size"], row["etag"], row["last_modified"])) for row in rows
            ]

        return sorted(self.stores.call("list", self.uri, collect), key=lambda entry: entry[0])

    def list_objects(self) -> Iterator[pa.RecordBatch]:
        """Yield all objects below this folder as `STORE_LISTING`. A failure after the first batch is not retried here."""
        with guarded("list", self.uri):
            store, path = self.stores.resolve(self.uri)
            yield from store.list_objects(path)

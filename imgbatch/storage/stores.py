"""Effects: stores by URI: which store a URI lies in, retries, and errors that name the operation and the URI.

A URI is what `fsspec.url_to_fs` takes, not percent-encoded; a local one is the absolute path without `file://`.
"""

from __future__ import annotations

import logging
import os
import re
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
    closest,
)
from imgbatch.storage import s3
from imgbatch.storage.base import Meta, Store, require_listed_size
from imgbatch.storage.error_mapping import guarded
from imgbatch.storage.file_objects import Ranges, Stream
from imgbatch.storage.fsspec_store import Other
from imgbatch.storage.local import LocalStore
from imgbatch.storage.retry import backoff

__all__ = ["Folder", "Meta", "Stores", "absolute", "is_local", "join", "scheme"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_S3 = ("s3", "s3a")
_BUCKETS = (*_S3, "gs", "gcs", "az", "abfs")
_WEB = ("http", "https")
_SAID_AFTER = 4  # failures: some 5 s
_MOST_CONFLICTS = 1000
# S3's own rule, and what older buckets and other servers have. obstore puts the name into the address of a signed request:
# anything else in it, such as the # of s3://evil.org#/x, would lead that astray.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")

_PROTOCOL = re.compile(r"([A-Za-z0-9+.-]+(?:::[A-Za-z0-9+.-]+)*)://")


def _parts(uri: str) -> tuple[str, str]:
    found = _PROTOCOL.match(uri)
    return (found[1], uri[found.end() :]) if found else ("", uri)


def scheme(uri: str) -> str:
    """Return what stands before `://`; `file` for a path of this machine.

    >>> scheme("s3://b/x"), scheme("/data/x"), scheme("simplecache::s3://b/x")
    ('s3', 'file', 'simplecache::s3')
    """
    return "file" if is_local(uri) else _parts(uri)[0]


def is_local(uri: str) -> bool:
    """Return whether a URI names a file of this machine."""
    return _parts(uri)[0] in ("", "file", "local")


def absolute(uri: str) -> str:
    """Return a URI as tables hold it: local paths absolute and without a scheme, no slash at the end.

    >>> absolute("s3://bucket/photos/"), absolute("file:///data/a.jpg")
    ('s3://bucket/photos', '/data/a.jpg')
    """
    protocol, rest = _parts(uri)
    if is_local(uri):
        return os.path.abspath(os.path.expanduser(rest))
    return f"{protocol}://{rest.rstrip('/')}"


def absent(uri: str) -> str | None:
    """Return what to say of a local path that does not exist, with what may be meant; None: it exists, or is elsewhere.

    In an object store nothing exists but objects, so that only a listing can say that there are none.
    """
    if not is_local(uri) or os.path.lexists(path := absolute(uri)):
        return None
    parent, name = os.path.split(path)
    if not os.path.isdir(parent):
        above = parent
        while above != os.path.dirname(above) and not os.path.isdir(above):
            above = os.path.dirname(above)
        return f"{path} does not exist; of its path there is {above}"
    try:
        similar = closest(name, sorted(os.listdir(parent)))
    except OSError:  # the message is fine without it
        similar = None
    return f"{path} does not exist" + (f"; did you mean {os.path.join(parent, similar)}?" if similar else "")


def join(folder: str, name: str) -> str:
    """Return the URI of `name` in `folder`; a name that is a URI or an absolute path stands for itself.

    >>> join("s3://b/lists", "cats/1.jpg"), join("/data", "/other/2.jpg"), join("s3://b/lists", "../3.jpg")
    ('s3://b/lists/cats/1.jpg', '/other/2.jpg', 's3://b/3.jpg')
    """
    if _parts(name)[0] or name.startswith("/"):
        return absolute(name)
    protocol, base = _parts(folder)
    whole = f"{base.rstrip('/')}/{name}"
    if not protocol:
        return os.path.abspath(whole)
    if {".", ".."} & set(name.split("/")):  # elsewhere a//b is another name than a/b
        whole = os.path.normpath(whole)
    return f"{protocol}://{whole}"


class Stores:
    """All stores of a run, opened when first needed. It travels to the workers, where each process opens its own.

    Options and the credentials that the driver's environment holds travel along, since the environment itself does not
    reach the workers of a running cluster; they are in no task argument that Ray shows, and in no representation.
    """

    def __init__(self, config: StorageConfig, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._config = config
        self._environment = {name: environment[name] for name in s3.ENVIRONMENT if name in environment}
        self._open: dict[tuple[str, str], Store] = {}

    def __repr__(self) -> str:
        return f"Stores({sorted(self._config.options)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_config": self._config, "_environment": self._environment, "_open": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def resolve(self, uri: str, *, plain: bool = False) -> tuple[Store, str]:
        """Return the store of a URI and the path in it; with `plain`, always fsspec's own.

        Raises:
            BadPath: the URI chains file systems (`::`), or names no bucket.
            ConfigError: fsspec has no such file system, or its package is not installed.
        """
        protocol, rest = _parts(uri)
        bucket = rest.partition("/")[0]
        if "::" in protocol:
            raise BadPath(f"{uri}: chained file systems are not read")
        if protocol in _BUCKETS and not bucket:
            raise BadPath(f"{uri} names no bucket")
        if protocol in _S3 and not _BUCKET.fullmatch(bucket):
            raise BadPath(f"{uri}: {bucket!r} is no name of a bucket")
        key = ("" if is_local(uri) else protocol, bucket if protocol in _S3 and not plain else "")
        if key not in self._open:
            self._open[key] = self._make(*key)
        store = self._open[key]
        return store, store.path(uri)

    def read(self, uri: str, limit: int | None = None, known: Meta | None = None) -> tuple[bytes, Meta]:
        """Return an object's bytes and what was read. `known` is what was listed: a body of another length is no body.

        Raises:
            StoreError: as `call`; BadPath for a protocol that does not exist, which is the fault of one row of a manifest.
        """

        def whole(store: Store, path: str) -> tuple[bytes, Meta]:
            data, read = store.read(path, limit)
            if known is not None:
                require_listed_size(uri, len(data), read, known)
            return data, read

        try:
            return self.call("read", uri, whole)
        except ConfigError as error:
            if isinstance(error.__cause__, ValueError):
                raise BadPath(f"read {uri}: {error}") from error
            raise

    @contextmanager
    def open(self, uri: str) -> Iterator[BinaryIO]:
        """Open an object as a stream, through fsspec where it is not local."""
        with guarded("open", uri):
            store, path = self.resolve(uri, plain=True)
            assert isinstance(store, LocalStore | Other)
            with store.open(path) as file:
                yield file

    def ranges(self, uri: str, meta: Meta) -> BinaryIO:
        """Return an object of a known size as a file, of which only what is read is fetched: one request a read."""
        return Ranges(self, uri, meta)  # type: ignore[return-value]

    def stream(self, uri: str, meta: Meta, start: int = 0) -> Stream:
        """Return an object of a known size, to be read forward from a position on, in one request."""
        return Stream(self, uri, meta, start, self._config.retries)

    def call(self, operation: str, uri: str, action: Callable[[Store, str], T]) -> T:
        """Run `action(store, path)`, again after passing failures, with exponential back-off and full jitter.

        Raises:
            StoreError: naming operation and URI; its `attempts` attribute says how often it was tried.
        """
        attempt, plain = 1, False
        while True:
            try:
                with guarded(operation, uri):
                    return action(*self.resolve(uri, plain=plain))
            except BadPath:
                if plain or _parts(uri)[0] not in _S3:
                    raise
                plain = True  # a key that obstore refuses; s3fs takes it
                continue
            except StoreError as error:
                error.attempts = attempt
                if not isinstance(error, Unreachable | TimedOut) or attempt > self._config.retries:
                    raise
                if attempt == (1 if isinstance(error, TimedOut) else _SAID_AFTER):
                    log.warning("%s; trying again up to %d times", error, self._config.retries - attempt)
            time.sleep(backoff(attempt))
            attempt += 1

    def _make(self, protocol: str, bucket: str) -> Store:
        if protocol == "":
            return LocalStore()
        options: Mapping[str, Any] = self._config.options
        if protocol in _S3:
            flat = s3.settings(options, self._environment)
            if flat is not None and bucket:
                return s3.S3(bucket, flat, self._config.timeout_s, self._config.retries)
            options = options if flat is None else s3.for_s3fs(flat)
        try:
            if protocol in _WEB:  # without the options: a bucket's credentials are none of a web server's business
                from imgbatch.storage.http import Web

                return Web(protocol, self._config.timeout_s, private_hosts=self._config.allow_private_hosts)
            return Other(protocol, options, self._config.timeout_s)
        except (ValueError, ImportError, TypeError) as error:
            raise ConfigError(f"{protocol}://: {error}; see storage.options") from error


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in a store, and the objects in it by their names below it."""

    stores: Stores
    uri: str

    @property
    def conditional(self) -> bool:
        """Whether two writers here can never both create, or replace, one object."""
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
        """Return the content of an object and the tag that `replace` wants."""
        return self.stores.call("read", self.at(name), lambda store, path: store.read_tagged(path))

    def create(self, name: str, data: bytes) -> None:
        """Write an object that must not exist yet; Exists if it does."""
        self.stores.call("create", self.at(name), lambda store, path: store.create(path, data))

    def put(self, name: str, data: bytes) -> None:
        """Write an object, over an existing one if there is one."""
        self.stores.call("write", self.at(name), lambda store, path: store.put(path, data))

    def replace(self, name: str, data: bytes, tag: str | None) -> None:
        """Write over an object that has not changed since; Conflict if it has."""
        self.stores.call("replace", self.at(name), lambda store, path: store.replace(path, data, tag))

    def change(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Write what `change` makes of an object, None if it is not there; of the newer one, if another writer is first.

        Raises:
            OutputError: others were first, again and again.
        """
        for _ in range(_MOST_CONFLICTS):
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
        """Remove an object; one that is not there is no error. With the tag of `read_tagged` only that version of it, where
        the store can check that; Conflict if there is another one."""
        self.stores.call("delete", self.at(name), lambda store, path: store.delete(path, tag))

    def exists(self, name: str) -> bool:
        """Return whether an object of that name is there."""
        try:
            self.stores.call("look at", self.at(name), lambda store, path: store.head(path))
        except NotFound:
            return False
        return True

    def folders(self, name: str = "") -> list[str]:
        """Return the names of the folders directly below `name`."""
        return self.stores.call("list", self.at(name), lambda store, path: store.folders(path))

    def names(self, name: str = "") -> list[str]:
        """Return the names of all objects below the folder `name`, relative to it; for folders of parts, not of images."""
        uri = self.at(name)

        def collect(store: Store, path: str) -> list[str]:
            prefix = path.rstrip("/") + "/" if path else ""
            return [
                found.removeprefix(prefix) for batch in store.list_objects(path) for found in batch["path"].to_pylist()
            ]

        return sorted(self.stores.call("list", uri, collect))

    def list_objects(self) -> Iterator[pa.RecordBatch]:
        """Yield everything below this folder as `FOUND` batches; a failure in mid-listing is not retried here."""
        with guarded("list", self.uri):
            store, path = self.stores.resolve(self.uri)
            yield from store.list_objects(path)

"""Files of this machine, or of a file system that all nodes mount."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from imgbatch.errors import BadPath, NotFound, StoreError, TooLarge
from imgbatch.storage.base import FOUND, Meta

_BATCH = 10_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class LocalStore:
    """The local file system. A name appears with its whole content or not at all; creation is exclusive by hard link."""

    conditional = True

    def path(self, uri: str) -> str:
        """Return the path of a URI."""
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://").removeprefix("local://")))

    def uri(self, path: str) -> str:
        """Return the path itself: tables hold local files without a scheme."""
        return path

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return the content; anything but a regular file is refused, since a FIFO would never end."""
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BadPath(f"read {path}: not a regular file")
            if limit is not None and status.st_size > limit:
                raise TooLarge(f"read {path}: {status.st_size} bytes are more than {limit}")
            return file.readall(), _meta(status)

    def open(self, path: str) -> BinaryIO:
        """Return the file, to be read as a stream."""
        return open(path, "rb")

    def head(self, path: str) -> Meta:
        """Return what is known of a file; a folder is not found."""
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise NotFound(f"{path} is not a regular file")
        return _meta(status)

    def found(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the regular files below `path`, in the order of their names; a folder that cannot be read is an error.

        Links are followed, but never into a folder that contains them.
        """
        if not os.path.lexists(path):  # as in an object store, a folder is there once something is in it
            return
        names: list[str] = []
        statuses: list[os.stat_result] = []
        for name, status in _walk(path, frozenset()):
            names.append(name)
            statuses.append(status)
            if len(names) == _BATCH:
                yield _batch(names, statuses)
                names, statuses = [], []
        if names:
            yield _batch(names, statuses)

    def folders(self, path: str) -> list[str]:
        """Return the names of the folders directly below `path`."""
        with suppress(FileNotFoundError):
            return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        return []

    def create(self, path: str, data: bytes) -> None:
        """Write a new file; an existing one of that name is left as it is and raises FileExistsError."""
        temporary = _write_beside(path, data)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise StoreError(
                    f"create {path}: this file system has no hard links, without which a part cannot be created "
                    "exactly once; write to another file system or to an object store"
                ) from error
            raise
        finally:
            os.unlink(temporary)
        _sync_folder(path)

    def put(self, path: str, data: bytes) -> None:
        """Write a file, over an existing one if there is one."""
        os.replace(_write_beside(path, data), path)
        _sync_folder(path)

    def replace(self, path: str, data: bytes, etag: str | None) -> None:
        """Write a file over an existing one."""
        self.put(path, data)

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""
        Path(path).unlink(missing_ok=True)


def _write_beside(path: str, data: bytes) -> str:
    """Write `data` durably under a temporary name in the folder of `path` that no reader of *.parquet takes up."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary


def _sync_folder(path: str) -> None:
    handle = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk(path: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.stat_result]]:
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(path) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        try:
            status = entry.stat()
        except FileNotFoundError:  # gone since, or a link to nothing
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(entry.path, above | {identity})
        elif stat.S_ISREG(status.st_mode):
            yield entry.path, status


def _meta(status: os.stat_result) -> Meta:
    modified = _EPOCH + timedelta(microseconds=status.st_mtime_ns // 1000)
    return Meta(size=status.st_size, etag=None, last_modified=modified)


def _batch(names: list[str], statuses: list[os.stat_result]) -> pa.RecordBatch:
    # A name that is not UTF-8 is kept readable; reading it fails, which makes it a reject instead of a loss.
    readable = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
    return pa.record_batch(
        [
            pa.array(readable, pa.string()),
            pa.array([status.st_size for status in statuses], pa.int64()),
            pa.nulls(len(names), pa.string()),
            pa.array([status.st_mtime_ns // 1000 for status in statuses], pa.int64()).cast(FOUND.field(3).type),
        ],
        schema=FOUND,
    )

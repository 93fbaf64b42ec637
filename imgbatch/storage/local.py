"""Effects: files of this machine, or of a file system that all nodes mount."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import BadPath, Conflict, NotFound, StoreError, TimedOut, TooLarge
from imgbatch.storage.base import EARLIEST, LATEST, STORE_LISTING, Meta, to_datetime
from imgbatch.storage.local_names import explained, readable
from imgbatch.storage.local_walk import walk

_BATCH = 10_000
_LOCK_S = 30.0
_STREAMED = 1 << 20


class LocalStore:
    """The local file system. Writes are atomic: a file appears with its whole content. Creation is exclusive, by hard link."""

    conditional = True

    def path(self, uri: str) -> str:
        """Return the path of a URI."""
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://").removeprefix("local://")))

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return the content. Only regular files are read: a FIFO would never end."""
        with explained("read", path):
            data, status = _read(path, limit)
        return data, _meta(status)

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        """Return the content and a tag that a file which replaces this one does not have."""
        data, status = _read(path, None)
        return data, _tag(status)

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return a range of bytes; files have no ETags."""
        with explained("read", path), open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the content of the file from a position on."""
        with explained("read", path):
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        with file:
            file.seek(start)
            while data := file.read(_STREAMED):
                yield data

    def open(self, path: str) -> BinaryIO:
        """Open the file as a stream."""
        with explained("open", path):
            return open(path, "rb")

    def head(self, path: str) -> Meta:
        """Return the metadata of a file; NotFound for a folder."""
        with explained("look at", path):
            status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise NotFound(f"{path} is not a regular file")
        return _meta(status)

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the regular files below `path`, in the order of their names.

        Links are followed, but never into a folder that contains them. A broken link is listed without size and time, so
        that reading it reports that its target is missing.

        Raises:
            InputError: too many links lead into one folder.
            OSError: a folder cannot be read.
        """
        if not os.path.lexists(path):  # as in an object store, a missing folder is an empty one
            return
        names: list[bytes] = []
        statuses: list[os.stat_result | None] = []
        with explained("list", path):
            entries = walk(os.fsencode(path))
        for name, status in entries:
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
            entries = [entry.name for entry in os.scandir(os.fsencode(path)) if entry.is_dir()]
            return sorted(readable(name) for name in entries)
        return []

    def create(self, path: str, data: bytes) -> None:
        """Write a new file; FileExistsError if the name exists, and the existing file stays as it is."""
        temporary = _write_temporary(path, data)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise StoreError(
                    f"create {path}: this file system has no hard links, so that a part cannot be created exactly once. "
                    "Write to another file system or to an object store"
                ) from error
            raise
        finally:
            os.unlink(temporary)
        _sync_folder(path)

    def put(self, path: str, data: bytes) -> None:
        """Write a file, whether it exists or not."""
        os.replace(_write_temporary(path, data), path)
        _sync_folder(path)

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Replace a file; Conflict if it no longer has this tag."""
        os.stat(path)  # fails if the file is gone: `_write_temporary` would create its deleted folder again
        temporary = _write_temporary(path, data)
        try:
            with _locked(os.path.dirname(path)):
                if _tag(os.stat(path)) != tag:
                    raise Conflict(f"replace {path}: another writer has replaced it")
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path)

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove a file; a missing file is no error. With a tag only that version of it."""
        if tag is None:
            return Path(path).unlink(missing_ok=True)
        with suppress(FileNotFoundError), _locked(os.path.dirname(path)):
            if _tag(os.stat(path)) != tag:
                raise Conflict(f"delete {path}: another writer has replaced it")
            os.unlink(path)
        return None


def _read(path: str, limit: int | None) -> tuple[bytes, os.stat_result]:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb", buffering=0) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BadPath(f"read {path}: not a regular file")
        if limit is not None and status.st_size > limit:
            raise TooLarge(f"read {path}: {status.st_size} bytes are more than {limit}")
        return file.readall(), status


def _tag(status: os.stat_result) -> str:
    return f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold an exclusive lock on a folder, so that comparing a tag and replacing the file are one step.

    The system releases the lock when the process ends. Some network file systems have no such locks. There, another writer
    can replace the file between the comparison and the replacement.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_S
        with suppress(OSError):
            while not _try_lock(handle):
                if time.monotonic() > deadline:
                    raise TimedOut(f"lock {folder}: another process has held it for {_LOCK_S:.0f} s")
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_temporary(path: str, data: bytes) -> str:
    """Write `data` durably to a temporary file in the folder of `path`, under a name that no reader of *.parquet matches."""
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
    handle = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # errors of file systems that cannot sync a folder
            raise
    finally:
        os.close(handle)


def _meta(status: os.stat_result) -> Meta:
    return Meta(size=status.st_size, etag=None, last_modified=to_datetime(status.st_mtime_ns // 1000))


def _batch(names: list[bytes], statuses: list[os.stat_result | None]) -> pa.RecordBatch:
    sizes = [None if status is None else status.st_size for status in statuses]
    times = pa.array([None if status is None else status.st_mtime_ns // 1000 for status in statuses], pa.int64())
    valid = pc.and_(pc.greater_equal(times, EARLIEST), pc.less_equal(times, LATEST))
    return pa.record_batch(
        [
            pa.array([readable(name) for name in names], pa.string()),
            pa.array(sizes, pa.int64()),
            pa.nulls(len(names), pa.string()),
            pc.if_else(valid, times, None).cast(STORE_LISTING.field(3).type),
        ],
        schema=STORE_LISTING,
    )

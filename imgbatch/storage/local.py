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
from imgbatch.storage.base import EARLIEST, FOUND, LATEST, Meta, moment
from imgbatch.storage.local_names import explained, readable
from imgbatch.storage.local_walk import walk

_BATCH = 10_000
_LOCK_S = 30.0
_STREAMED = 1 << 20


class LocalStore:
    """The local file system. A name appears with its whole content or not at all; creation is exclusive by hard link."""

    conditional = True

    def path(self, uri: str) -> str:
        """Return the path of a URI."""
        return os.path.abspath(os.path.expanduser(uri.removeprefix("file://").removeprefix("local://")))

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return the content; anything but a regular file is refused, since a FIFO would never end."""
        with explained("read", path):
            data, status = _read(path, limit)
        return data, _meta(status)

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        """Return the content and what tells this file from the one that may take its place."""
        data, status = _read(path, None)
        return data, _tag(status)

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return some bytes of the file; files have no ETags."""
        with explained("read", path), open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the bytes of the file from a position on."""
        with explained("read", path):
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
        with file:
            file.seek(start)
            while data := file.read(_STREAMED):
                yield data

    def open(self, path: str) -> BinaryIO:
        """Return the file, to be read as a stream."""
        with explained("open", path):
            return open(path, "rb")

    def head(self, path: str) -> Meta:
        """Return what is known of a file; a folder is not found."""
        with explained("look at", path):
            status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise NotFound(f"{path} is not a regular file")
        return _meta(status)

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the regular files below `path`, in the order of their names; a folder that cannot be read is an error.

        Links are followed, but never into a folder that contains them. One whose target is not there is listed, with
        neither size nor time: reading it tells that it leads nowhere.

        Raises:
            InputError: too many links lead into one folder.
        """
        if not os.path.lexists(path):  # as in an object store, a folder is there once something is in it
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

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Write a file over one that is still the version with this tag; Conflict if it is not."""
        os.stat(path)  # or `_write_beside` would make folders that were deleted again
        temporary = _write_beside(path, data)
        try:
            with _alone_in(os.path.dirname(path)):
                if _tag(os.stat(path)) != tag:
                    raise Conflict(f"replace {path}: another writer has replaced it")
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path)

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove a file; one that is not there is no error. With a tag only that version of it."""
        if tag is None:
            return Path(path).unlink(missing_ok=True)
        with suppress(FileNotFoundError), _alone_in(os.path.dirname(path)):
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
def _alone_in(folder: str) -> Iterator[None]:
    """Let one writer at a time compare and replace in a folder. The lock goes with its process, however that ends.

    A file system without such locks (some of those that come over a network) leaves the moment between comparing and
    replacing open.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ends = time.monotonic() + _LOCK_S
        with suppress(OSError):
            while not _locked(handle):
                if time.monotonic() > ends:
                    raise TimedOut(f"lock {folder}: another process has held it for {_LOCK_S:.0f} s")
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
    handle = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # so say file systems that cannot sync a folder
            raise
    finally:
        os.close(handle)


def _meta(status: os.stat_result) -> Meta:
    return Meta(size=status.st_size, etag=None, last_modified=moment(status.st_mtime_ns // 1000))


def _batch(names: list[bytes], statuses: list[os.stat_result | None]) -> pa.RecordBatch:
    sizes = [None if status is None else status.st_size for status in statuses]
    times = pa.array([None if status is None else status.st_mtime_ns // 1000 for status in statuses], pa.int64())
    known = pc.and_(pc.greater_equal(times, EARLIEST), pc.less_equal(times, LATEST))
    return pa.record_batch(
        [
            pa.array([readable(name) for name in names], pa.string()),
            pa.array(sizes, pa.int64()),
            pa.nulls(len(names), pa.string()),
            pc.if_else(known, times, None).cast(FOUND.field(3).type),
        ],
        schema=FOUND,
    )

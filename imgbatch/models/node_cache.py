"""Effects: the cache of a node for fetched weights and converted networks, which later runs reuse.

The name of an entry identifies its content. Each entry has digests, in a file beside it or in its name, which are compared
when it is loaded. An entry that is missing, truncated or altered is made again by one process of the node, while the others
wait. An entry is on the disk (fsync) before it gets its name, and has its name before its digests are written.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from imgbatch.errors import Full

log = logging.getLogger(__name__)

_LOCK_S = 900.0  # longer than any entry takes: the process with the lock hangs
_OLD_S = 86_400.0  # incomplete entries of killed processes are removed when they are older
_PARTIAL, _SUMS = ".partial-", ".sums"
_ELSEWHERE = ("/var/tmp", "/dev/shm")  # for private copies, if the folder for temporary files is full
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

_hashed: dict[tuple[str, int, int, int, int], str] = {}
"""Digests by path, device, inode, size and time, so that this process reads each version of a file once."""


def folder() -> Path:
    """Return the folder of the cache, which only this user can write; otherwise a temporary folder of this process."""
    path = Path(tempfile.gettempdir(), f"imgbatch-{os.getuid()}")
    with suppress(OSError):
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if (
            status.st_uid == os.getuid()
            and not status.st_mode & 0o077
            and os.access(path, os.W_OK)
            and not path.is_symlink()
        ):
            return path
    return _private_folder(None)


def get_or_make(
    name: str, make: Callable[[Path], None], *, sha256: str | None = None, rejected_stamp: str | None = None
) -> Path:
    """Return the file or folder `name`. The first process of the node that needs it makes it; the others wait.

    The entry is compared with its digests, and made again if they differ. If the cache cannot be used (its disk is full, it
    belongs to another user, or its lock is never released), this process makes a private copy.

    Args:
        name: identifies the content: equal names mean equal content.
        make: writes the file or folder to the given path.
        sha256: the digest of the content, a file, if it is known beforehand.
        rejected_stamp: the `stamp` of an entry that failed a check; if the entry still has it, it is made again.

    Raises:
        Full: no disk of this node has room for it.
        Exception: any exception of `make`.
    """
    try:
        path = folder() / name
        if rejected_stamp is None and _is_intact(path, sha256):
            return path
        with FileLock(f"{path}.lock", timeout=_LOCK_S):
            if not _is_intact(path, sha256) or (rejected_stamp is not None and stamp(path) == rejected_stamp):
                if path.exists():
                    log.warning("%s is damaged, or gives wrong results: it is made again", path)
                _make(path, make)
        return path
    except Timeout:
        log.warning("%s has been locked for %.0f s: this process makes a private copy", name, _LOCK_S)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        log.warning("%s cannot be cached on this node, this process makes a private copy: %s", name, error)
    return _make_private_copy(name, make)


def stamp(path: Path) -> str:
    """Return an identifier that changes when an entry is made again; empty for an entry without a file of digests."""
    try:
        return str(json.loads(_digest_file(path).read_text())["made"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex. An unchanged file is read once per process."""
    status = path.stat()
    key = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _hashed:
        with path.open("rb") as file:
            _hashed[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashed[key]


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}{_SUMS}")


def _is_intact(path: Path, sha256: str | None) -> bool:
    """Return whether an entry exists and agrees with its digests."""
    try:
        if sha256 is not None:
            return sha256_of(path) == sha256
        record = json.loads(_digest_file(path).read_text())
        return isinstance(record, dict) and bool(record["made"]) and record["files"] == _digests_of(path)
    except (OSError, ValueError, KeyError):
        return False


def _digests_of(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an entry, by its relative path."""
    return {str(file.relative_to(path)): sha256_of(file) for file in sorted(_files(path))}


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    for file in path.rglob("*"):
        if not file.is_dir():
            yield file


def _make(path: Path, make: Callable[[Path], None]) -> None:
    """Make an entry and replace the old one. The caller holds the lock."""
    _remove_old(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_PARTIAL) as partial:
        entry, digests = Path(partial, path.name), Path(partial, _SUMS)
        make(entry)
        digests.write_text(json.dumps({"made": uuid.uuid4().hex, "files": _digests_of(entry)}))
        folders = [folder for folder in (entry, *entry.rglob("*")) if folder.is_dir()]
        for written in (*_files(entry), *folders, digests):
            _sync(written)
        _digest_file(path).unlink(missing_ok=True)  # first: an entry without digests is not used
        _remove(path)
        entry.rename(path)
        _sync(path.parent)
        digests.rename(_digest_file(path))
        _sync(path.parent)


def _make_private_copy(name: str, make: Callable[[Path], None]) -> Path:
    """Return a private copy, deleted when this process ends, on the first disk with room."""
    last_error: OSError | None = None
    for parent in (None, *_ELSEWHERE):
        try:
            path = _private_folder(parent) / name
            make(path)
            return path
        except OSError as error:
            if error.errno not in _DISK:
                raise
            last_error = error
    raise Full(
        f"no disk of this node has room for {name}: {last_error}; tried {tempfile.gettempdir()} (TMPDIR), "
        f"{', '.join(_ELSEWHERE)}"
    )


def _private_folder(parent: str | None) -> Path:
    path = Path(tempfile.mkdtemp(prefix="imgbatch-", dir=parent))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_old(folder: Path) -> None:
    """Remove incomplete entries of processes that were killed."""
    for path in folder.glob(f"{_PARTIAL}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD_S:
                _remove(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder raise these
            raise
    finally:
        os.close(handle)

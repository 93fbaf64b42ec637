"""Effects: files that a node keeps between runs: fetched weights and converted networks, under names that say what is in them.

Nothing in it is used unread: every entry has digests beside it, or in its name, which are compared when it is loaded. What
is missing, cut off or altered is made again, by one process of the node while the others wait. An entry is on the disk
(fsync) before it has its name, and has its name before its digests are there.
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

_LOCK_S = 900.0  # longer than any entry takes to make: its maker has stopped, and does not let go
_OLD_S = 86_400.0  # what a killed process left half made is removed after so long
_PARTIAL, _SUMS = ".partial-", ".sums"
_ELSEWHERE = ("/var/tmp", "/dev/shm")  # where an entry goes that has no room in the folder for temporary files
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

_hashed: dict[tuple[str, int, int, int, int], str] = {}
"""What this process has hashed, by path, device, inode, size and time: each version of a file is read once."""


def folder() -> Path:
    """Return the folder, which belongs to this user alone; a fresh one that is not kept where that cannot be had."""
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
    """Return the file or folder `name`, made by the first process of the node that wants it; the others wait for it.

    It is compared with its digests, and made again if it is not what was made. Where the cache takes nothing (its disk is
    full, it belongs to somebody else, its lock is never let go) this process gets a copy of its own.

    Args:
        name: must tell what is to be made: the same name, the same content.
        make: makes the path that it is given.
        sha256: of the content, a file, where that is known beforehand.
        rejected_stamp: the `stamp` of an entry that proved useless; if it is still that one, it is made again.

    Raises:
        Full: no disk of this node has room for it.
        Exception: whatever `make` raises.
    """
    try:
        path = folder() / name
        if rejected_stamp is None and _is_sound(path, sha256):
            return path
        with FileLock(f"{path}.lock", timeout=_LOCK_S):
            if not _is_sound(path, sha256) or (rejected_stamp is not None and stamp(path) == rejected_stamp):
                if path.exists():
                    log.warning("%s is damaged, or gives wrong answers: it is made again", path)
                _make(path, make)
        return path
    except Timeout:
        log.warning("%s has been locked for %.0f s: this process makes a copy of its own", name, _LOCK_S)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        log.warning("%s cannot be kept on this node, this process makes a copy of its own: %s", name, error)
    return _make_private_copy(name, make)


def stamp(path: Path) -> str:
    """Return what tells one making of an entry from the next; nothing for an entry without digests beside it."""
    try:
        return str(json.loads(_digest_file(path).read_text())["made"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex; a file that has not changed is read once a process."""
    status = path.stat()
    key = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _hashed:
        with path.open("rb") as file:
            _hashed[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashed[key]


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}{_SUMS}")


def _is_sound(path: Path, sha256: str | None) -> bool:
    """Return whether an entry is there and is what was made."""
    try:
        if sha256 is not None:
            return sha256_of(path) == sha256
        told = json.loads(_digest_file(path).read_text())
        return isinstance(told, dict) and bool(told["made"]) and told["files"] == _digests_of(path)
    except (OSError, ValueError, KeyError):
        return False


def _digests_of(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of an entry, by its name within it."""
    return {str(file.relative_to(path)): sha256_of(file) for file in sorted(_files(path))}


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
    for file in path.rglob("*"):
        if not file.is_dir():
            yield file


def _make(path: Path, make: Callable[[Path], None]) -> None:
    """Make an entry in the place of what is there; the lock is ours."""
    _remove_old(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_PARTIAL) as partial:
        made, sums = Path(partial, path.name), Path(partial, _SUMS)
        make(made)
        sums.write_text(json.dumps({"made": uuid.uuid4().hex, "files": _digests_of(made)}))
        for each in (*_files(made), *(each for each in (made, *made.rglob("*")) if each.is_dir()), sums):
            _sync(each)
        _digest_file(path).unlink(missing_ok=True)  # first: without it the entry does not count
        _remove(path)
        made.rename(path)
        _sync(path.parent)
        sums.rename(_digest_file(path))
        _sync(path.parent)


def _make_private_copy(name: str, make: Callable[[Path], None]) -> Path:
    """Return a copy that goes with this process, on the first disk that has room."""
    said: OSError | None = None
    for place in (None, *_ELSEWHERE):
        try:
            path = _private_folder(place) / name
            make(path)
            return path
        except OSError as error:
            if error.errno not in _DISK:
                raise
            said = error
    raise Full(
        f"no disk of this node has room for {name}: {said}; tried {tempfile.gettempdir()} (TMPDIR), {', '.join(_ELSEWHERE)}"
    )


def _private_folder(place: str | None) -> Path:
    path = Path(tempfile.mkdtemp(prefix="imgbatch-", dir=place))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_old(place: Path) -> None:
    """Remove what processes have left that were killed while they made an entry."""
    for path in place.glob(f"{_PARTIAL}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD_S:
                _remove(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # so say file systems that cannot sync a folder
            raise
    finally:
        os.close(handle)

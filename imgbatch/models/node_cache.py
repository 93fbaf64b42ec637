"""Files that a node keeps between runs: fetched weights and converted networks, under names that say what is in them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock


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
    return Path(tempfile.mkdtemp(prefix="imgbatch-"))


def once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the file or folder `name`, made by the first process of the node that wants it; the others wait for it.

    Args:
        name: must tell the content, since what is there is taken as it is.
        make: makes the path that it is given; it appears under its name when it is whole.
    """
    path = folder() / name
    if not path.exists():
        with FileLock(f"{path}.lock"):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial:
                    made = Path(partial, name)
                    make(made)
                    made.rename(path)
    return path

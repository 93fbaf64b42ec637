"""Effects: this process: its exit, its children, and memory that is returned to the operating system."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_MAX_INT = 2**31 - 1
_LAST_CALL_S = 0.5  # stderr may be a pipe that nobody reads
_last_calls: list[Callable[[int], object]] = []


@contextmanager
def before_immediate_exit(call: Callable[[int], object]) -> Iterator[None]:
    """Within the block, have `exit_immediately` make `call` with the exit code, in another thread, for at most 0.5 s."""
    _last_calls.append(call)
    try:
        yield
    finally:
        _last_calls.remove(call)


def exit_process(code: int) -> NoReturn:
    """Exit with a code. After a failure exit immediately, with all children: threads and Ray may still be working."""
    if code:
        logging.disable()  # the error must stay the last line; threads that are interrupted would log more
        sys.stdout.flush()
        sys.stderr.flush()
        exit_immediately(code)
    sys.exit(code)


def exit_immediately(code: int) -> NoReturn:
    """Exit with all children, without waiting for any thread."""
    _kill_children()
    for call in _last_calls[-1:]:
        thread = threading.Thread(target=call, args=(code,), daemon=True)
        thread.start()
        thread.join(_LAST_CALL_S)
    os._exit(code)


def _kill_children() -> None:
    """Kill a local Ray cluster of this process; the agents of one that was still starting would survive for a minute."""
    # All children are suspended first. Otherwise one could start another while they are killed one by one.
    for end in (psutil.Process.suspend, psutil.Process.kill):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                end(child)


def module_command(module: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs a module of this package in a child process, and its environment.

    The child imports from where this process does, but not from the working directory, where a file may have the name of a
    module (-P).
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return [sys.executable, "-P", "-m", module], environment


def release_memory() -> None:
    """Collect garbage and return free memory to the system before the next stage allocates its own."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Return memory that is already free to the system. Takes some milliseconds."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for later allocations of this process, instead of returning it to the system.

    A training step allocates and frees the same large tensors again and again. Above its threshold for mmap glibc maps and
    clears their pages each time (mallopt(3)). Nothing happens with another allocator.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _MAX_INT)


def restart_in_utf8_mode() -> None:
    """Restart this process in Python's UTF-8 mode unless its locale uses UTF-8, as names in stores and tables do."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONUTF8": "1"})

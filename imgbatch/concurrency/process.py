"""Effects: this process: its exit, its children, and memory that is returned to the operating system."""

from __future__ import annotations

import gc
import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

import psutil


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


def restart_in_utf8_mode() -> None:
    """Restart this process in Python's UTF-8 mode unless its locale uses UTF-8, as names in stores and tables do."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONUTF8": "1"})

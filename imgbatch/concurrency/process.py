"""Effects: this process: how it ends together with what it has started, and memory given back to the system."""

from __future__ import annotations

import gc
import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

import psutil
import pyarrow as pa


def leave(code: int) -> NoReturn:
    """End the process; where it failed at once, and with what it has started: threads and Ray may still be at work."""
    if code:
        logging.disable()  # the error was the last line; threads that are cut off have nothing to add
        sys.stdout.flush()
        sys.stderr.flush()
        leave_at_once(code)
    sys.exit(code)


def leave_at_once(code: int) -> NoReturn:
    """End the process and what it has started, whatever its threads wait for."""
    _end_children()
    os._exit(code)


def _end_children() -> None:
    """End a Ray of this machine's own; the agents of one that was still starting would outlive this process by a minute."""
    for end in (psutil.Process.suspend, psutil.Process.kill):  # first at rest, or one starts another in between
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                end(child)


def release_memory() -> None:
    """Give back to the system what an ended stage has freed, so that the next one does not stand on top of it."""
    gc.collect()
    release_freed()


def release_freed() -> None:
    """Give back to the system the memory that is free already: some milliseconds."""
    pa.default_memory_pool().release_unused()


def restart_in_utf8_mode() -> None:
    """Start this process again in Python's UTF-8 mode, if its locale is another one: names in stores and tables are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONUTF8": "1"})

"""Effects: the process that owns a claim or a run: how it is identified, and whether it is still alive."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_DEAD_STATES = ("Z", "X", "x")
"""States of proc(5). A zombie has ended and waits for its parent, which in a container may never reap it."""


def this_process() -> dict[str, Any]:
    """Return the identity of this process: host, boot, PID namespace, PID and start time."""
    machine = {"host": socket.gethostname(), "boot": _boot(), "processes": _pid_namespace()}
    return {**machine, "pid": os.getpid(), "born": _born(os.getpid())}


def is_alive(owner: Mapping[str, Any]) -> bool | None:
    """Return whether an owner is alive, None if it is (or may be) on another machine.

    A zombie is dead, and so is a process if its PID belongs to another process now.
    """
    # Two containers of a machine may share its name, and a PID has no meaning outside its own namespace.
    this_namespace = (socket.gethostname(), _boot(), _pid_namespace())
    if not _boot() or (owner.get("host"), owner.get("boot"), owner.get("processes")) != this_namespace:
        return None
    return (born := _born(int(owner.get("pid", 0)))) is not None and born == owner.get("born")


def _boot() -> str | None:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None


def _pid_namespace() -> str | None:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _born(pid: int) -> int | None:
    """Return the start time of a live process in the kernel's ticks; None if it does not exist or is a zombie.

    psutil derives the time from the clock of the machine, which may be set in between; the ticks do not change.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in _DEAD_STATES else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None

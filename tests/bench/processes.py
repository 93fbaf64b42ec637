"""Run a command and measure its time, and the CPU and memory of its processes by kind."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
_EVERY_S = 0.25


def watched(command: list[str], name: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command from the project's root, with additional environment variables.

    Returns:
        `name`, `total_s`, and `processes`: for each kind the CPU seconds of all, and the peak RSS of the largest.

    Raises:
        RuntimeError: the command failed.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    usage: dict[int, tuple[str, float, int]] = {}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_EVERY_S):
            _sample(process.pid, usage)

    sampler = threading.Thread(target=sample)
    sampler.start()
    errors = process.communicate()[1]
    total = time.monotonic() - began
    ended.set()
    sampler.join()
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}:\n{errors[-2000:]}")
    kinds: dict[str, dict[str, float]] = {}
    for kind, cpu, memory in usage.values():
        entry = kinds.setdefault(kind, {"cpu_s": 0.0, "peak_mb": 0.0})
        entry["cpu_s"] = round(entry["cpu_s"] + cpu, 1)
        entry["peak_mb"] = max(entry["peak_mb"], round(memory / 1e6))
    return {"name": name, "total_s": round(total, 1), "processes": kinds}


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _sample(root: int, usage: dict[int, tuple[str, float, int]]) -> None:
    try:
        tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info().rss
                kind = "driver" if process.pid == root else _kind(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        previous = usage.get(process.pid, (kind, 0.0, 0))
        usage[process.pid] = (kind, times.user + times.system, max(previous[2], memory))


def _kind(command: str) -> str:
    if "ray::" in command:
        return "workers" if "Map" in command or "submit" in command else "ray"
    return "ray" if "/ray/" in command else "other"

"""Servers of the tests, as processes on ports of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_ENDS_IN_S = 10
_STARTS_IN_S = 60


class PartMissing(Exception):
    """A program that a server needs is not installed on this machine."""


def free_ports(count: int) -> list[int]:
    """Return ports that are not in use; SeaweedFS uses each port plus 10,000 for gRPC as well."""
    free: list[int] = []
    port = 20_000 + os.getpid() % 5_000
    while len(free) < count:
        port += 1
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        free.append(port)
    return free


@contextmanager
def running(
    command: Sequence[str], url: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends, from when it answers at a URL, whatever it answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of its log.
    """
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        if not _answers(process, url):
            raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDS_IN_S)
        process.kill()
        process.wait()


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + _STARTS_IN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.1)
    return False

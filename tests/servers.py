"""Servers of the tests, as processes on ports of their own."""

from __future__ import annotations

import itertools
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_ENDS_IN_S = 10
_STARTS_IN_S = 60
_FIRST_PORT, _END_PORT, _BLOCK = 20_000, 22_750, 250  # plus 10,000: below those of outgoing connections
_locks: list[FileLock] = []
"""The lock of this process's ports. It is released when it is garbage-collected."""


class PartMissing(Exception):
    """A program that a server needs is not installed on this machine."""


@cache
def _ports_of_this_process() -> Iterator[int]:
    """Yield ports that no other test process uses, whether a server listens on them yet or not.

    Each process holds the lock of one block of ports until it ends.
    """
    for block in range(_FIRST_PORT, _END_PORT, _BLOCK):
        lock = FileLock(Path(tempfile.gettempdir()) / f"imgbatch-tests-ports-{block}.lock", blocking=False)
        with suppress(Timeout):
            lock.acquire()
            _locks.append(lock)
            return itertools.cycle(range(block, block + _BLOCK))
    raise RuntimeError("other test processes hold all ports")


def free_ports(count: int) -> list[int]:
    """Return ports that are not in use; SeaweedFS uses each port plus 10,000 for gRPC as well."""
    free: list[int] = []
    for port in _ports_of_this_process():
        if len(free) == count:
            break
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


@contextmanager
def serving_http(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP in threads of this process until the block ends; yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class S3Access:
    """How tests reach a server of S3 beside the program: the environment, and Amazon's own client."""

    endpoint: str
    key: str
    secret: str
    scheme = "s3"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """Return a client of Amazon's own package."""
        import botocore.session

        return botocore.session.get_session().create_client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1",
            aws_access_key_id=self.key, aws_secret_access_key=self.secret,
        )  # fmt: skip

    def write(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object whatever its key is."""
        self.client().put_object(Bucket=bucket, Key=key, Body=data)

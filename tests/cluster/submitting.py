"""What the tests of `imgbatch submit` share: a cluster with a job server and a token, and a connection that can be cut."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, Ended, clean_environment, free_ports

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_PORTS = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")


@dataclass
class Cluster:
    """Two nodes with one CPU each. Their PATH has no Python of this environment, and they have no credentials."""

    dashboard: str
    token: str
    place: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def access(self) -> dict[str, str]:
        """The environment of a submitter: RAY_AUTH_MODE is left out, since it is found out."""
        return {"RAY_AUTH_TOKEN": self.token, "RAY_API_SERVER_ADDRESS": self.dashboard}

    def client(self) -> Any:
        """Return a client of Ray's own.

        It gets the token as a header: Ray reads RAY_AUTH_MODE once in a process, and an earlier test may have started it.
        """
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.dashboard, headers={"Authorization": f"Bearer {self.token}"})

    def kill(self) -> None:
        """Kill all nodes."""
        for process in reversed(self.processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def running(environment: dict[str, str]) -> Iterator[Cluster]:
    """Start a cluster on ports and in a folder of its own.

    Args:
        environment: of its processes, in addition.
    """
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    # Ray puts Unix sockets there, whose names may not be long. Each node has a folder of its own: Ray unpacks a job's package
    # again on each node, and in one folder it would delete the files that the job is importing.
    place = Path(tempfile.mkdtemp(prefix="ib-"))
    cluster = Cluster(f"http://127.0.0.1:{ports['--dashboard-port']}", secrets.token_hex(32), place)
    process_environment = {
        **clean_environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token, "PATH": "/usr/bin:/bin",
        **environment,
    }  # fmt: skip
    process_environment.pop("VIRTUAL_ENV", None)
    head = [*(f"{name}={port}" for name, port in ports.items()), "--head", f"--temp-dir={place}"]
    node = [f"--address=127.0.0.1:{ports['--port']}", f"--temp-dir={place}/2"]
    try:
        for number, options in enumerate((head, node)):
            log = place / f"start-{number}.log"
            command = [*RAY, "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--num-cpus=1"]
            with log.open("w") as file:
                cluster.processes.append(
                    subprocess.Popen(
                        [*command, *options], stdout=file, stderr=file, env=process_environment, start_new_session=True
                    )
                )
            _wait_for_node(cluster.processes[-1], log)
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(place, ignore_errors=True)


def _wait_for_node(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def start(cluster: Cluster, *words: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `imgbatch submit`, in the root of the checkout."""
    environment = {**clean_environment(), **cluster.access, **(env or {})}
    return subprocess.Popen(
        [sys.executable, "jobs/submit.py", *map(str, words)], cwd=ROOT, text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 240) -> Ended:
    """Wait for a process."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{' '.join(process.args)} hangs:\n{out[-3000:]}\n{err[-3000:]}") from None  # type: ignore[arg-type]
    return Ended(process.returncode, out, err)


def finish_all(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for several processes, and read the output of all of them meanwhile."""
    ended: dict[int, Ended] = {}
    threads = [
        threading.Thread(target=lambda number=number, process=process: ended.update({number: finish(process)}))
        for number, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ended[number] for number in range(len(processes))]


class Connection:
    """A TCP proxy before the job server, which can be cut: then it refuses, and open connections end."""

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition("//")[2].partition(":")
        self._target = (host, int(port))
        (self._port,) = free_ports(1)
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._port}"
        self.restore()

    def restore(self) -> None:
        """Accept connections."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse connections, and end those that are open."""
        assert self._listener is not None
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                incoming, _ = listener.accept()
                outgoing = socket.create_connection(self._target)
                self._open += [incoming, outgoing]
                for source, target in ((incoming, outgoing), (outgoing, incoming)):
                    threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait for a condition while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"it ended with {process.returncode}, or too much time has passed:\n{out}\n{err}")
        time.sleep(0.2)

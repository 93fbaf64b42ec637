"""Real servers for the recipes in deploy/ (`make test-deploy`): one Ray head with its job server, and one S3 server.

The tests run in the environment of the jobs. Orchestrators and linters are in `.venv-recipes`, Airflow is in
`.venv-deploy`; both are started as commands.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, clean_environment, free_ports
from tests.weed import S3Server

DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent

_CPUS = 2
_STARTS = 3
_STARTS_IN_S = 120


def missing(what: str) -> None:
    """Skip a test, naming what this machine lacks; where CI runs nothing may be missing."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(
        f"{what} is missing: see make test-deploy in CONTRIBUTING.md"
    )


@dataclass(frozen=True)
class RayHead:
    """A Ray cluster of one node with a job server. Its jobs have the credentials of the S3 server in their environment."""

    address: str
    """Of the control plane: what `RAY_ADDRESS` of a driver is."""
    dashboard: str
    """URL of the job server."""
    token: str
    metrics_port: int
    """Where the node exports its metrics for Prometheus."""
    place: Path
    """Ray's --temp-dir."""

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to use it, such as `imgbatch submit` or `ray job submit`."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_ADDRESS": self.dashboard}

    def request(self, path: str, method: str = "GET", body: object = None) -> Any:
        """Return the answer of the job server as JSON."""
        headers = {"Authorization": f"Bearer {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.dashboard}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def jobs(self) -> list[dict[str, Any]]:
        """Return all submitted jobs, oldest first."""
        submitted = [job for job in self.request("/api/jobs/") if job["submission_id"]]
        return sorted(submitted, key=lambda job: job["start_time"])

    def log(self, submission_id: str) -> str:
        """Return the log of a job."""
        return str(self.request(f"/api/jobs/{submission_id}/logs")["logs"])


@pytest.fixture(scope="session")
def ray_head(s3: S3Server) -> Iterator[RayHead]:
    """Start a head with token authentication, on ports and in a folder of its own."""
    place = Path(tempfile.mkdtemp(prefix="ib-"))  # Ray puts Unix sockets there, whose names may not be long
    try:
        for _ in range(_STARTS):  # a port that was free a moment ago may be taken by now
            process, head = _start(place, s3)
            if _answers(process, head):
                break
            _end(process)
        else:
            raise RuntimeError(f"the Ray head did not start:\n{(place / 'start.log').read_text()[-3000:]}")
        yield head
        _end(process)
    finally:
        shutil.rmtree(place, ignore_errors=True)  # a process that is being killed may still write there


def _start(place: Path, s3: S3Server) -> tuple[subprocess.Popen[bytes], RayHead]:
    names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port",
             "--metrics-export-port")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    head = RayHead(
        address=f"127.0.0.1:{ports['--port']}",
        dashboard=f"http://127.0.0.1:{ports['--dashboard-port']}",
        token=secrets.token_hex(32),
        metrics_port=ports["--metrics-export-port"],
        place=place,
    )
    # Not the script `ray`: its first line names an interpreter, which need not be this one.
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block",
               "--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--temp-dir={place}", f"--num-cpus={_CPUS}",
               "--num-gpus=0", *(f"{name}={port}" for name, port in ports.items())]  # fmt: skip
    environment = {**clean_environment(), **s3.environment, **head.environment,
                   "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    environment.pop("RAY_ADDRESS")
    with (place / "start.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    return process, head


def _answers(process: subprocess.Popen[bytes], head: RayHead) -> bool:
    deadline = time.monotonic() + _STARTS_IN_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):  # refused, or not ready yet
            head.jobs()
            return True
        time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

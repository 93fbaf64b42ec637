"""A GCS that stands still, as on a head node that swaps: no call into Ray keeps a run, and a signal gets through."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import clean_environment, free_ports
from tests.integration import faults, tables
from tests.integration.test_interrupts import wait_for, wait_for_end_of
from tests.unit.pictures import encode, scene

RAY = Path(sys.executable).parent / "ray"
COUNT = 400

Start = Callable[..., "subprocess.Popen[str]"]
Stopped = tuple["subprocess.Popen[str]", Path]
Run = Callable[..., Stopped]

# In the driver: the GCS, its own or that of the cluster, is stopped just before the named call is made.
STOP = """
import psutil
def stopping(original):
    def call(*arguments, **more):
        noted = os.environ["STOPPED"]
        if not os.path.exists(noted):
            own = [each.pid for each in psutil.Process().children(recursive=True) if each.name() == "gcs_server"]
            (pid,) = own or [int(os.environ["GCS"])]
            os.kill(pid, int(os.environ.get("WITH", signal.SIGSTOP)))
            open(noted, "w").close()
        return original(*arguments, **more)
    return call
"""
SLOW = "original = module.decode\nmodule.decode = lambda *a, **k: (time.sleep(0.03), original(*a, **k))[1]\n"
POINTS = {
    "plan": ("imgbatch.engine.placement", "module._node_resources = stopping(module._node_resources)"),
    "request": ("imgbatch.engine.placement", "module._request_resources = stopping(module._request_resources)"),
    "rows": ("imgbatch.pipeline.committer", "module.Committer.commit = stopping(module.Committer.commit)"),
    "dataset": ("imgbatch.engine.dataset", "module.Images.__init__ = stopping(module.Images.__init__)"),
    "end": ("imgbatch.engine.session", "module._end_datasets = stopping(module._end_datasets)"),
    "queue": ("imgbatch.training.ray_train", "module.fit = stopping(module.fit)"),
    "training": ("imgbatch.training.ray_train", "module._follow = stopping(module._follow)"),
}


@dataclass(frozen=True)
class Head:
    """A cluster of one node, of this test's own."""

    environment: dict[str, str]
    gcs: psutil.Process


@pytest.fixture
def head() -> Iterator[Head]:
    """Start a head node; its GCS goes on behind the test, so that it can end."""
    names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    place = Path(tempfile.mkdtemp(prefix="ib-", dir="/tmp"))  # Ray puts Unix sockets there, whose names may not be long
    options = [*(f"{name}={port}" for name, port in ports.items()), "--head", "--node-ip-address=127.0.0.1",
               f"--temp-dir={place}", "--num-cpus=2", "--num-gpus=0", "--include-dashboard=false"]  # fmt: skip
    environment = {**clean_environment(), **token, "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
    log = place / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(RAY), "start", "--block", "--disable-usage-stats", *options],
            stdout=file, stderr=file, env=environment, start_new_session=True,
        )  # fmt: skip
    whole = psutil.Process(process.pid)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), process, 120)  # type: ignore[arg-type]
        (gcs,) = (each for each in whole.children(recursive=True) if each.name() == "gcs_server")
        yield Head({"RAY_ADDRESS": f"127.0.0.1:{ports['--port']}", **token, "GCS": str(gcs.pid)}, gcs)
    finally:
        for each in [*whole.children(recursive=True), whole]:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGCONT)
                each.kill()
        process.wait()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of a few kinds in folders named after two classes."""
    folder = tmp_path_factory.mktemp("images")
    kinds = [encode(scene(seed=number), "JPEG") for number in range(8)]
    for label in ("a", "b"):
        (folder / label).mkdir()
        for number in range(COUNT // 2):
            (folder / label / f"{label}{number:03d}.jpg").write_bytes(kinds[number % len(kinds)])
    return folder


@pytest.fixture
def run(started: Start, images: Path, tiny_model: Path, tmp_path: Path) -> Run:
    """Start a job whose GCS is stopped at a point; return it when that has happened, and its output."""

    def start(point: str, *settings: str, name: str = "classify", more: dict[str, str] | None = None) -> Stopped:
        module, body = POINTS[point]
        output, stopped = tmp_path / "out", tmp_path / "stopped"
        given = [argument for setting in settings for argument in ("--set", setting)]
        model = "--base" if name == "train" else "--model"
        hook = faults.patched(tmp_path / "hook", module, STOP + body, decode=SLOW)
        environment = {**hook, "STOPPED": str(stopped)}
        process = started(
            name, "--input", images, "--output", output, model, tiny_model, *given,
            env={**environment, **(more or {})},
        )  # fmt: skip
        wait_for(stopped.exists, process, 200)
        return process, output

    return start


def require_end(process: subprocess.Popen[str], output: Path, code: int, said: str) -> dict[str, object]:
    """Require that a run ends with this code, says so in its record, and leaves no process behind; return the record."""
    _, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    assert "Traceback" not in err and "SIGTERM received" not in err, err
    assert said in err.rstrip().splitlines()[-1], err
    (record,) = tables.runs(output)
    assert (record["status"], record["exit_code"]) == ("failed" if code == 3 else "interrupted", code)
    wait_for_end_of(process.pid)
    return dict(record)


@pytest.mark.parametrize(
    "point", ["plan", *(pytest.param(point, marks=pytest.mark.long) for point in ("request", "dataset"))]
)
def test_a_gcs_that_stands_still_before_there_are_rows(run: Run, point: str) -> None:
    """A Ray of this machine's own: its GCS is a child of the driver."""
    process, output = run(
        point, "cluster.stall_timeout_s=8", *(["cluster.min_actors=99"] if point == "request" else [])
    )
    said = {
        "plan": "ray.nodes did not return within 8 s",
        "request": "a request for resources to Ray did not return within 8 s",
        "dataset": "not one row for 8 s",
    }
    require_end(process, output, 3, said[point])
    assert not tables.labels(output)


def test_a_signal_while_a_call_into_ray_does_not_return(run: Run) -> None:
    process, output = run("plan")
    time.sleep(1.0)  # the call is under way
    process.terminate()
    require_end(process, output, 143, "stopped by signal 15; run the same command again")


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(None, marks=pytest.mark.long)])
def test_a_gcs_that_stands_still_while_rows_come(run: Run, signum: signal.Signals | None) -> None:
    process, output = run("rows", "cluster.stall_timeout_s=40", "run.commit_interval_s=0.3")
    if signum is not None:
        process.send_signal(signum)
    code, said = (143, "stopped by signal 15; run the same command again") if signum else (3, " 40 s")
    record = require_end(process, output, code, said)
    assert record["counts"]["labelled"] == len(tables.labels(output)) > 0  # type: ignore[index]


@pytest.mark.long
def test_a_gcs_that_is_gone_ends_the_run_in_order(run: Run) -> None:
    """Ray alone would end the driver after 60 s, with 1 and without a word."""
    killed = {"WITH": str(int(signal.SIGKILL))}
    process, output = run("plan", "cluster.stall_timeout_s=90", more=killed)
    require_end(process, output, 3, "ray.nodes did not return within 90 s")


@pytest.mark.long
def test_a_gcs_that_stands_still_at_the_end(run: Run) -> None:
    process, output = run("end", "cluster.stall_timeout_s=40")
    record = require_end(process, output, 3, "ray.shutdown did not return within 40 s")
    assert record["counts"]["labelled"] == len(tables.labels(output)) == COUNT  # type: ignore[index]


@pytest.mark.parametrize("point", ["plan", *(pytest.param(point, marks=pytest.mark.long) for point in ("rows", "end"))])
def test_the_gcs_of_a_cluster_stands_still(run: Run, head: Head, point: str) -> None:
    stall_s = 8 if point == "plan" else 40
    process, output = run(
        point, f"cluster.stall_timeout_s={stall_s}", "run.commit_interval_s=0.3", more=head.environment
    )
    record = require_end(process, output, 3, f" {stall_s} s")
    assert head.gcs.status() == psutil.STATUS_STOPPED
    if point != "plan":
        assert record["counts"]["labelled"] == len(tables.labels(output)) > 0  # type: ignore[index]


@pytest.mark.long
@pytest.mark.parametrize("point", ["plan", "queue", "training"])
def test_a_gcs_that_stands_still_in_training(run: Run, point: str) -> None:
    settings = ("cluster.stall_timeout_s=25", "train.method=finetune", "train.epochs=40")
    process, output = run(point, *settings, name="train")
    require_end(process, output / "_training", 3, " 25 s")


def test_a_ray_that_does_not_start(started: Start, images: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    body = "module._START_TIMEOUT_S = 2.0\nmodule._init = lambda address: time.sleep(600)\n"
    process = started(
        *("classify", "--input", images, "--output", output, "--model", tiny_model),
        env=faults.patched(tmp_path / "stuck", "imgbatch.engine.session", body),
    )
    require_end(process, output, 3, "ray.init did not return within 2 s")

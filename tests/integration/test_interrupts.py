"""Runs that are stopped or fail: rows that reached the driver are committed, and the same command resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Job
from tests.integration import faults, tables
from tests.integration.test_refusals import require_refusal
from tests.unit.pictures import encode, scene

Start = Callable[..., "subprocess.Popen[str]"]

COUNT = 900
SLOW_S = 0.02  # for decoding one image: a run takes 5 s on two actors with two threads each


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 900 small images of 24 kinds."""
    images = tmp_path_factory.mktemp("many")
    kinds = [encode(scene(seed=number), "JPEG") for number in range(24)]
    for number in range(COUNT):
        (images / f"{number:03d}.jpg").write_bytes(kinds[number % len(kinds)])
    return images


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Wait until a condition holds while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.02)


def ray_processes_of(session: int) -> list[int]:
    """Return the live processes of a session, without its leader."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != session:
            try:
                if os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


def wait_for_end_of(session: int, seconds: float = 30) -> None:
    """Wait until all processes of a session have ended: no worker outlives a run."""
    deadline = time.monotonic() + seconds
    while left := ray_processes_of(session):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def require_heeded(process: subprocess.Popen[str], output: Path) -> None:
    """Send SIGTERM to a run without a row: it stops in order, records it, and all its processes end."""
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    (record,) = tables.runs(output)
    assert (record["status"], record["exit_code"]) == ("interrupted", 143)
    wait_for_end_of(process.pid)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_signal_in_the_middle_of_a_run(
    job: Job, warm: Job, started: Start, many: Path, tiny_model: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    output = tmp_path / "out"
    interval = ("--set", "run.commit_interval_s=0.3")
    command = ("classify", "--input", many, "--output", output, "--model", tiny_model, *interval)
    process = started(*command, env=faults.slow_decoding(tmp_path / "slow", SLOW_S))
    wait_for(lambda: list(output.glob("labels/part-*")), process)

    (first,) = tables.runs(output)
    before = tables.parts(output)
    said = require_refusal(job(*command), 7)
    assert first["run_id"] in said and str(process.pid) in said
    assert tables.parts(output).items() >= before.items()
    assert [run["run_id"] for run in tables.runs(output)] == [first["run_id"]], "a refused run leaves no trace"

    # Ctrl-C in a terminal reaches all foreground processes, SIGTERM of an orchestrator only one.
    asked = time.monotonic()
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 128 + signum, err
    assert time.monotonic() - asked < 30
    assert out == "" and "Traceback" not in err
    assert (
        err.rstrip()
        .splitlines()[-1]
        .startswith(f"error: stopped by signal {signum:d}; run the same command again to resume")
    )
    (record,) = tables.runs(output)
    assert (record["status"], record["exit_code"]) == ("interrupted", 128 + signum)
    done = tables.labels(output)
    assert record["counts"]["labelled"] == len(done) and 0 < len(done) < COUNT
    assert not (output / "_SUCCESS").exists()
    report = (output / "runs" / first["run_id"] / "report.html").read_text(encoding="utf-8")
    assert f"stopped by signal {signum:d}" in report and "data:image/webp" not in report
    wait_for_end_of(process.pid)

    ended = warm(*command)
    assert ended.code == 0, ended.err
    assert tables.success(output)["counts"]["already_done"] == len(done)
    tables.require_single(output, [path.name for path in many.iterdir()])
    assert tables.labels(output).items() >= done.items()


def test_signal_before_the_first_row(started: Start, many: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A signal while Ray starts is a stop request as well."""
    output = tmp_path / "out"
    process = started("classify", "--input", many, "--output", output, "--model", tiny_model)
    wait_for(lambda: list(output.glob("runs/*/listing/*")), process)
    time.sleep(1.0)
    require_heeded(process, output)


def test_signal_while_ray_does_not_start(started: Start, many: Path, tiny_model: Path, tmp_path: Path) -> None:
    """On a machine under load, Ray's calls into C++ took a minute, in which Python runs no signal handler."""
    output, starting = tmp_path / "out", tmp_path / "starting"
    body = f"module._init = lambda address: (open({str(starting)!r}, 'w').close(), time.sleep(600))\n"
    process = started(
        *("classify", "--input", many, "--output", output, "--model", tiny_model),
        env=faults.patched(tmp_path / "stuck", "imgbatch.engine.session", body),
    )
    wait_for(starting.exists, process)
    require_heeded(process, output)


@pytest.mark.long
def test_full_disk(job: Job, warm: Job, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """No space left for a part: exit code 3, and the same command resumes later."""
    output = tmp_path / "out"
    body = """
import errno
original = module._write_temporary
def write(path, data):
    if "labels" in path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    return original(path, data)
module._write_temporary = write
"""
    command = ("classify", "--input", folder, "--output", output, "--model", tiny_model)

    ended = job(*command, env=faults.patched(tmp_path / "full", "imgbatch.storage.local", body))

    said = require_refusal(ended, 3)
    assert "No space left on device" in said and str(output) in said
    assert not (output / "_SUCCESS").exists() and not tables.parts(output)
    ended = warm(*command)
    assert ended.code == 0, ended.err
    tables.require_single(output, [path.name for path in folder.iterdir()])

"""Several drivers on one output, as real processes: which one continues, which is refused, and whose `_SUCCESS` remains."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest

from tests.conftest import Job, S3Server
from tests.integration import faults, tables
from tests.integration.test_interrupts import wait_for
from tests.unit.pictures import encode, scene

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.long)])
def place(request: pytest.FixtureRequest, s3: S3Server, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """The URI of an output that does not exist yet, and the environment that it needs."""
    if request.param == "disk":
        return str(tmp_path / "out"), {}
    return f"s3://out/writers/{tmp_path.name}", s3.environment


def local_copy(output: str, s3: S3Server, to: Path) -> Path:
    """Return the output as a folder of this machine."""
    if output.startswith("/"):
        return Path(output)
    return tables.download(s3.bucket("out"), output.removeprefix("s3://out/"), to)


def state_of(process: subprocess.Popen[str]) -> str:
    """Return the state of a process in one letter: T is stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_of_two_drivers_that_start_at_once_one_is_refused(
    started: Start,
    job: Job,
    folder: Path,
    tiny_model: Path,
    tmp_path: Path,
    s3: S3Server,
    place: tuple[str, dict[str, str]],
) -> None:
    output, environment = place
    ready, go = tmp_path / "ready", tmp_path / "go"
    ready.mkdir()
    environment = environment | faults.waiting_for_claims(tmp_path / "together", ready, go)
    command = ("classify", "--input", folder, "--output", output, "--model", tiny_model)
    both = [started(*command, env=environment) for _ in range(2)]
    wait_for(lambda: len(list(ready.iterdir())) == 2, both[0])
    go.touch()
    ended = [(*process.communicate(timeout=180), process.returncode) for process in both]

    assert sorted(code for _, _, code in ended) == [0, 7], ended
    ((out, err, _),) = [each for each in ended if each[2] == 7]
    winner = next(process for process in both if process.returncode == 0)
    assert (
        out == "" and "is being written by run 2" in err and f"process {winner.pid})" in err and "Traceback" not in err
    )
    here = local_copy(output, s3, tmp_path / "copy")
    tables.require_single(here, [path.name for path in folder.iterdir()])
    (record,) = tables.runs(here)
    assert record["owner"]["pid"] == winner.pid, "a refused run leaves no trace"
    assert job("verify", output, env=environment).code == 0


STOP = "os.kill(os.getpid(), signal.SIGSTOP)"


@pytest.mark.parametrize("point", ["before the audit", "behind the check of the claim"])
def test_a_paused_driver_leaves_a_newer_success_alone(
    started: Start,
    job: Job,
    warm: Job,
    folder: Path,
    tiny_model: Path,
    tmp_path: Path,
    s3: S3Server,
    place: tuple[str, dict[str, str]],
    point: str,
) -> None:
    output, environment = place
    command = ("classify", "--input", folder, "--output", output, "--model", tiny_model)
    assert warm(*command, env=environment).code == 0
    if point == "before the audit":
        stops = f"original = module.audit\nmodule.audit = lambda *a, **k: ({STOP}, original(*a, **k))[1]\n"
        stopping = faults.patched(tmp_path / "stops", "imgbatch.ledger.audit", stops)
    else:
        stops = f"original = module.SuccessMarker.write\nmodule.SuccessMarker.write = lambda *a: ({STOP}, original(*a))[1]\n"
        stopping = faults.patched(tmp_path / "stops", "imgbatch.ledger.success_marker", stops)
    paused = started(*command, env=environment | stopping)
    wait_for(lambda: state_of(paused) == "T", paused)

    refused = job(*command, env=environment)
    assert refused.code == 7 and str(paused.pid) in refused.err, "on its own machine it is known to be alive"
    for number in range(40):
        (folder / f"new-{number}.jpg").write_bytes(encode(scene(seed=number % 5), "JPEG"))
    ended = warm(*command, "--set", "run.check_owner=false", env=environment)
    assert ended.code == 0, ended.err
    newer = tables.success(local_copy(output, s3, tmp_path / "newer"))

    paused.send_signal(signal.SIGCONT)
    out, err = paused.communicate(timeout=60)
    assert paused.returncode == 3 and out == "", err
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert ("was taken over by run" if point == "before the audit" else "_SUCCESS was changed by another run") in err
    here = local_copy(output, s3, tmp_path / "after")
    assert tables.success(here) == newer and newer["counts"]["listed"] == 52
    assert job("verify", output, env=environment).code == 0
    assert {run["run_id"]: run["exit_code"] for run in tables.runs(here)}[newer["run_id"]] == 0
    assert sorted(run["exit_code"] for run in tables.runs(here)) == [0, 0, 3]


def test_an_unreaped_killed_driver_does_not_block_its_output(
    started: Start, warm: Job, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """As in a container whose first process does not reap children: the driver stays a zombie."""
    output = tmp_path / "out"
    command = ("classify", "--input", folder, "--output", output, "--model", tiny_model)
    process = started(*command)
    wait_for(lambda: list(output.glob("runs/*/listing/*")), process)
    os.kill(process.pid, signal.SIGKILL)  # and no `wait`
    deadline = time.monotonic() + 30
    while state_of(process) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ended = warm(*command)
    assert ended.code == 0, ended.err
    assert state_of(process) == "Z"
    tables.require_single(output, [path.name for path in folder.iterdir()])


@pytest.mark.parametrize("what", ["", "labels", "runs"])
def test_an_output_deleted_during_a_run(
    started: Start,
    job: Job,
    warm: Job,
    tiny_model: Path,
    tmp_path: Path,
    s3: S3Server,
    place: tuple[str, dict[str, str]],
    what: str,
) -> None:
    output, environment = place
    images = tmp_path / "many"
    images.mkdir()
    for number in range(200):
        (images / f"{number:03d}.jpg").write_bytes(encode(scene(seed=number % 24), "JPEG"))
    command = ("classify", "--input", images, "--output", output, "--model", tiny_model)
    command += ("--set", "run.commit_interval_s=0.2")
    prefix = f"{output.removeprefix('s3://out/')}/{what}".rstrip("/")

    def parts() -> int:
        if output.startswith("/"):
            return len(list(Path(output).glob("labels/part-*")))
        return len(
            obstore.list_with_delimiter(s3.bucket("out"), f"{output.removeprefix('s3://out/')}/labels")["objects"]
        )

    process = started(*command, env=environment | faults.slow_decoding(tmp_path / "slow", 0.05))
    wait_for(lambda: parts() >= 2, process)
    if output.startswith("/"):
        shutil.rmtree(Path(output) / what, ignore_errors=True)
    else:
        names = [meta["path"] for page in obstore.list(s3.bucket("out"), prefix) for meta in page]
        obstore.delete(s3.bucket("out"), names)
    out, err = process.communicate(timeout=180)

    assert process.returncode == 3 and out == "" and "Traceback" not in err, err
    said = err.splitlines()[-1]
    named = f"{output}/runs/" if what == "runs" else f"{output}/{what}".rstrip("/")
    assert said.startswith(f"error: {named}") and "was deleted or emptied during this run" in said
    ended = warm(*command, env=environment)
    assert ended.code == 0, ended.err
    tables.require_single(local_copy(output, s3, tmp_path / "copy"), [path.name for path in images.iterdir()])
    assert job("verify", output, env=environment).code == 0

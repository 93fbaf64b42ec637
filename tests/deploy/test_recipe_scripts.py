"""The scripts of the recipes, run for real: only imgbatch and Slurm's `scontrol` are stand-ins that end with given codes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.deploy.conftest import DEPLOY
from tests.deploy.recipes import CODES, RETRIED, Fake, documents, of_kind, program, run

CRON = str(DEPLOY / "cron" / "imgbatch-nightly")
SLURM = str(DEPLOY / "slurm" / "imgbatch.sbatch")


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = Fake(folder)
    fake.add("scontrol", f'echo "$@" >> {folder}/requeued\n')
    return fake


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("script", [CRON, SLURM])
def test_shells_and_shellcheck_accept_the_scripts(script: str) -> None:
    assert run("bash", "-n", script).returncode == 0
    checked = run(program("shellcheck"), script)
    assert checked.returncode == 0, checked.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("name", ["kubernetes", "argo", "skypilot"])
def test_shellcheck_accepts_the_scripts_in_manifests(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    of = {
        "kubernetes": pod_script,
        "argo": argo_script,
        "skypilot": lambda: documents("skypilot/imgbatch.yaml")[0]["run"],
    }
    script.write_text("#!/bin/bash\nset -eu\n" + of[name]())
    checked = run(program("shellcheck"), str(script))
    assert checked.returncode == 0, checked.stdout


# --- cron


def cron(fake: Fake, state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(CRON, *arguments, **cron_environment(fake, state))


def cron_environment(fake: Fake, state: Path) -> dict[str, str]:
    return {"PATH": fake.path, "IMGBATCH_STATE": str(state), "IMGBATCH_PAUSE_S": "0", "IMGBATCH_ATTEMPTS": "3"}


@pytest.mark.parametrize("code", CODES)
def test_cron_tries_again_where_it_helps_and_mails_nothing(fake: Fake, tmp_path: Path, code: int) -> None:
    fake.ends_with(code, 0)
    done = cron(fake, tmp_path / "state", "2026-11-28")
    command = "classify --input s3://images/photos/ --output s3://labels/{date}/ --date 2026-11-28"
    if code in RETRIED:
        assert (done.returncode, done.stdout, done.stderr, fake.calls) == (0, "", "", [command] * 2)
    else:
        assert (done.returncode, fake.calls) == (code, [command])
        assert f"night of 2026-11-28: exit code {code}" in done.stderr  # what cron mails
        assert f"exit code {code}" in (tmp_path / "state" / "2026-11-28.log").read_text()


def test_cron_gives_up_after_its_attempts(fake: Fake, tmp_path: Path) -> None:
    fake.ends_with(3, 3, 3, 0)
    done = cron(fake, tmp_path, "2026-11-28")
    assert (done.returncode, len(fake.calls)) == (3, 3)
    assert "exit code 3 in 3 attempts" in done.stderr and f"{CRON} 2026-11-28" in done.stderr


def test_cron_takes_the_local_date_once(fake: Fake, tmp_path: Path) -> None:
    before = time.strftime("%F")
    cron(fake, tmp_path)
    assert fake.calls[0].rpartition(" ")[2] in {before, time.strftime("%F")}


def test_cron_started_twice(fake: Fake, tmp_path: Path) -> None:
    """While a run holds the lock, the same night is silent, and another night is mailed. Neither starts imgbatch."""
    fake.ends_with("wait")
    first = subprocess.Popen([CRON, "2026-11-27"], env={**os.environ, **cron_environment(fake, tmp_path)}, text=True,
                             stderr=subprocess.PIPE)  # fmt: skip
    log = tmp_path / "2026-11-27.log"
    try:
        eventually(lambda: log.exists() and "waiting" in log.read_text())
        same = cron(fake, tmp_path, "2026-11-27")
        assert (same.returncode, same.stderr) == (7, "")
        other = cron(fake, tmp_path, "2026-11-28")
        assert other.returncode == 7 and "because the night of 2026-11-27 is still running" in other.stderr
        assert len(fake.calls) == 1
    finally:
        first.send_signal(signal.SIGTERM)
        _, mailed = first.communicate(timeout=60)
    assert first.returncode == 143 and "stopped. Resume with" in mailed
    assert cron(fake, tmp_path, "2026-11-27").returncode == 0  # the lock is free again


# --- Slurm


def slurm(fake: Fake, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(SLURM, PATH=fake.path, SLURM_JOB_ID="41", **environment)


def requeued(fake: Fake) -> list[str]:
    path = fake.folder / "requeued"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", CODES)
def test_slurm_queues_the_job_again_where_it_helps(fake: Fake, code: int) -> None:
    fake.ends_with(code)
    assert slurm(fake, IMGBATCH_DATE="2026-11-28").returncode == code
    assert fake.calls == ["classify --input s3://images/photos/ --output s3://labels/{date}/ --date 2026-11-28"]
    assert requeued(fake) == (["requeue 41"] if code in RETRIED else [])


def test_slurm_gives_up_after_its_restarts(fake: Fake) -> None:
    fake.ends_with(3)
    done = slurm(fake, IMGBATCH_DATE="2026-11-28", SLURM_RESTART_COUNT="6")
    assert (done.returncode, requeued(fake)) == (3, []) and "after 6 restarts" in done.stderr


def test_slurm_needs_a_date(fake: Fake) -> None:
    done = slurm(fake, IMGBATCH_DATE="")
    assert done.returncode not in (0, *RETRIED) and "IMGBATCH_DATE=YYYY-MM-DD" in done.stderr and not fake.calls


@pytest.mark.parametrize(("signum", "again"), [(signal.SIGUSR1, ["requeue 41"]), (signal.SIGTERM, [])])
def test_slurm_stops_imgbatch_before_the_time_limit_and_when_cancelled(
    fake: Fake, tmp_path: Path, signum: int, again: list[str]
) -> None:
    fake.ends_with("wait")
    environment = {**os.environ, "PATH": fake.path, "SLURM_JOB_ID": "41", "IMGBATCH_DATE": "2026-11-28"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen([SLURM], env=environment, stdout=log)
    eventually(lambda: "waiting" in (tmp_path / "log").read_text())
    job.send_signal(signum)
    assert job.wait(60) == 143
    assert requeued(fake) == again


# --- the commands of pods


def pod_script() -> str:
    job = of_kind("kubernetes/cronjob.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-euc"]
    return str(container["args"][0])


def argo_script() -> str:
    templates = of_kind("argo/workflow-template.yaml", "WorkflowTemplate")["spec"]["templates"]
    (container,) = (template["container"] for template in templates if "container" in template)
    assert container["command"] == ["bash", "-euc"]
    return str(container["args"][0])


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("imgbatch-29672610", "2026-06-02"),  # 2026-06-01T23:30Z, which is 01:30 in Berlin
        ("imgbatch-29672490", "2026-06-01"),
        ("imgbatch-2026-11-28", "2026-11-28"),
        ("imgbatch-manual", None),
        ("imgbatch", None),
    ],
)
def test_the_pod_takes_the_date_from_the_name_of_its_job(fake: Fake, name: str, date: str | None) -> None:
    done = run("bash", "-euc", pod_script(), PATH=fake.path, JOB_NAME=name, TZ="Europe/Berlin")
    if date is None:
        assert (done.returncode, fake.calls) == (2, []) and "no date" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert fake.calls[0].startswith("submit --address http://imgbatch-head-svc:8265 -- classify --input ")
        assert f" --date {date} " in fake.calls[0]


def test_the_pod_refuses_a_zone_that_does_not_exist(fake: Fake) -> None:
    done = run("bash", "-euc", pod_script(), PATH=fake.path, JOB_NAME="imgbatch-29672610", TZ="Europe/Berlln")
    assert (done.returncode, fake.calls) == (2, [])


@pytest.mark.parametrize(
    ("when", "date"), [("2026-06-01T23:30:00Z", "2026-06-02"), ("2026-11-28", "2026-11-28"), ("", None), ("soon", None)]
)
@pytest.mark.parametrize("variable", ["WHEN", "SCHEDULED_TIME"])
def test_argo_and_aws_batch_convert_the_scheduled_time(fake: Fake, variable: str, when: str, date: str | None) -> None:
    definition = yaml.safe_load((DEPLOY / "aws-batch/job-definition.json").read_text())  # JSON is YAML
    script = argo_script() if variable == "WHEN" else definition["containerProperties"]["command"][2]
    done = run("bash", "-euc", script, PATH=fake.path, TZ="Europe/Berlin", **{variable: when})
    if date is None:
        assert done.returncode not in (0, *RETRIED) and not fake.calls
    else:
        assert done.returncode == 0 and f"--date {date}" in fake.calls[0]


@pytest.mark.parametrize("script", [pod_script(), argo_script()], ids=["kubernetes", "argo"])
def test_sigterm_to_a_pod_reaches_imgbatch(fake: Fake, tmp_path: Path, script: str) -> None:
    """The shell replaces itself, so that imgbatch is the process that Kubernetes signals."""
    fake.ends_with("wait")
    environment = {**os.environ, "PATH": fake.path, "TZ": "UTC", "JOB_NAME": "imgbatch-1-2026-11-28",
                   "WHEN": "2026-11-28"}  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        pod = subprocess.Popen(["bash", "-euc", script], env=environment, stdout=log)
    eventually(lambda: "waiting" in (tmp_path / "log").read_text())
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(60) == 143

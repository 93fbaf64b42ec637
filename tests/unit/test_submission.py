"""Submissions as Ray jobs: ids, the job to follow, what is uploaded, exit codes, and jobs that are lost."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import imgbatch
from imgbatch.commands import submit as command
from imgbatch.config import env_file
from imgbatch.errors import EXIT_CODES, ClusterError, ConfigError, OutputBusyError, UsageError
from imgbatch.orchestration import package, ray_jobs, submit
from imgbatch.orchestration.submission import RayJob, Submission, exit_code_of_job

OURS = Submission("classify", "s3://out/2026-11-29", ("--output", "s3://out/{date}"), "2026-11-29")


def job(number: int, status: str = "RUNNING", of: Submission = OURS) -> RayJob:
    return RayJob(f"{OURS.prefix}{number}", status, of.metadata())


def test_the_id_is_made_from_verb_and_output() -> None:
    digest = hashlib.sha256(b"classify\ns3://out/2026-11-29").hexdigest()[:12]
    assert OURS.prefix == f"imgbatch-{digest}-"
    assert replace(OURS, arguments=("--quiet",)).prefix == OURS.prefix
    assert len({OURS.prefix, replace(OURS, verb="train").prefix, replace(OURS, output="s3://out").prefix}) == 3


def test_an_active_job_is_followed_and_an_ended_one_is_succeeded() -> None:
    assert OURS.find([]) == f"{OURS.prefix}1"
    assert OURS.find([job(1, "FAILED"), job(2, "STOPPED"), job(10, "SUCCEEDED")]) == f"{OURS.prefix}11"
    for status in ("PENDING", "RUNNING"):
        assert OURS.find([job(2, status), job(1, "FAILED")]) == job(2, status)
    others = [RayJob("raysubmit_x", "RUNNING"), RayJob(f"{OURS.prefix}x", "RUNNING"), RayJob("imgbatch-0-7", "RUNNING")]
    assert OURS.find(others) == f"{OURS.prefix}1"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(OURS, arguments=("--set", "top_k=2")), "with other arguments"),
        (replace(OURS, contents=("RUN.toml:0",)), "with other arguments"),
        (replace(OURS, date="2026-11-28"), "running for 2026-11-28"),
        (replace(OURS, verb="train"), "was not submitted by imgbatch"),
    ],
)
def test_an_active_job_with_other_arguments_is_refused(other: Submission, message: str) -> None:
    with pytest.raises(OutputBusyError, match=message):
        OURS.find([job(1, of=other)])
    assert OURS.find([job(1, "FAILED", of=other)]) == f"{OURS.prefix}2"
    with pytest.raises(OutputBusyError, match="was not submitted by imgbatch"):
        OURS.find([RayJob(f"{OURS.prefix}1", "RUNNING")])


def test_metadata_has_no_password() -> None:
    assert "hunter2" not in str(Submission("classify", "https://me:hunter2@host/x", ()).metadata())


@pytest.mark.parametrize("code", [entry.code for entry in EXIT_CODES if entry.code])
def test_the_exit_code_of_a_job_is_its_own(code: int) -> None:
    assert exit_code_of_job(RayJob("x", "FAILED", exit_code=code), None) == code
    assert exit_code_of_job(RayJob("x", "STOPPED"), code) == code
    assert exit_code_of_job(RayJob("x", "STOPPED"), None, code) == code


def test_the_exit_code_of_a_job_that_wrote_none() -> None:
    assert exit_code_of_job(RayJob("x", "SUCCEEDED", exit_code=0), None) == 0
    assert exit_code_of_job(RayJob("x", "STOPPED"), None) == 143
    assert exit_code_of_job(RayJob("x", "FAILED"), None) == 3, "the supervisor died, or the runtime environment failed"
    for killed in (-9, -11, 137, 139, 134):
        assert exit_code_of_job(RayJob("x", "FAILED", exit_code=killed), 0) == 3
    assert exit_code_of_job(RayJob("x", "FAILED", exit_code=-15), None) == 143


def collected(words: list[str], working_dir: Path | None = None) -> tuple[package.Package, Submission]:
    """Return the package and the submission of a command line."""
    verb, *arguments = words
    flags, config = command.read(verb, arguments, str(working_dir) if working_dir else None)
    files = package.collect(arguments, flags, config, working_dir)
    return files, command.submission_of(verb, arguments, flags, config, files.contents())


def test_what_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMGBATCH_DATE", "2026-11-29")
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text("{}")
    (tmp_path / "other.txt").write_text("not named")
    run = tmp_path / "run.toml"
    run.write_text('input = ["s3://images/{date}"]\noutput = "s3://out/{date}"\nmodel = "./net"\n')

    files, submission = collected(["classify", "--config", str(run), "--limit", "3"])
    assert files.files == {".imgbatch-files/config-run.toml": run, "net/config.json": Path("net/config.json")}
    assert files.arguments == ("--config", ".imgbatch-files/config-run.toml", "--limit", "3")
    assert (submission.output, submission.date) == ("s3://out/2026-11-29", "2026-11-29")
    files.variables = {"SECRET": "hunter2"}
    for name in ("a.zip", "b.zip"):
        files.add_to(tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() != (tmp_path / "b.zip").read_bytes(), "the hash of secrets is salted"
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = {name for name in archive.namelist() if not name.startswith("imgbatch/")}
        assert names == {*files.files, ".imgbatch-job.sh", ".imgbatch-env"}
        modes = {info.filename: stat.S_IMODE(info.external_attr >> 16) for info in archive.infolist()}
        assert modes[".imgbatch-env"] == modes[".imgbatch-files/config-run.toml"] == 0o600
        assert "hunter2" in archive.read(".imgbatch-env").decode()
        code = Path(imgbatch.__file__).parent
        assert {path.name for path in code.glob("*.py")} <= {Path(name).name for name in archive.namelist()}
        assert not [name for name in archive.namelist() if "__pycache__" in name]

    run.write_text(run.read_text() + "top_k = 2\n")
    _, changed = collected(["classify", "--config", str(run), "--limit", "3"])
    assert changed.metadata() != submission.metadata() and changed.prefix == submission.prefix


def test_the_file_of_prices_of_a_plan_is_uploaded(tmp_path: Path) -> None:
    prices = tmp_path / "vms.csv"
    prices.write_text("InstanceType,vCPUs,Price\n")
    words = ["plan", "--input", "s3://images/a", "--output", "s3://out/a", "--prices", str(prices), "--machine", "m"]
    files, submission = collected(words)
    assert files.files == {".imgbatch-files/prices-vms.csv": prices} and submission.output == "s3://out/a"
    assert files.arguments[5] == ".imgbatch-files/prices-vms.csv"


def test_a_package_without_secrets_is_the_same_each_time(tmp_path: Path) -> None:
    files, _ = collected(["verify", "s3://out/labels"])
    for name in ("a.zip", "b.zip"):
        files.add_to(tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classify", "--input", "photos", "--output", "s3://o"], "--input photos is a relative path"),
        (["classify", "--input", "s3://i", "--output", "out"], "--output out is a relative path"),
        (["evaluate", "--input", "s3://i", "--output", "s3://o", "--labels", "out"], "--input out is a relative path"),
        (["verify", "out"], "--output out is a relative path"),
        (["classify", "--input", "s3://i", "--output", "s3://o", "--model", "../net"], "outside of this directory"),
        (["classify", "--input", "https://me:hunter2@host/x", "--output", "s3://o"], "has a secret"),
        (["classify", "--input", "s3://i"], "no --output"),
    ],
)
def test_arguments_that_no_job_could_use(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        collected(words)
    assert "hunter2" not in str(raised.value)


def test_a_secret_in_the_config_file_is_uploaded_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[storage.options]\nsecret = "hunter2"\n')
    words = ["classify", "--config", str(tmp_path / "run.toml"), "--input", "s3://i", "--output", "s3://o"]
    files, submission = collected(words)
    shown = [*files.entrypoint, *files.arguments, str(submission.metadata())]
    assert "hunter2" not in " ".join(shown) and len(files.files) == 1


def test_the_date_is_that_of_the_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGBATCH_DATE", "2026-11-29")
    _, dated = collected(["verify", "s3://out/{date}"])
    assert (dated.output, dated.date) == ("s3://out/2026-11-29", "2026-11-29")
    _, plain = collected(["verify", "s3://out/labels"])
    assert plain.date == ""
    given = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90", "A": "1"}, "pip": ["x"], "excludes": ["y"]}
    assert submit.runtime_env_of(dated, package.Package((), variables={"S": "1"}), given) == {
        "env_vars": {
            "RAY_JOB_STOP_WAIT_TIME_S": "90",
            "A": "1",
            "IMGBATCH_DATE": "2026-11-29",
            env_file.VARIABLE: ".imgbatch-env",
        },
        "pip": ["x"],
    }
    assert submit.runtime_env_of(plain, package.Package(()), {}) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1\n=2\n", "line 2: expected NAME=VALUE"),
        ("KEY\n", "line 1: KEY has no value"),
        ("a b=1\n", "line 1"),
        ("RAY_ADDRESS=x\n", "use env_vars in --runtime-env"),
    ],
)
def test_wrong_lines_of_an_env_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        env_file.parse(text, "job.env", {})


def test_an_env_file_is_read_when_the_package_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.env").write_text("TOKEN='a b'\n")
    monkeypatch.setenv("TOKEN", "that of the node")
    monkeypatch.setenv(env_file.VARIABLE, str(tmp_path / "job.env"))
    env_file.load()
    assert os.environ["TOKEN"] == "a b"
    monkeypatch.setenv(env_file.VARIABLE, str(tmp_path / "none"))
    env_file.load(strict=False)
    with pytest.raises(ConfigError, match="No such file"):
        env_file.load()


@pytest.mark.parametrize("content", ["- a\n", "env_vars: [1]\n", "a: {\n", "working_dir: s3://b/x.zip\n"])
def test_wrong_runtime_environments(content: str, tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text(content)
    with pytest.raises(ConfigError, match="--runtime-env"):
        submit.read_runtime_env(str(tmp_path / "env.yaml"))


class Server:
    """Answers with what it was given: a job, or an error."""

    def __init__(self, *answers: RayJob | Exception) -> None:
        self.answers = list(answers)

    def job(self, job_id: str) -> RayJob:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def watch(*answers: RayJob | Exception, lost_after_s: float = 0.5) -> submit.Watch:
    server: Any = Server(*answers)
    return submit.Watch(server, "x", lost_after_s)


def test_a_job_that_ray_has_forgotten_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_LOST_TWICE_S", 0.01)
    gone, here = ray_jobs.JobLostError("status code 404"), job(1)
    with pytest.raises(ClusterError, match="does not know the job") as raised:
        watch(gone, gone).look(here)
    assert raised.value.exit_code == 3
    assert watch(gone, here).look(here) == here, "once may be a mistake of a job server that has just started"


def test_a_server_that_is_away_is_waited_for() -> None:
    away, here = ray_jobs.NotReachedError("the job server does not answer"), job(1, "PENDING")
    patient = watch(away, away, job(1, "SUCCEEDED"), lost_after_s=100)
    assert patient.look(here) == here == patient.look(here)
    assert patient.look(here).status == "SUCCEEDED"
    with pytest.raises(ClusterError, match="is not known"):
        watch(away, lost_after_s=0).look(here)

"""`imgbatch submit` against a real cluster with a token, and a real S3 server whose credentials only the submitter has."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import termios
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import obstore
import pytest

from imgbatch.errors import EXIT_CODES
from imgbatch.ledger import claims
from imgbatch.orchestration.end_line import last_end_line
from imgbatch.storage.stores import Folder
from tests.cluster import submitting
from tests.cluster.submitting import Cluster, Connection, finish, finish_all, wait_until
from tests.conftest import ROOT, SECRET, Ended, S3Server, clean_environment, free_ports
from tests.integration import faults, tables
from tests.servers import serving_http
from tests.unit.pictures import encode, scene

FEW, MANY, SLOW_S = 8, 240, 0.05

# Slow enough to be met in the middle; and a bug, where one is asked for.
HOOK = f"""
original = module.decode
def slow(*arguments, **options):
    time.sleep({SLOW_S})
    return original(*arguments, **options)
module.decode = slow
"""
BUG = """
original = module.take
def take(*arguments, **options):
    assert "BUG" not in os.environ, "a bug"
    return original(*arguments, **options)
module.take = take
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    hook = faults.patched(tmp_path_factory.mktemp("hook"), "imgbatch.decode", HOOK, **{"ledger.claims": BUG})
    with submitting.running(hook) as cluster:
        yield cluster


@dataclass
class World:
    """The cluster and the store, and commands for them."""

    cluster: Cluster
    s3: S3Server
    model: Path
    place: Path
    env_file: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, output: str, *words: object, images: str = "few", own: tuple[object, ...] = ()) -> list[object]:
        """Return the words of a submission that labels images of the store."""
        return [
            "--env-file", self.env_file, *own, "--", "classify", "--input", f"s3://images/submit/{images}",
            "--output", f"s3://out/{output}", "--model", self.model, "--set", "run.commit_interval_s=0.5", *words,
        ]  # fmt: skip

    def start(self, *words: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start submit."""
        self.started.append(submitting.start(self.cluster, *words, env=env))
        return self.started[-1]

    def runs(self, output: str) -> list[dict[str, Any]]:
        """Return the records of the runs of an output."""
        listed = [each["path"] for batch in obstore.list(self.s3.bucket("out"), f"{output}/runs") for each in batch]
        paths = sorted(path for path in listed if path.endswith("/run.json"))
        return [json.loads(bytes(obstore.get(self.s3.bucket("out"), path).bytes())) for path in paths]

    def parts(self, output: str) -> int:
        """Return the number of parts with labels."""
        return sum(len(batch) for batch in obstore.list(self.s3.bucket("out"), f"{output}/labels"))

    def labels(self, output: str, place: Path) -> dict[str, str]:
        """Return the label of each image, by its name."""
        return tables.labels(tables.download(self.s3.bucket("out"), output, place))


@pytest.fixture(scope="module")
def world(
    cluster: Cluster, s3: S3Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    pictures = [encode(scene(seed=number), "JPEG") for number in range(FEW)]
    for folder, count in (("few", FEW), ("many", MANY)):
        for number in range(count):
            obstore.put(s3.bucket("images"), f"submit/{folder}/{number:03d}.jpg", pictures[number % FEW])
    for number in range(3):
        obstore.put(s3.bucket("images"), f"submit/bad/{number}.jpg", b"no image at all")
    place = tmp_path_factory.mktemp("submit")
    (place / "job.env").write_text("".join(f"{name}={value}\n" for name, value in s3.environment.items()))
    world = World(cluster, s3, tiny_model, place, place / "job.env")
    yield world
    for process in world.started:  # left by a test that failed
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def labelled(world: World) -> Ended:
    """The few images, labelled by one job of three submitters that start in the same second; one of them is detached."""
    words = world.command("few")
    detached, *followers = finish_all([world.start("--detach", *words), world.start(*words), world.start(*words)])
    assert detached.code == 0, detached.err
    for each in followers:
        assert each.code == 0, each.out + each.err
        assert f"the Ray job {detached.out.strip()} ended (succeeded) with exit code 0" in each.err
        assert f"{FEW} images listed, {FEW} labelled, 0 rejected" in each.out
    assert sum("submitted the Ray job" in each.err for each in (detached, *followers)) == 1
    assert [run["exit_code"] for run in world.runs("few")] == [0]
    return followers[0]


def test_credentials_reach_driver_and_workers_and_nothing_else(world: World, labelled: Ended) -> None:
    assert last_end_line(labelled.out) is not None
    jobs = world.cluster.client().list_jobs()
    shown = "".join(repr(job) for job in jobs) + labelled.out + labelled.err
    ran = subprocess.run(
        [*submitting.RAY, "job", "list", "--address", world.cluster.dashboard], capture_output=True, text=True,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": world.cluster.token},
    )  # fmt: skip
    assert "imgbatch.output" in ran.stdout, ran.stderr
    shown += ran.stdout
    assert SECRET not in shown
    holders = [path for path in world.cluster.place.rglob("*") if path.is_file() and SECRET.encode() in _read(path)]
    assert holders and {path.name for path in holders} == {".imgbatch-env"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in holders} == {0o600}
    packages = world.cluster.place.glob("session_2*/runtime_resources/working_dir_files/*/*")
    assert {path.name for path in packages} == {"imgbatch", ".imgbatch-job.sh", ".imgbatch-env"}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_ray_job_submit_as_documented(world: World, tmp_path: Path) -> None:
    """With the path of the interpreter, and credentials in a file of the working directory."""
    for name in ("imgbatch", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(world.env_file, tmp_path / "checkout")
    runtime_env = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", "IMGBATCH_ENV_FILE": world.env_file.name}}
    command = [
        *submitting.RAY, "job", "submit", "--address", world.cluster.dashboard, "--working-dir", ".",
        "--runtime-env-json", json.dumps(runtime_env), "--", sys.executable, "jobs/classify.py", "--dry-run",
        "--input", "s3://images/submit/few", "--output", "s3://out/documented", "--model", str(world.model),
    ]  # fmt: skip
    environment = {**clean_environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": world.cluster.token}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "checkout", env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{FEW} images" in ran.stdout and (last_end_line(ran.stdout) or {})["exit_code"] == 0
    assert SECRET not in ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def causes(world: World, labelled: Ended, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Ended]:
    """A job for each exit code, all at once. The exit codes of signals are in other tests."""
    (closed,) = free_ports(1)
    bug = world.place / "bug.yaml"
    bug.write_text("env_vars: {BUG: '1'}\n")
    broken = world.s3.bucket("out")
    for batch in obstore.list(world.s3.bucket("out"), "few/"):
        for each in batch:
            content = bytes(obstore.get(broken, each["path"]).bytes())
            if not each["path"].startswith("few/labels/part-00000001"):
                obstore.put(broken, each["path"].replace("few/", "broken/", 1), content)
    busy = claims.take(Folder(world.s3.stores(), "s3://out/busy"))
    away = world.place / "away.env"
    away.write_text(world.env_file.read_text() + f"AWS_ENDPOINT_URL=http://127.0.0.1:{closed}\n")
    words = {
        1: world.command("bug", own=("--runtime-env", bug)),
        2: world.command("wrong", "--set", "model.name=torchvision:no_such_net"),
        3: ["--env-file", away, *world.command("away", "--set", "storage.retries=0")[2:]],
        4: world.command("bad", images="bad"),
        5: world.command("few", "--set", "top_k=2"),
        6: ["--env-file", world.env_file, "--", "verify", "s3://out/broken"],
        7: world.command("busy"),
    }
    words[2].remove("--model")
    words[2].remove(world.model)
    with busy:
        ended = finish_all([world.start(*each) for each in words.values()])
    return {0: labelled, **dict(zip(words, ended, strict=True))}


@pytest.mark.parametrize("code", [entry.code for entry in EXIT_CODES if entry.code < 8])
def test_each_exit_code_reaches_the_caller(causes: dict[int, Ended], code: int) -> None:
    ended = causes[code]
    assert ended.code == code, ended.out[-3000:] + ended.err
    line = last_end_line(ended.out)
    assert line is not None and line["exit_code"] == code
    assert f"exit code {code}" in ended.err.splitlines()[-1] or code == 0


def test_sigterm_commits_and_the_same_command_resumes(world: World, labelled: Ended, tmp_path: Path) -> None:
    words = world.command("stopped", images="many")
    process = world.start(*words)
    wait_until(lambda: world.parts("stopped"), process)
    other = world.start(*words, "--set", "top_k=2")
    follower = world.start(*words)
    refused = finish(other)
    assert refused.code == 7 and "with other arguments" in refused.err
    process.terminate()
    stopped, followed = finish_all([process, follower])
    assert stopped.code == followed.code == 143, stopped.out + stopped.err
    assert "requested the end of the Ray job" in stopped.err
    line = last_end_line(stopped.out)
    assert line is not None and (line["exit_code"], line["status"]) == (143, "interrupted")
    before = world.labels("stopped", tmp_path / "before")
    assert 0 < len(before) < MANY and line["counts"]["labelled"] == len(before)

    resumed = finish(world.start(*words))
    assert resumed.code == 0, resumed.out + resumed.err
    assert [run["exit_code"] for run in world.runs("stopped")] == [143, 0]
    after = world.labels("stopped", tmp_path / "after")
    kinds = world.labels("few", tmp_path / "few")
    assert after == {f"{number:03d}.jpg": kinds[f"{number % FEW:03d}.jpg"] for number in range(MANY)}


def test_sigint_a_second_signal_and_a_time_limit(world: World) -> None:
    """Ray sends the job the signal that its environment names. After the second signal, submit does not wait."""
    interrupt = world.place / "interrupt.yaml"
    interrupt.write_text("env_vars: {RAY_JOB_STOP_SIGNAL: SIGINT}\n")
    words = world.command("interrupted", images="many", own=("--runtime-env", interrupt))
    first = world.start(*words)
    wait_until(lambda: world.parts("interrupted"), first)
    follower = world.start(*words)
    wait_until(lambda: _has_printed(follower), follower)
    first.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two signals within 0.3 s are one
    first.send_signal(signal.SIGINT)
    detached, followed = finish_all([first, follower])
    assert detached.code == 130 and "detached from the Ray job" in detached.err
    assert followed.code == 130, followed.out + followed.err
    (run,) = world.runs("interrupted")
    assert (run["status"], run["exit_code"], run["retry"]) == ("interrupted", 130, True)

    limited = finish(world.start("--timeout", 3, *world.command("interrupted", images="many")))
    assert limited.code == 143 and "--timeout" in limited.err, limited.out + limited.err


def _has_printed(process: subprocess.Popen[str]) -> bool:
    """Return whether a process has printed more than the first lines of Ray, without reading them from the pipe."""
    assert process.stdout is not None
    available = array("i", [0])
    fcntl.ioctl(process.stdout, termios.FIONREAD, available)
    return available[0] > 200


def test_a_killed_driver_is_3_and_a_connection_may_be_away(world: World) -> None:
    words = world.command("killed", images="many")
    connections = [Connection(world.cluster.dashboard) for _ in range(2)]
    away, lost = (
        world.start(*options, *words, env={"RAY_API_SERVER_ADDRESS": connection.url})
        for options, connection in zip(((), ("--lost-after", 3)), connections, strict=True)
    )
    direct = world.start(*words)
    wait_until(lambda: world.parts("killed") and all(map(_has_printed, (away, lost, direct))), direct)
    for connection in connections:
        connection.cut()
    (run,) = world.runs("killed")
    os.kill(run["owner"]["pid"], signal.SIGKILL)
    given_up = finish(lost)
    assert given_up.code == 3 and "whether the Ray job" in given_up.err, given_up.err
    connections[0].restore()

    first, second = finish_all([away, direct])
    assert first.code == second.code == 3, first.err + second.err
    assert "does not answer" in first.err and "answers again" in first.err
    assert first.out == second.out, "nothing of the log is lost or repeated"
    assert last_end_line(first.out) is None


def test_jobs_that_are_refused_before_they_start(world: World, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    for name in ("weights.bin", "ignored.bin"):
        with (big / name).open("wb") as file:
            file.truncate(101 << 20)
    (big / ".gitignore").write_text("ignored.bin\n")
    (tmp_path / "wrong.env").write_text("KEY\n")
    (port,) = free_ports(1)
    home = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": ""}
    words = world.command("refused")
    after = words[words.index("--") :]
    cases: list[tuple[int, str, list[object], dict[str, str]]] = [
        (2, "weights.bin (", ["--working-dir", big, *after], {}),
        (2, "is no directory", ["--working-dir", big / "none", *after], {}),
        (3, "does not accept the token", words, {"RAY_AUTH_TOKEN": "0" * 64}),
        (3, "requires a token", words, home),
        (3, "no Ray cluster answers", ["--address", f"127.0.0.1:{port}", *words], {}),
        (2, "is no Ray job server", ["--address", world.s3.endpoint, *words], {}),
        (2, "URL of the cluster's dashboard", ["--address", "ray://head:10001", *words], {}),
        (2, "not a date", [*words, "--date", "tomorrow"], {}),
        (2, "line 1: KEY has no value", ["--env-file", tmp_path / "wrong.env", *after], {}),
        (2, "has a secret", [*words, "--set", "storage.options.secret=hunter2"], {}),
        (2, "relative path", ["--", "classify", "--input", "s3://images/x", "--output", "out"], {}),
        (2, "did you mean 'classify'", ["--", "clasify"], {}),
        (2, "unrecognized arguments: --inptu", [*words, "--inptu", "x"], {}),
    ]
    ended = finish_all([world.start(*arguments, env=environment) for _, _, arguments, environment in cases])
    for (code, message, _, _), each in zip(cases, ended, strict=True):
        assert (each.code, message in each.err) == (code, True), (code, message, each)
    assert "ignored.bin" not in ended[0].err
    outputs = [(job.metadata or {}).get("imgbatch.output") for job in world.cluster.client().list_jobs()]
    assert "s3://out/refused" not in outputs


def test_a_cluster_with_another_version(world: World) -> None:
    from http.server import BaseHTTPRequestHandler

    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"version": "4", "ray_version": "2.9.0", "ray_commit": "x"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with serving_http(Old) as server:
        ended = finish(world.start("--address", server, *world.command("old")))
    assert ended.code == 2 and "runs Ray 2.9.0, and this is Ray 2." in ended.err


def test_a_foreign_job_with_our_id_and_then_a_lost_head(world: World) -> None:
    """The last test: the cluster is gone after it."""
    from imgbatch.orchestration.submission import Submission

    job_id = Submission("classify", "s3://out/foreign", ()).prefix + "1"
    client = world.cluster.client()
    client.submit_job(entrypoint="sleep 300", submission_id=job_id)
    ended = finish(world.start(*world.command("foreign")))
    assert ended.code == 7 and "was not submitted by imgbatch" in ended.err
    client.stop_job(job_id)

    process = world.start("--lost-after", 3, *world.command("lost", images="many"))
    wait_until(lambda: world.parts("lost"), process)
    world.cluster.kill()
    lost = finish(process)
    assert lost.code == 3 and "does not answer" in lost.err, lost.err

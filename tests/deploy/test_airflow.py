"""The recipe for Airflow: a real Airflow runs the DAG of deploy/airflow on a real Ray cluster and a real S3 server."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import psutil
import pytest

from tests.conftest import S3Server
from tests.deploy.airflow_home import AIRFLOW_BIN, DAG_ID, AirflowHome, Standalone, words_of
from tests.deploy.conftest import RayHead, missing
from tests.integration import faults, tables
from tests.unit.pictures import encode, scene

COUNT = 240
SLOW_S = 0.1
DAY = "2026-01-14T23:30:00+00:00"
"""A logical date whose day in Berlin is the 15th."""
NEXT_DAY = "2026-01-15T23:30:00+00:00"


@pytest.fixture(scope="module", autouse=True)
def _airflow_is_installed() -> None:
    if not (AIRFLOW_BIN / "airflow").exists():
        missing("Airflow in .venv-deploy")


@pytest.fixture(scope="module")
def database(ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of Airflow."""
    home = AirflowHome(tmp_path_factory.mktemp("airflow"), ray_head)
    assert home.run("db", "migrate") == 0, home.output
    return home.place / "airflow.db"


@pytest.fixture
def airflow(database: Path, ray_head: RayHead, tmp_path: Path) -> Iterator[AirflowHome]:
    """An Airflow without DAG runs."""
    home = AirflowHome(tmp_path / "airflow", ray_head)
    home.place.mkdir()
    (home.place / "airflow.db").write_bytes(database.read_bytes())
    yield home
    home.end()


@pytest.fixture(scope="module")
def photos_in_s3(s3: S3Server) -> int:
    """Photos of three nights; return the number of those of the second, and of those of the third."""
    kinds = [encode(scene(seed=number), "JPEG") for number in range(24)]
    for number in range(COUNT):
        for day in ("2026-01-15", "2026-01-16"):
            obstore.put(s3.bucket("images"), f"{day}/{number:03d}.jpg", kinds[number % len(kinds)])
    obstore.put(s3.bucket("images"), "2026-01-14/000.jpg", kinds[0])
    return COUNT


@pytest.fixture
def recipe(
    airflow: AirflowHome, tiny_model: Path, photos_in_s3: int, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., str]:
    """Write the recipe into Airflow's folder; return the prefix of the output in the bucket `out`."""

    def write(*arguments: str, slow: bool = False, output: str | None = None, **edits: str) -> str:
        place = re.sub(r"\W+", "-", request.node.name)
        runtime_env = {"env_vars": faults.slow_decoding(tmp_path / "hook", SLOW_S)} if slow else None
        airflow.write_recipe(
            INPUT=repr("s3://images/{date}/"),
            OUTPUT=repr(output or f"s3://out/{place}/{{date}}"),
            ARGUMENTS=repr(["--model", str(tiny_model), "--set", "run.commit_interval_s=1", *arguments]),
            RUNTIME_ENV=repr(runtime_env),
            # `airflow dags test` fails at the end of a DAG with a deadline: https://github.com/apache/airflow/issues/73428
            **{"RETRIES, RETRY_DELAY": "5, timedelta(seconds=1)", "DUE": "None", "PLAN": "False", **edits},
        )
        return f"{place}/2026-01-15"

    return write


def downloaded(s3: S3Server, prefix: str, target: Path) -> Path:
    """Return a copy of an output."""
    return tables.download(s3.bucket("out"), prefix, target)


def wait_until(condition: Callable[[], Any], airflow: AirflowHome, process: subprocess.Popen[bytes]) -> Any:
    """Return the result of a condition when it holds, while a process of Airflow runs."""
    deadline = time.monotonic() + 180
    while not (result := condition()):
        assert process.poll() is None and time.monotonic() < deadline, airflow.output[-5000:]
        time.sleep(0.2)
    return result


def keys(s3: S3Server, prefix: str) -> list[str]:
    """Return the keys below a prefix of the bucket `out`."""
    return [entry["path"] for batch in obstore.list(s3.bucket("out"), prefix) for entry in batch]


def drivers(prefix: str) -> list[psutil.Process]:
    """Return the processes that label images into an output: of a driver, not of the shell that started it."""
    place, _, day = prefix.rpartition("/")
    wanted = {"classify", f"s3://out/{place}/{{date}}", day}
    return [process for process in psutil.process_iter() if wanted <= {*words_of(process)}]


def test_straight_through(
    airflow: AirflowHome, recipe: Callable[..., str], ray_head: RayHead, s3: S3Server, tmp_path: Path
) -> None:
    prefix = recipe(PLAN="True")
    assert airflow.run("dags", "test", DAG_ID, DAY) == 0, airflow.output[-5000:]

    output = downloaded(s3, prefix, tmp_path / "out")
    assert len(tables.labels(output)) == COUNT and tables.success(output)["counts"]["labelled"] == COUNT
    (record,) = tables.runs(output)
    (event,) = airflow.rows("select asset.uri, asset_event.extra from asset_event join asset on asset.id = asset_id")
    extra = json.loads(event["extra"])
    assert event["uri"] == "s3://labels/"
    assert extra["counts"]["labelled"] == COUNT and extra["counts"]["rejected"] == 0
    assert extra["run_id"] == record["run_id"] and extra["output"] == f"s3://out/{prefix}"
    assert airflow.tries() == dict.fromkeys(("plan", "classify", "report"), (1, "success"))
    assert record["plan"]["predicted_s"] and (output / "runs" / record["run_id"] / "report.html").exists()
    assert f"{COUNT} images listed, {COUNT} labelled" in airflow.output, "the job's log is not in the log of the task"

    jobs = [job for job in ray_head.jobs() if job["metadata"]["imgbatch.output"] == f"s3://out/{prefix}"]
    _, classify, report = sorted(jobs, key=lambda job: job["start_time"])
    assert extra["submission_id"] == classify["submission_id"]
    assert report["entrypoint"].startswith("python -m imgbatch report ")
    assert report["entrypoint"].endswith("/{date}' --date 2026-01-15")
    assert classify["metadata"]["imgbatch.date"] == "2026-01-15"
    assert classify["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    for secret in (ray_head.token, s3.secret):
        assert secret not in airflow.texts() + json.dumps(jobs)


@pytest.mark.timeout(600)
def test_a_killed_and_a_stopped_job_are_resumed(
    airflow: AirflowHome, recipe: Callable[..., str], ray_head: RayHead, s3: S3Server, tmp_path: Path
) -> None:
    prefix = recipe(slow=True)
    process = airflow.start("dags", "test", DAG_ID, DAY)
    wait_until(lambda: keys(s3, f"{prefix}/labels"), airflow, process)
    for driver in drivers(prefix):
        driver.kill()
    (first,) = wait_until(lambda: [job for job in ray_head.jobs() if is_of(job, prefix, "FAILED")], airflow, process)
    parts = len(keys(s3, f"{prefix}/labels"))
    wait_until(lambda: len(keys(s3, f"{prefix}/labels")) > parts, airflow, process)
    (second,) = [job for job in ray_head.jobs() if is_of(job, prefix, "RUNNING")]
    ray_head.request(f"/api/jobs/{second['submission_id']}/stop", "POST")
    assert process.wait(timeout=300) == 0, airflow.output[-5000:]

    assert first["driver_exit_code"] in (-9, 137) and "exit code 137" in airflow.output
    assert [job["driver_exit_code"] for job in ray_head.jobs() if is_of(job, prefix, "STOPPED")] == [None]
    assert "exit code 143" in airflow.output, "the code of a stopped job is in its end line"
    output = downloaded(s3, prefix, tmp_path / "out")
    assert len(tables.labels(output)) == COUNT and tables.success(output)
    runs = tables.runs(output)
    assert [run["status"] for run in runs] == ["running", "interrupted", "succeeded"]
    assert 0 < runs[-1]["counts"]["already_done"] < COUNT, "it started from zero"
    assert airflow.tries() == {"classify": (3, "success"), "report": (1, "success")}
    ids = [job["submission_id"] for job in ray_head.jobs() if is_of(job, prefix) and "classify" in job["entrypoint"]]
    assert [name.rpartition("-")[2] for name in ids] == ["1", "2", "3"] and len({name[:-2] for name in ids}) == 1


def is_of(job: dict[str, Any], prefix: str, status: str | None = None) -> bool:
    """Return whether a job writes this output, and has this status."""
    return job["metadata"].get("imgbatch.output") == f"s3://out/{prefix}" and status in (None, job["status"])


def test_a_wrong_config_is_not_retried(airflow: AirflowHome, recipe: Callable[..., str], ray_head: RayHead) -> None:
    prefix = recipe("--set", "run.no_such_key=1")
    assert airflow.run("dags", "test", DAG_ID, DAY) == 1
    assert airflow.tries() == {"classify": (1, "failed"), "report": (0, "upstream_failed")}
    assert "exit code 2" in airflow.output and "run.no_such_key" in airflow.output
    (job,) = [job for job in ray_head.jobs() if is_of(job, prefix)]
    assert job["driver_exit_code"] == 2
    assert airflow.rows("select * from asset_event") == []


@pytest.mark.timeout(600)
def test_a_retry_attaches_and_a_killed_task_stops_its_job(
    airflow: AirflowHome, recipe: Callable[..., str], ray_head: RayHead, s3: S3Server, tmp_path: Path
) -> None:
    """The scheduler, the API server and the supervisors of tasks are Airflow's own. Two nights: it takes long to start."""
    prefix = recipe(slow=True, SCHEDULE="'0 0 29 2 *'", DUE="timedelta(seconds=1)")
    server = Standalone(airflow)
    wait_until(server.knows_the_dag, airflow, server.process)

    server.trigger(DAY)
    wait_until(lambda: keys(s3, f"{prefix}/labels"), airflow, server.process)
    (task,) = server.task_processes()
    task.kill()
    wait_until(lambda: airflow.tries(DAY).get("report", (0, ""))[1] == "success", airflow, server.process)
    assert airflow.tries(DAY) == {"classify": (2, "success"), "report": (1, "success")}
    assert [job["status"] for job in ray_head.jobs() if is_of(job, prefix)] == ["SUCCEEDED", "SUCCEEDED"]
    output = downloaded(s3, prefix, tmp_path / "out")
    (record,) = tables.runs(output)
    assert record["status"] == "succeeded" and len(tables.labels(output)) == COUNT
    assert "Reconnecting to existing job" in airflow.texts()
    # The callback of the deadline:
    wait_until(lambda: "the labels are late: manual__" in airflow.texts(), airflow, server.process)

    prefix = prefix.replace("01-15", "01-16")
    run_id = server.trigger(NEXT_DAY)
    wait_until(lambda: keys(s3, f"{prefix}/labels"), airflow, server.process)
    server.mark_as_failed(run_id, "classify")
    (job,) = wait_until(
        lambda: [job for job in ray_head.jobs() if is_of(job, prefix, "STOPPED")], airflow, server.process
    )
    assert airflow.tries(NEXT_DAY)["classify"] == (1, "failed")
    (record,) = tables.runs(downloaded(s3, prefix, tmp_path / "stopped"))
    assert (record["status"], record["exit_code"]) == ("interrupted", 143)
    assert '"exit_code": 143' in ray_head.log(job["submission_id"]).splitlines()[-1]

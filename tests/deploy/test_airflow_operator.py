"""The operator for Airflow: it follows the rules of `imgbatch submit`, of which it imports nothing."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from imgbatch.commands import submit
from imgbatch.errors import EXIT_CODES
from imgbatch.orchestration import end_line, submission
from imgbatch.orchestration.submission import RayJob, exit_code_of_job
from tests.deploy.airflow_home import AIRFLOW_BIN, in_airflow
from tests.deploy.conftest import RayHead, missing
from tests.deploy.recipes import CODES, RETRIED

DAY = "2026-11-29"


@pytest.fixture(scope="module", autouse=True)
def _airflow_is_installed() -> None:
    if not (AIRFLOW_BIN / "airflow").exists():
        missing("Airflow in .venv-deploy")


def test_its_jobs_have_the_ids_and_the_metadata_of_submit() -> None:
    described = [
        ("classify", "s3://out/{date}", ["--input", "s3://images/{date}/", "--model", "efficientnet_lite0"]),
        ("classify", "s3://out/all", ["--input", "s3://images/"]),
        ("classify", "s3://out/with space/", ["--input", "s3://images/{date}/*", "--set", "run.commit_interval_s=1"]),
        ("plan", "s3://out/{date}", ["--input", "s3://images/{date}/"]),
        ("verify", "s3://out/{date}", []),
        ("train", "s3://models/{date}", ["--input", "s3://images/train/"]),
    ]
    made = in_airflow(
        "result = []\n"
        "for verb, output, arguments in given[0]:\n"
        "    operator = o.ImgbatchOperator(task_id='t', verb=verb, output_uri=output, arguments=arguments)\n"
        "    request = operator.describe(given[1])\n"
        "    result.append([request, o.id_prefix(verb, request['metadata']['imgbatch.output']), o.STOP_WAIT_S])",
        described, DAY,
    )  # fmt: skip
    for (verb, output, arguments), (request, prefix, stop_wait_s) in zip(described, made, strict=True):
        words = [*([] if verb == "verify" else ["--output"]), output, *arguments, "--date", DAY]
        ours = submit.submission_of(verb, words, *submit.read(verb, words, None), ())
        assert request["metadata"] == ours.metadata()
        assert prefix == ours.prefix
        assert request["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(submission.STOP_WAIT_S)}
        assert stop_wait_s == submission.STOP_WAIT_S


def test_it_retries_the_codes_after_which_a_retry_helps() -> None:
    decisions, busy, other, final = in_airflow(
        "policy = o.ExitCodePolicy()\n"
        "def decide(error):\n"
        "    decision = policy.evaluate(error, 1, 5)\n"
        "    return decision.action.value, decision.retry_delay and decision.retry_delay.total_seconds()\n"
        "decisions = [decide(o.ImgbatchJobFailed(code, 'text')) for code in given[0]]\n"
        "result = decisions, decisions[given[0].index(7)], decide(o.JobServerUnavailable('away')), sorted(o.FINAL_CODES)",
        CODES,
    )  # fmt: skip
    assert {code for code, (action, _) in zip(CODES, decisions, strict=True) if action == "retry"} == RETRIED
    assert {code for code, (action, _) in zip(CODES, decisions, strict=True) if action == "fail"} == set(
        CODES
    ) - RETRIED
    assert final == sorted(entry.code for entry in EXIT_CODES if entry.code and not entry.retry)
    assert busy == ["retry", 900]
    assert other == ["default", None]


def test_it_reads_the_exit_code_of_a_job_as_submit_does() -> None:
    statuses = ("SUCCEEDED", "FAILED", "STOPPED")
    codes = (
        None,
        0,
        *CODES,
        -signal.SIGINT,
        -signal.SIGKILL,
        -signal.SIGSEGV,
        -signal.SIGTERM,
        128 + signal.SIGSEGV,
        255,
    )
    possible: list[tuple[str, int | None, int | None]] = [
        (status, code, line)
        for status in statuses
        for code in codes
        for line in (None, 0, 3, 130)
        if (status == "SUCCEEDED") == (code == 0) and (status != "STOPPED" or code is None)
    ]
    lines = [None if line is None else end_line.compose("classify", line, {}, None) for *_, line in possible]
    read = in_airflow(
        "result = [o.exit_code({'status': status, 'driver_exit_code': code}, o.last_end_line(text or ''))\n"
        "          for (status, code, _), text in zip(*given)]",
        possible, lines,
    )  # fmt: skip
    assert len(possible) > 60
    for (status, code, line), theirs in zip(possible, read, strict=True):
        assert theirs == exit_code_of_job(RayJob("x", status, exit_code=code), line), (status, code, line)
    assert in_airflow("result = o.exit_code(None, None)") == 3  # the head was replaced, and its jobs forgotten


def test_the_end_line_is_the_last_one_in_the_log() -> None:
    first = end_line.compose("classify", 3, {"run_id": "a"}, "refused")
    last = end_line.compose("classify", 143, {"run_id": "b", "counts": {"listed": 3}}, "stopped")
    logs = [
        f"{first}\ntext\n{last}\n",
        f'{last}\nText after it\n{{"event": "end"}}\n{{"event": ',
        f"{last}\n[1]\n{{}}\n{first}",
        "",
    ]
    found = in_airflow("result = [o.last_end_line(log) for log in given[0]]", logs)
    assert found == [end_line.last_end_line(log) for log in logs]
    assert [line and line["exit_code"] for line in found] == [143, 143, 3, None]


def test_the_date_is_that_of_the_logical_date_in_the_zone() -> None:
    dates = in_airflow(
        "import datetime, types\n"
        "night = datetime.datetime.fromisoformat('2026-11-28T23:30:00+00:00')\n"
        "manual = types.SimpleNamespace(run_after=datetime.datetime.fromisoformat('2026-07-01T22:30:00+00:00'))\n"
        "contexts = {'logical_date': night, 'dag_run': manual}, {'logical_date': None, 'dag_run': manual}\n"
        "result = [o.date_of(context, zone) for context in contexts for zone in ('Europe/Berlin', 'UTC')]"
    )
    assert dates == ["2026-11-29", "2026-11-28", "2026-07-02", "2026-07-01"]


REFUSALS = """
import threading
url, token, foreign = given
result = {}
def attempt(name, action):
    try:
        result[name] = action()
    except o.ImgbatchJobFailed as error:
        result[name] = [error.code, str(error)]
    except o.JobServerUnavailable as error:
        result[name] = ["unavailable", str(error)]
def operator(output, *arguments):
    made = o.ImgbatchOperator(
        task_id="t", verb="classify", output_uri=output, arguments=arguments, command="sleep 600; true"
    )
    made._server = o.JobServer(url, token)
    made._request = made.describe("2026-11-29")
    return made

attempt("no connection", lambda: o.JobServer.of_connection("missing", 0))
attempt("wrong token", lambda: o.JobServer(url, "wrong").newest_job("imgbatch-0-"))
attempt("no server", lambda: o.JobServer("http://127.0.0.1:9", token, patience_s=0).newest_job("imgbatch-0-"))
attempt("invalid request", lambda: o.JobServer(url, token).submit({"entrypoint": "true", "metadata": {"number": 1}}))

operators = [operator("s3://out/twice") for _ in range(4)]
threads = [threading.Thread(target=lambda n=n: attempt(f"start {n}", lambda: operators[n].submit_job({}))) for n in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
other = operator("s3://out/twice", "--model", "other")
attempt("other arguments", lambda: other.submit_job({}))
other.on_kill()  # not its job
attempt("foreign", lambda: operator(foreign).submit_job({}))
result["running"] = o.JobServer(url, token).newest_job(o.id_prefix("classify", "s3://out/twice"))[1]["status"]
operators[0].on_kill()
"""


def test_it_starts_an_output_once_and_refuses_what_it_must(ray_head: RayHead) -> None:
    foreign = submission.Submission("classify", "s3://out/foreign", ()).prefix + "1"
    ray_head.request("/api/jobs/", "POST", {"entrypoint": "sleep 600", "submission_id": foreign})
    found: dict[str, Any] = in_airflow(REFUSALS, ray_head.dashboard, ray_head.token, "s3://out/foreign")

    assert found["no connection"][0] == 2 and "missing" in found["no connection"][1]
    assert found["wrong token"][0] == 2 and "must be the token" in found["wrong token"][1]
    assert found["no server"][0] == "unavailable" and "Connection refused" in found["no server"][1]
    assert found["invalid request"][0] == 2 and "metadata" in found["invalid request"][1]
    started = {found[f"start {number}"] for number in range(4)}
    assert started == {submission.Submission("classify", "s3://out/twice", ()).prefix + "1"}
    assert found["other arguments"][0] == 7 and "other arguments" in found["other arguments"][1]
    assert found["foreign"][0] == 7
    assert found["running"] in ("PENDING", "RUNNING")

    (job_id,) = started
    deadline = time.monotonic() + 120
    while (status := ray_head.request(f"/api/jobs/{job_id}")["status"]) != "STOPPED":
        assert status in ("PENDING", "RUNNING") and time.monotonic() < deadline, status
        time.sleep(0.5)
    ray_head.request(f"/api/jobs/{foreign}/stop", "POST")

"""An Airflow operator that runs imgbatch as a Ray job, in one file. Copy it into the folder of your DAGs.

It needs Airflow 3.3, and nothing of imgbatch or Ray: it sends HTTP requests to the job server of the Ray cluster, which listens
on the port of Ray's dashboard. imgbatch is installed on the nodes of the cluster.

- A task starts at most one job for an output. If the newest job of its verb and output is active, the task attaches to it,
  whoever started it: a lost Airflow worker, a second DAG run, or `imgbatch submit`.
- The exit code of the job decides whether Airflow retries; see `ExitCodePolicy`. A retry resumes the run.
- A task that is killed stops its job. The job has 60 s to commit the rows that it has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pendulum
from airflow.sdk import BaseHook, BaseOperator, ResumableJobMixin, RetryDecision, RetryPolicy
from airflow.sdk.exceptions import AirflowNotFoundException

log = logging.getLogger(__name__)

WRONG_USE, JOB_LOST, BUSY, SIGTERM = 2, 3, 7, 143
FINAL_CODES = frozenset({1, 2, 4, 5, 6, 8})  # the same command fails again: a person must act. All others are retried
ACTIVE = frozenset({"PENDING", "RUNNING"})
STOP_WAIT_S = 60  # by default Ray kills a stopped job after 3 s; imgbatch needs up to `run.stop_timeout_s` (25 s)
_SIGNAL, _STOPPED = 128, (129, 130, SIGTERM)  # larger codes are those of signals; imgbatch handles these
_STOP_TIMEOUT_S = 2  # Airflow sends SIGKILL 5 s after SIGTERM
_LOG_PAUSE = 20  # the log is fetched as a whole: after t seconds for that, not again for 20 t
_LOG_TAIL = 100_000  # characters of the log in which the end line is searched
_NAMED_OUTPUT = frozenset(
    {"classify", "plan", "train", "evaluate"}
)  # verbs with `--output URI`; the others take the URI alone
_RESULT = ("run_id", "output", "counts", "rejects", "this_run", "message")


class ImgbatchJobFailed(Exception):
    """The job ended with an exit code other than 0, or could not be started."""

    def __init__(self, code: int, message: object) -> None:
        super().__init__(f"exit code {code}: {message}")
        self.code = code


class JobServerUnavailable(Exception):
    """The job server gave no usable answer for too long. The job may still be running: a retry attaches to it."""


@dataclass(frozen=True)
class ExitCodePolicy(RetryPolicy):
    """Decide by the exit code of the job whether Airflow retries the task, up to its number of `retries`."""

    busy_delay: timedelta = timedelta(minutes=15)
    """The delay after code 7, another run is writing this output. After other codes it is the `retry_delay` of the task."""

    def evaluate(self, exception: BaseException, try_number: int, max_tries: int, context: Any = None) -> RetryDecision:
        """Fail after codes that a retry does not help; decide about other exceptions as Airflow does."""
        if not isinstance(exception, ImgbatchJobFailed):
            return RetryDecision.default()
        if exception.code in FINAL_CODES:
            return RetryDecision.fail(f"{exception}. A retry would end in the same way")
        return RetryDecision.retry(self.busy_delay if exception.code == BUSY else None, str(exception))

    def serialize(self) -> dict[str, Any]:
        """Return the policy as JSON."""
        return {"busy_delay": self.busy_delay.total_seconds()}


def last_end_line(text: str) -> dict[str, Any] | None:
    """Return the last line of a log that is imgbatch's end line: a JSON object with the exit code. None if there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{") and '"event"' in line:
            with suppress(ValueError):
                found = json.loads(line)
                if found.get("event") == "end" and isinstance(found.get("exit_code"), int):
                    return dict(found)
    return None


def exit_code(job: Mapping[str, Any] | None, end: Mapping[str, Any] | None) -> int:
    """Return the exit code of a job that ended: as Ray recorded it, or else from its end line.

    Ray records no code for a stopped job. A stopped job without an end line counts as ended by SIGTERM (143). A job that was
    killed, was lost with its node, or could not be started counts as 3.
    """
    if job and job["status"] == "SUCCEEDED":
        return 0
    code = job.get("driver_exit_code") if job else None
    if code is not None:
        code = 128 - code if code < 0 else code  # Ray's -9 is 137 in shells: killed by signal 9
        return int(code) if code <= _SIGNAL or code in _STOPPED else JOB_LOST
    if end is not None:
        return int(end["exit_code"])
    return SIGTERM if job and job["status"] == "STOPPED" else JOB_LOST


def id_prefix(verb: str, output: str) -> str:
    """Return what the submission ids of a verb and an output begin with, as in `imgbatch submit`. A number follows."""
    return f"imgbatch-{_digest(verb, output)}-"


def _digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def date_of(context: Mapping[str, Any], timezone: str) -> str:
    """Return the date of a DAG run in a time zone: of its logical date, or of its time where it has none."""
    moment = context.get("logical_date") or context["dag_run"].run_after
    return pendulum.instance(moment).in_timezone(timezone).to_date_string()


def report_late(context: Mapping[str, Any], **_: Any) -> None:
    """Report that a DAG run missed its deadline. EDIT: notify whoever must know."""
    run, deadline = context["dag_run"], context["deadline"]
    log.error("the labels are late: %s has not ended by %s", run["dag_run_id"], deadline["deadline_time"])


class JobServer:
    """The job server of a Ray cluster. Requests are repeated while it is unavailable, for `patience_s` at most."""

    def __init__(
        self, url: str, token: str | None, verify: bool | ssl.SSLContext = True, patience_s: float = 600
    ) -> None:
        self.url, self._patience_s = url, patience_s
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "verify": verify}
        self._client = httpx.Client(**self._options, timeout=30)

    @classmethod
    def of_connection(cls, connection_id: str, patience_s: float) -> JobServer:
        """Return the server of an Airflow connection: its scheme, host and port, and the token as its password."""
        try:
            connection = BaseHook.get_connection(connection_id)
        except AirflowNotFoundException as error:
            raise ImgbatchJobFailed(WRONG_USE, f"{error}. Create the connection as the README shows") from error
        scheme = "https" if "https" in (connection.schema, connection.conn_type) else "http"
        url = f"{scheme}://{connection.host}:{connection.port or 8265}"
        verify = connection.extra_dejson.get("verify", True)
        context = ssl.create_default_context(cafile=verify) if isinstance(verify, str) else bool(verify)
        return cls(url, connection.password, context, patience_s)

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """Return Ray's record of a job; None if there is none, since the head node was replaced."""
        answer = self._request("GET", f"/api/jobs/{submission_id}")
        return dict(answer.json()) if answer.is_success else None

    def newest_job(self, prefix: str) -> tuple[int, dict[str, Any] | None]:
        """Return the largest number that follows a prefix, and the job that has it; 0 and None if there is none."""
        numbered = {}
        for job in self._request("GET", "/api/jobs/").json():
            if match := re.fullmatch(rf"{prefix}(\d+)", job.get("submission_id") or ""):
                numbered[int(match[1])] = job
        number = max(numbered, default=0)
        return number, numbered.get(number)

    def submit(self, job: Mapping[str, Any]) -> bool:
        """Start a job; return False if its submission id is in use."""
        return self._request("POST", "/api/jobs/", json=job).is_success

    def log(self, submission_id: str, patience_s: float = 0) -> str:
        """Return the whole log of a job; empty if its node does not answer."""
        with suppress(JobServerUnavailable):
            answer = self._request("GET", f"/api/jobs/{submission_id}/logs", patience_s)
            return str(answer.json()["logs"]) if answer.is_success else ""
        return ""

    def stop(self, submission_id: str) -> bool:
        """Request the end of a job, twice at most, and do not wait for it; return whether Ray accepted the request.

        The client is a new one: a signal handler calls this, perhaps in the middle of another request.
        """
        for _ in range(2):
            with suppress(httpx.HTTPError), httpx.Client(**self._options, timeout=_STOP_TIMEOUT_S) as client:
                return client.post(f"/api/jobs/{submission_id}/stop").is_success
        return False

    def _request(self, method: str, path: str, patience_s: float | None = None, **options: Any) -> httpx.Response:
        patience_s = self._patience_s if patience_s is None else patience_s
        deadline, pause_s = time.monotonic() + patience_s, 1.0
        while True:
            try:
                answer = self._client.request(method, path, **options)
                if _is_final(answer):
                    return answer
                problem = f"status {answer.status_code}: {answer.text[-500:]}"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            if time.monotonic() >= deadline:
                raise JobServerUnavailable(f"{self.url}{path}: {problem}, for {patience_s:g} s")
            log.warning("the job server at %s is unavailable (%s); trying again in %g s", self.url, problem, pause_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 30)


def _is_final(answer: httpx.Response) -> bool:
    """Return whether an answer can be used; raise if the job server refused the request.

    Whatever the agent of a node refuses, the job server answers with 500; the agent's status is in the text.
    """
    if answer.is_success or "already exists" in answer.text:
        return True
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ImgbatchJobFailed(WRONG_USE, f"{answer.url}: {answer.text}. The connection's password must be the token")
    if answer.status_code == httpx.codes.NOT_FOUND and "does not exist" in answer.text:
        return True
    if answer.status_code < 500 or "status code 400" in answer.text:
        raise ImgbatchJobFailed(WRONG_USE, f"{answer.url} refused the request: {answer.text[-2000:]}")
    return False


class JobLog:
    """Copies the log of a job to the log of the task."""

    def __init__(self, server: JobServer, submission_id: str) -> None:
        self._server, self._id = server, submission_id
        self._copied, self._not_before, self._tail = 0, 0.0, ""

    def copy(self) -> bool:
        """Copy new lines, unless the last request took so long that it is too early for another one.

        Returns:
            whether the end line was copied: the job ends in a moment.
        """
        started = time.monotonic()
        if started >= self._not_before:
            text = self._server.log(self._id)
            self._copy(text[: text.rfind("\n") + 1])
            self._not_before = time.monotonic() + _LOG_PAUSE * (time.monotonic() - started)
        return last_end_line(self._tail) is not None

    def finish(self) -> dict[str, Any] | None:
        """Copy the rest, and return the end line."""
        self._copy(self._server.log(self._id, patience_s=60))
        return last_end_line(self._tail)

    def _copy(self, text: str) -> None:
        for line in text[self._copied :].splitlines():
            log.info("%s", line)
        if len(text) > self._copied:
            self._copied, self._tail = len(text), text[-_LOG_TAIL:]


class ImgbatchOperator(ResumableJobMixin, BaseOperator):
    """Run a verb of imgbatch as a Ray job, follow its log, and end as it ends.

    The result (XCom), and `extra` of the event of each asset in `outlets`, are `submission_id`, and `run_id`, `output`,
    `counts` and `rejects` of the end line.

    Args:
        verb: classify, verify, …
        output_uri: the output. `{date}`, here and in `arguments`, is the date of the DAG run.
        arguments: further arguments of the verb.
        timezone: the time zone of the date.
        ray_conn_id: the Airflow connection of the job server; its password is the token of the cluster.
        command: what starts imgbatch on the head node.
        runtime_env: that of the job. Ray shows it to everybody who can open the dashboard: it must not contain secrets.
        poll_interval_s: time between two requests for the status of the job; it is shorter at the start and at the end.
        patience_s: how long the job server may be unavailable before the task fails. The job is not stopped then.
    """

    external_id_key = "ray_submission_id"
    template_fields = ("output_uri", "arguments", "runtime_env")

    def __init__(
        self, *, verb: str, output_uri: str, arguments: Sequence[str] = (), timezone: str = "UTC",
        ray_conn_id: str = "imgbatch_ray", command: str = "python -m imgbatch", runtime_env: dict[str, Any] | None = None,
        poll_interval_s: float = 5, patience_s: float = 600, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**{"retry_policy": ExitCodePolicy(), **kwargs})
        self.verb, self.output_uri, self.arguments, self.timezone = verb, output_uri, arguments, timezone
        self.ray_conn_id, self.command, self.runtime_env = ray_conn_id, command, runtime_env
        self.poll_interval_s, self.patience_s = poll_interval_s, patience_s
        self._request: dict[str, Any] = {}
        self._end: dict[str, Any] = {}
        self._killed = False

    def execute(self, context: Any) -> dict[str, Any]:
        """Run the job, or attach to it, until it has ended; return the facts of its end line."""
        self._server = JobServer.of_connection(self.ray_conn_id, self.patience_s)
        self._request = self.describe(date_of(context, self.timezone))
        self.execute_resumable(context)
        result = self.get_job_result(self._request["submission_id"], context)
        for asset in self.outlets:
            context["outlet_events"][asset].extra = result
        context["task_state_store"].clear()  # a person who clears the task wants it to run again
        return result

    def describe(self, date: str) -> dict[str, Any]:
        """Return the request that starts the job of a date, without the submission id."""
        flag = ["--output"] if self.verb in _NAMED_OUTPUT else []
        words = [*flag, self.output_uri, *self.arguments, "--date", date]
        runtime_env = dict(self.runtime_env or {})
        runtime_env["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **runtime_env.get("env_vars", {})}
        metadata = {
            "imgbatch.verb": self.verb,
            "imgbatch.output": self.output_uri.replace("{date}", date),
            "imgbatch.arguments": _digest(self.verb, *words),
            "imgbatch.date": date if any("{date}" in word for word in words) else "",
        }
        command = f"{self.command} {shlex.join([self.verb, *words])}"
        return {"entrypoint": command, "runtime_env": runtime_env, "metadata": metadata}

    def submit_job(self, context: Any) -> str:
        """Start the job, or attach to the one that is active for this output; return its submission id."""
        prefix = id_prefix(self.verb, self._request["metadata"]["imgbatch.output"])
        number, newest = self._server.newest_job(prefix)
        if newest and newest["status"] in ACTIVE:
            return self._attach(newest)
        submission_id = f"{prefix}{number + 1}"
        self._request["submission_id"] = submission_id  # before the request, so that on_kill knows it
        if not self._server.submit(self._request):  # somebody else was faster, or the answer to this request was lost
            if not (job := self._server.job(submission_id)):
                raise JobServerUnavailable(f"the id {submission_id} is in use, but its job is not known")
            return self._attach(job)
        log.info("submitted %s: %s", submission_id, self._request["entrypoint"])
        if self._killed:
            self.on_kill()
        return submission_id

    def _attach(self, job: Mapping[str, Any]) -> str:
        if not self._is_same(job):
            self._request.pop("submission_id", None)  # on_kill must not stop it
            raise ImgbatchJobFailed(BUSY, f"{job['submission_id']} has other arguments: {job['entrypoint']}")
        log.info("attached to %s, which is %s", job["submission_id"], job["status"])
        self._request["submission_id"] = job["submission_id"]
        return str(job["submission_id"])

    def _is_same(self, job: Mapping[str, Any]) -> bool:
        return (job.get("metadata") or {}).items() >= self._request["metadata"].items()

    def get_job_status(self, external_id: Any, context: Any) -> str:
        """Return the status of an earlier try's job; OBSOLETE if there is no record of it, or its arguments were others."""
        job = self._server.job(external_id)
        if job is None or (job["status"] == "SUCCEEDED" and not self._is_same(job)):
            return "OBSOLETE"
        if job["status"] in (*ACTIVE, "SUCCEEDED"):
            self._attach(job)
        return str(job["status"])

    def is_job_active(self, status: str) -> bool:
        """Return whether a job can be attached to."""
        return status in ACTIVE

    def is_job_succeeded(self, status: str) -> bool:
        """Return whether a job succeeded."""
        return status == "SUCCEEDED"

    def poll_until_complete(self, external_id: Any, context: Any) -> None:
        """Follow the log until the job has ended. Raise `ImgbatchJobFailed` if its exit code is not 0."""
        job_log, pause_s = JobLog(self._server, external_id), 1.0
        while (job := self._server.job(external_id)) and job["status"] in ACTIVE:
            pause_s = 1.0 if job_log.copy() else min(1.5 * pause_s, self.poll_interval_s)
            time.sleep(pause_s)
        end = job_log.finish() if job else None
        if code := exit_code(job, end):
            reason = (end or job or {}).get("message") or "Ray has no record of it"
            raise ImgbatchJobFailed(
                code, f"{external_id}: {reason.splitlines()[0].partition(', last available logs')[0]}"
            )
        self._end = end or {}

    def get_job_result(self, external_id: Any, context: Any) -> dict[str, Any]:
        """Return the facts of the end line of a job that succeeded."""
        self._end = self._end or last_end_line(self._server.log(external_id, patience_s=60)) or {}
        return {"submission_id": external_id, **{key: self._end[key] for key in _RESULT if key in self._end}}

    def on_kill(self) -> None:
        """Request the end of the job. Airflow calls this in a signal handler, and kills the process 5 s later."""
        self._killed = True
        if submission_id := self._request.get("submission_id"):
            accepted = self._server.stop(submission_id)
            with suppress(RuntimeError):  # the signal may have interrupted a write to the log
                log.warning("%s %s", "requested the end of" if accepted else "could not stop", submission_id)

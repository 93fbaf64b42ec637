"""Effects: `imgbatch submit`: a verb as a Ray job: started or found, followed, stopped, and its exit code."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgbatch.concurrency import process
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config import env_file
from imgbatch.config.secrets import masked
from imgbatch.errors import ClusterError, ConfigError, ImgbatchError
from imgbatch.orchestration.end_line import last_end_line
from imgbatch.orchestration.package import ENV_FILE, Package
from imgbatch.orchestration.submission import STOP_WAIT_S, RayJob, Submission, exit_code_of_job

if TYPE_CHECKING:
    from imgbatch.orchestration.ray_jobs import JobServer

log = logging.getLogger("imgbatch")

_POLL_S = 5.0
_STEP_S = 0.2
_STOP_RETRY_S = 1.0
_LOG_END_S = 20.0
_LOST_TWICE_S = 3.0
_MAX_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The flags of `imgbatch submit`."""

    address: str
    working_dir: Path | None = None
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None
    lost_after_s: float = 300.0
    detach: bool = False


def read_runtime_env(path: str | None) -> dict[str, Any]:
    """Return the runtime environment in a YAML or JSON file; an empty one without a file.

    Raises:
        ConfigError: it cannot be read, or is not a mapping.
    """
    if path is None:
        return {}
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--runtime-env {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--runtime-env {path} is neither YAML nor JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("env_vars") or {}, dict):
        raise ConfigError(f"--runtime-env {path}: expected a mapping, such as env_vars: {{NAME: value}}")
    if "://" in str(value.get("working_dir") or ""):
        raise ConfigError(
            f"--runtime-env {path}: working_dir is a URI, to which the entrypoint cannot be added: use a local directory"
        )
    return value


def read_env_file(path: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `--env-file`; none without a file.

    Raises:
        ConfigError: it cannot be read, or a line is wrong.
    """
    if path is None:
        return {}
    try:
        return env_file.parse(Path(path).read_text(encoding="utf-8"), path, environment)
    except OSError as error:
        raise ConfigError(f"--env-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--env-file {path} is not text in UTF-8") from error


def submit(submission: Submission, package: Package, options: Options, stop: StopRequest) -> int:
    """Run a verb as a Ray job, or follow the job that runs it already; return the job's exit code.

    Raises:
        OutputBusyError: a job with other arguments writes the output.
        ClusterError: the cluster or the job was lost.
        UsageError: Ray does not accept the job.
        Interrupted: a signal arrived before the job was submitted.
    """
    from imgbatch.orchestration.ray_jobs import JobServer

    started = time.monotonic()
    server = JobServer(options.address)
    job = find_or_start(server, submission, package, options, stop)
    if options.detach:
        sys.stdout.write(job.id + "\n")
        return 0
    deadline = None if options.timeout_s is None else started + options.timeout_s
    ended, tail = follow(server, job, stop, options.lost_after_s, deadline)
    return report(ended, tail, submission.output)


def find_or_start(
    server: JobServer, submission: Submission, package: Package, options: Options, stop: StopRequest
) -> RayJob:
    """Return the active job of a submission; start one if there is none.

    Of several submitters at the same time, one starts the job; the others find it.
    """
    from imgbatch.orchestration import ray_jobs

    for _ in range(_MAX_ATTEMPTS):
        found = submission.find(server.jobs())
        if isinstance(found, RayJob):
            log.info("following the Ray job %s, which is %s", found.id, found.status.lower())
            return found
        stop.check()
        with _private_directory() as place:
            archive = place / "job.zip"
            ray_jobs.pack(archive, package, options.working_dir, options.runtime_env.get("excludes") or ())
            runtime_env = {**runtime_env_of(submission, package, options.runtime_env), "working_dir": str(archive)}
            entrypoint = [*package.entrypoint, submission.verb, *package.arguments]
            with suppress(ray_jobs.JobExistsError):  # another submitter was faster
                server.submit(found, entrypoint, runtime_env, submission.metadata())
                log.info("submitted the Ray job %s to %s", found, masked(server.address))
                return RayJob(found, "PENDING")
    raise ClusterError(
        f"the jobs {submission.prefix}… keep changing: other submitters are starting; run it again later"
    )


@contextmanager
def _private_directory() -> Iterator[Path]:
    """Provide a temporary directory that is removed also when a second signal ends the process: it may have secrets."""
    with (
        tempfile.TemporaryDirectory(prefix="imgbatch-") as place,
        process.before_immediate_exit(lambda _: shutil.rmtree(place, ignore_errors=True)),
    ):
        yield Path(place)


def runtime_env_of(submission: Submission, package: Package, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the runtime environment of a job, without its working directory. It is part of Ray's metadata."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **(given.get("env_vars") or {})}
    if submission.date:
        variables["IMGBATCH_DATE"] = submission.date
    if package.variables:
        variables[env_file.VARIABLE] = ENV_FILE
    return {**{key: value for key, value in given.items() if key != "excludes"}, "env_vars": variables}


def follow(
    server: JobServer, job: RayJob, stop: StopRequest, lost_after_s: float, deadline: float | None
) -> tuple[RayJob, str]:
    """Print the log of a job until it has ended; return the job, and the end of its log.

    Args:
        stop: after its signal, the job is stopped, and has time to commit its rows.
        lost_after_s: seconds without an answer after which the cluster counts as lost.
        deadline: when the job is stopped, by the monotonic clock.

    Raises:
        ClusterError: the cluster or the job was lost.
    """
    from imgbatch.orchestration.ray_jobs import LogFollower

    stopper = Stopper(server, job.id)
    with stop.on_request(stopper.start), process.before_immediate_exit(partial(_say_detached, job.id)):
        if stop.signum is not None:  # it arrived before
            stopper.start(stop.signum)
        follower = LogFollower(server, job.id, _write)
        watch = Watch(server, job.id, lost_after_s)
        while not (job := watch.look(job)).has_ended:
            if deadline is not None and time.monotonic() > deadline and not stopper.started:
                log.warning("the time limit (--timeout) has passed: stopping the Ray job %s", job.id)
                stopper.start(None)
            _sleep(_POLL_S, follower.may_have_ended, stopper, deadline)
            follower.may_have_ended.clear()
        return job, follower.finish(_LOG_END_S)


def _sleep(seconds: float, event: threading.Event, stopper: Stopper, deadline: float | None) -> None:
    """Wait for some seconds, until an event, or until the deadline."""
    until = time.monotonic() + seconds
    if deadline is not None and not stopper.started:
        until = min(until, deadline + _STEP_S)
    while time.monotonic() < until and not event.wait(_STEP_S):
        pass


class Watch:
    """Looks for the state of a job, and decides when it is lost."""

    def __init__(self, server: JobServer, job_id: str, lost_after_s: float) -> None:
        self._server, self._job_id, self._lost_after_s = server, job_id, lost_after_s
        self._away_since: float | None = None

    def look(self, before: RayJob) -> RayJob:
        """Return the current state of the job, or the one before if the cluster does not answer.

        Raises:
            ClusterError: the cluster has not answered for too long, or does not know the job.
        """
        from imgbatch.orchestration import ray_jobs

        try:
            job = self._known(ray_jobs.JobLostError)
        except ray_jobs.NotReachedError as error:
            now = time.monotonic()
            if self._away_since is None:
                log.warning("%s; waiting for it, for up to %.0f s", error, self._lost_after_s)
                self._away_since = now
            away = now - self._away_since
            if away >= self._lost_after_s:
                raise ClusterError(
                    f"{error}, for {away:.0f} s: whether the Ray job {self._job_id} is running is not known. Run the same "
                    "command again when the cluster is there: it follows the job, or resumes its work"
                ) from error
            return before
        if self._away_since is not None:
            log.info("the job server answers again: the Ray job is %s", job.status.lower())
        self._away_since = None
        return job

    def _known(self, lost: type[ClusterError]) -> RayJob:
        """Return the state of the job, which Ray must not know twice before it counts as lost."""
        try:
            return self._server.job(self._job_id)
        except lost:
            time.sleep(_LOST_TWICE_S)
        try:
            return self._server.job(self._job_id)
        except lost as error:
            raise ClusterError(
                f"Ray does not know the job {self._job_id} any more: the head of the cluster was started again. Run the same "
                "command again to resume"
            ) from error


class Stopper:
    """Requests the end of a job, in a thread: the main thread may wait for an answer."""

    def __init__(self, server: JobServer, job_id: str) -> None:
        self._server, self._job_id = server, job_id
        self.started = False

    def start(self, signum: int | None) -> None:
        """Send the request until it is answered. Only the first call has an effect."""
        if self.started:
            return
        self.started = True
        threading.Thread(target=self._send, args=(signum,), name="stop request", daemon=True).start()

    def _send(self, signum: int | None) -> None:
        while True:
            try:
                self._server.stop(self._job_id)
            except ImgbatchError as error:
                log.warning("the stop request did not arrive: %s", error)
                time.sleep(_STOP_RETRY_S)
                continue
            cause = "" if signum is None else f" (signal {signum})"
            log.warning(
                "requested the end of the Ray job %s%s; it commits the rows that have arrived", self._job_id, cause
            )
            return


def report(job: RayJob, tail: str, output: str) -> int:
    """Log how a job ended; return its exit code."""
    end = last_end_line(tail)
    code = exit_code_of_job(job, None if end is None else end["exit_code"])
    if end is None and job.status == "STOPPED":
        code = exit_code_of_job(job, None, recorded_exit_code(output, job.started_ms))
    message = (end or {}).get("message") or (job.message.strip().splitlines() or [""])[0]
    log.log(
        logging.WARNING if code else logging.INFO,
        "the Ray job %s ended (%s) with exit code %d%s", job.id, job.status.lower(), code, f": {message}" if code else "",
    )  # fmt: skip
    return code


def recorded_exit_code(output: str, since_ms: int | None) -> int | None:
    """Return the exit code in the run.json of the newest run; None if there is none since a time, or it cannot be read."""
    from datetime import UTC, datetime

    from imgbatch.config.sections import StorageConfig
    from imgbatch.ledger import run_record
    from imgbatch.storage.stores import Folder, Stores

    try:
        folder = Folder(Stores(StorageConfig()), output)
        for name in run_record.newest(folder)[-1:]:
            record = run_record.read_record(folder, name)
            started = datetime.fromisoformat(record["started"])
            if since_ms is None or started >= datetime.fromtimestamp(since_ms // 1000, UTC):
                code = record.get("exit_code")
                return code if isinstance(code, int) else None
    except (ImgbatchError, KeyError, ValueError, TypeError) as error:
        log.debug("run.json could not be read: %s", error)
    return None


def _say_detached(job_id: str, code: int) -> None:
    """Say, when a second signal ends this process, that the job goes on to end by itself."""
    sys.stderr.write(f"detached from the Ray job {job_id}, which ends by itself (exit code {code})\n")
    sys.stderr.flush()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

"""Ray: the job server of a cluster, over HTTP: list, submit, stop, and follow jobs."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from imgbatch.config.secrets import masked
from imgbatch.errors import ClusterError, UsageError
from imgbatch.orchestration import package
from imgbatch.orchestration.submission import RayJob

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_API_ADDRESS, _AUTH_MODE = "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"
_CONNECT_S, _ANSWER_S, _UPLOAD_S = 10.0, 30.0, 300.0
_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_RETRY_S = 2.0
_TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
_TAIL = 200  # chunks of the log that are kept
_LOG_SILENT_S = 300.0  # then the connection that brings the log is made anew


class JobLostError(ClusterError):
    """Ray does not know the job, for example since its head was started again."""


class NotReachedError(ClusterError):
    """The job server gave no answer; the job may be running."""


class JobExistsError(ClusterError):
    """Another job has this id."""


class JobServer:
    """The job server of a cluster."""

    def __init__(self, address: str) -> None:
        """Connect.

        Raises:
            UsageError: the address is not that of a job server, or the cluster has another version of Ray.
            ClusterError: no cluster answers, or it does not accept the token.
        """
        self.address = _normalize(address)
        version = _version(self.address)
        # Ray's client prefers these to the address that it is given, and RAY_ADDRESS may be that of another port.
        os.environ[_API_ADDRESS] = self.address
        import ray
        from ray.job_submission import JobSubmissionClient

        if version != ray.__version__:
            raise UsageError(
                f"the cluster at {self.address} runs Ray {version}, and this is Ray {ray.__version__}: install the same "
                "version here"
            )

        class Client(JobSubmissionClient):  # type: ignore[misc]
            """Ray's client, whose requests would otherwise wait without a limit."""

            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                limit = _UPLOAD_S if method == "PUT" else _ANSWER_S
                return super()._do_request(method, endpoint, **{"timeout": (_CONNECT_S, limit), **options})

        for name in _LOGGERS:  # uploads and connections, on INFO
            logging.getLogger(name).setLevel(logging.ERROR)
        with _errors_mapped(self.address):
            self._client = Client(self.address)

    def jobs(self) -> list[RayJob]:
        """Return the submitted jobs of the cluster."""
        with _errors_mapped(self.address):
            return [_converted(details) for details in self._client.list_jobs() if details.submission_id]

    def job(self, job_id: str) -> RayJob:
        """Return the current state of a job.

        Raises:
            JobLostError: Ray does not know it.
            NotReachedError: the job server gave no answer.
        """
        with _errors_mapped(self.address):
            return _converted(self._client.get_job_info(job_id))

    def submit(
        self, job_id: str, entrypoint: Sequence[str], runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Submit a job.

        Args:
            entrypoint: the words of the command. A leading `exec` is the shell's.
            runtime_env: with the path of the package as `working_dir`.
            metadata: texts by name.

        Raises:
            JobExistsError: there is a job with this id.
        """
        builtin = ["exec"] if entrypoint[0] == "exec" else []
        command = " ".join([*builtin, *map(shlex.quote, entrypoint[len(builtin) :])])
        with _errors_mapped(self.address):
            self._client.submit_job(
                entrypoint=command, submission_id=job_id, runtime_env=dict(runtime_env), metadata=dict(metadata)
            )

    def stop(self, job_id: str) -> None:
        """Request the end of a job. Ray sends SIGTERM."""
        with _errors_mapped(self.address):
            self._client.stop_job(job_id)

    async def tail(self, job_id: str, write: Callable[[str], object]) -> None:
        """Pass the log of a job to `write`, from its beginning, until the server closes the connection."""
        chunks = self._client.tail_job_logs(job_id).__aiter__()
        while True:
            try:
                write(await asyncio.wait_for(anext(chunks), _LOG_SILENT_S))
            except StopAsyncIteration:
                return


class LogFollower:
    """Passes the log of a job on, in a thread, across lost connections."""

    def __init__(self, server: JobServer, job_id: str, write: Callable[[str], object]) -> None:
        self._server, self._job_id, self._write = server, job_id, write
        self._count = 0  # characters that were passed on
        self._tail: deque[str] = deque(maxlen=_TAIL)
        self.may_have_ended = threading.Event()
        """Set when the server has closed the log, as it does when the job ends."""
        self._job_ended, self._complete = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="log of the job", daemon=True).start()

    def finish(self, limit_s: float) -> str:
        """Wait for the rest of the log of a job that has ended, for some seconds; return the last lines."""
        self._job_ended.set()
        self._complete.wait(limit_s)
        return "".join(self._tail)

    def _run(self) -> None:
        while True:
            ended = self._job_ended.is_set()
            try:
                self._read()
            except Exception as error:  # noqa: BLE001 - of aiohttp, asyncio or Ray: they have no common class
                log.debug("the log of %s was interrupted: %s", self._job_id, error)
            else:
                self.may_have_ended.set()
                if ended or self._has_ended():
                    self._complete.set()
                    return
            self._job_ended.wait(_RETRY_S)
            if ended:
                time.sleep(_RETRY_S)

    def _read(self) -> None:
        """Read the log once, from its beginning, and pass on what is new."""
        skipped = 0

        def take(text: str) -> None:
            nonlocal skipped
            new = text[max(0, self._count - skipped) :]
            skipped += len(text)
            if new:
                self._count += len(new)
                self._tail.append(new)
                self._write(new)

        asyncio.run(self._server.tail(self._job_id, take))

    def _has_ended(self) -> bool:
        try:
            return self._server.job(self._job_id).has_ended
        except ClusterError:
            return False


def pack(path: Path, job: package.Package, working_dir: Path | None, excludes: Sequence[str]) -> None:
    """Write the package of a job as a zip archive.

    Args:
        path: of the archive.
        job: the files that are added.
        working_dir: a directory whose files are in the package, except those that .gitignore and .rayignore name.
        excludes: further patterns, as in .gitignore.

    Raises:
        UsageError: the package is larger than Ray's dashboard accepts.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    if working_dir is not None:
        patterns = [*get_runtime_env_default_excludes(), *excludes]
        create_package(str(working_dir), path, include_gitignore=True, excludes=patterns)
    job.add_to(path)
    if path.stat().st_size > DASHBOARD_CLIENT_MAX_SIZE:
        raise UsageError(package.describe_size(path, DASHBOARD_CLIENT_MAX_SIZE))


def _normalize(address: str) -> str:
    """Return the URL of a job server.

    >>> _normalize("head:8265/")
    'http://head:8265'
    """
    address = address.rstrip("/")
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in ("http", "https"):
        raise UsageError(
            f"--address {masked(address)}: give the URL of the cluster's dashboard, such as http://head:8265"
        )
    return address if separator else f"http://{address}"


def _version(address: str) -> str:
    """Return the version of Ray on a cluster, and find out whether it requires a token.

    Raises:
        UsageError: it is no job server.
        ClusterError: it does not answer, or does not accept the token.
    """
    answer = _asked(f"{address}/api/version")
    if _wants_token(answer):
        answer = _asked(f"{address}/api/version", _token_header(address))
        if _wants_token(answer):
            raise ClusterError(
                f"the cluster at {address} does not accept the token of {_TOKEN_PLACES}: use the cluster's"
            )
    with suppress(ValueError, KeyError, TypeError):
        return str(answer.json()["ray_version"])
    raise UsageError(
        f"what answers at {address} is no Ray job server (status {answer.status_code}): give the URL of the cluster's "
        "dashboard, such as http://head:8265"
    )


def _wants_token(answer: requests.Response) -> bool:
    """Return whether this is the answer of Ray to a missing or wrong token, and not of another server."""
    return answer.status_code in (401, 403) and "authentication token" in answer.text


def _token_header(address: str) -> dict[str, str]:
    """Return the header with the user's token, and have Ray's client send it too.

    Raises:
        ClusterError: there is no token.
    """
    os.environ[_AUTH_MODE] = "token"  # before Ray is imported
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    raylet: Any = importlib.import_module("ray._raylet")  # compiled
    if not raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        raise ClusterError(f"the cluster at {address} requires a token, and none was found: set it in {_TOKEN_PLACES}")
    headers: dict[str, str] = get_auth_headers_if_auth_enabled({})
    return headers


def _asked(url: str, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Return the answer to a GET; repeat it for a while if there is none."""
    deadline = time.monotonic() + _CONNECT_S
    while True:
        try:
            return requests.get(url, headers=headers, timeout=(_CONNECT_S, _ANSWER_S))
        except requests.RequestException as error:
            if time.monotonic() > deadline:
                reason = type(error).__name__
                raise ClusterError(
                    f"no Ray cluster answers at {url.removesuffix('/api/version')} ({reason})"
                ) from error
        time.sleep(_RETRY_S)


def _converted(details: Any) -> RayJob:
    return RayJob(
        details.submission_id or "", str(getattr(details.status, "value", details.status)), details.metadata or {},
        details.driver_exit_code, details.message or "", details.start_time,
    )  # fmt: skip


@contextmanager
def _errors_mapped(address: str) -> Iterator[None]:
    """Raise errors of this package for those of Ray's client."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(f"the cluster at {address} does not accept the token of {_TOKEN_PLACES}") from error
    except (requests.RequestException, ConnectionError, TimeoutError) as error:
        raise NotReachedError(f"the job server at {address} does not answer: {type(error).__name__}") from error
    except RuntimeError as error:
        text = masked(str(error))
        if "already exists" in text:
            raise JobExistsError(text) from error
        if "status code 404" in text:
            raise JobLostError(text) from error
        if "status code 5" in text:
            raise NotReachedError(f"the job server at {address} failed: {_last_line(text)}") from error
        raise ClusterError(f"the job server at {address} refused: {_last_line(text)}") from error
    except ValueError as error:
        raise UsageError(f"Ray does not accept the job: {masked(str(error))}") from error


def _last_line(text: str) -> str:
    """Return the last line with text, which is that of the error in a traceback."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

"""Ray: the connection to Ray: to a cluster, or to a local Ray that this process starts."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import psutil

import imgbatch
from imgbatch.concurrency import process_limits
from imgbatch.concurrency.polling import RESULT_THREADS, call_with_timeout, wait_for
from imgbatch.config.sections import ClusterConfig
from imgbatch.errors import ClusterError, ConfigError, ImgbatchError
from imgbatch.terminal import console

_CONNECT_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 300.0  # on a busy machine, a local Ray took up to a minute
_END_TIMEOUT_S = 5.0
_shut_down_event = threading.Event()
"""Set when the Ray that this process started is shut down: the thread that started it may end then."""


@contextmanager
def connected(call_s: float = ClusterConfig().call_s) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or to a local Ray that ends with the block.

    If the block raises, Ray is not shut down and ends with the process (`process.exit_process`): threads of Ray Data are still
    running then, and if one calls Ray after its end, Ray's C++ ends the process at once with exit code 1 (2.60).

    Inside the block stdout is discarded, since Ray writes to it: the output of a job is for people and for pipes. While Ray
    starts or ends, `tick` is called four times a second. An exception from it ends the wait, and Ray's processes end with
    this one.

    Args:
        call_s: the timeout of the shutdown in seconds; that of the start is 300 s.

    Raises:
        ClusterError: the cluster does not answer in time, or runs other versions.
        ConfigError: RAY_ADDRESS is of another kind than HOST:PORT.
        UsageError: a limit of the operating system is too low for Ray.
    """
    process_limits.require_limits()
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # a later default of Ray, which warns if it is unset
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives the run must not start Ray again
    # Without a GCS for 60 s Ray's C++ ends the driver with exit code 1 and no message (2.60): our own timeouts come first.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "86400")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the messages of Ray's C++ parts on the terminal
    address = os.environ.get("RAY_ADDRESS", "")
    console.step("connecting to Ray" if address else "starting Ray on this machine")
    if address:
        _check_reachable(address)
    else:
        _use_own_token()
        # Ray adds it to the niceness of this process. With its default, 15, another process gets 28 times a worker's CPU time.
        os.environ.setdefault("RAY_worker_niceness", "0")
    import ray  # after the variables are set, which it reads when it is imported

    with open(os.devnull, "w") as devnull, redirect_stdout(devnull):
        if ray.is_initialized():
            yield
            return
        try:
            with _stderr_captured():
                _start(address)
        except ImgbatchError:  # of `tick`
            raise
        except Exception as error:
            name = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise ClusterError(f"cannot use {name}: {error}{'' if address else _advice(error)}") from error
        yield
        call_with_timeout(_shut_down, call_s, "ray.shutdown")


def _use_own_token() -> None:
    """Protect a local Ray with a token of this process.

    Ray itself would write a token to the home directory, which may be missing or read-only.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _start(address: str) -> None:
    """Start Ray in a thread: its calls into C++ may take a minute, during which no signal would reach Python."""
    started: Future[bool] = Future()
    _shut_down_event.clear()

    def start() -> None:
        try:
            _init(address)
        except BaseException as error:  # noqa: BLE001 - it is raised where Ray is waited for
            started.set_exception(error)
            return
        started.set_result(True)
        _shut_down_event.wait()  # the kernel kills Ray's processes when the thread that started them ends

    threading.Thread(target=start, name="ray", daemon=True).start()
    wait_for(started, _START_TIMEOUT_S, "ray.init")


def _init(address: str) -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, runtime_env=_runtime_env(), **quiet)
    else:  # without "local" init would join a Ray that a killed run has left
        ray.init(address="local", include_dashboard=False, **quiet)
        _end_autoscaler()


def shut_down(limit_s: float = ClusterConfig().call_s) -> None:
    """Shut Ray down after a job that failed, in a process that continues.

    Threads of Ray Data are still running then, and if one calls Ray after its end, Ray's C++ ends the process (2.60). So
    they are stopped first, and waited for.

    Raises:
        ClusterError: Ray did not shut down within `limit_s` seconds.
    """
    call_with_timeout(_shut_down, limit_s, "ray.shutdown")


def _shut_down() -> None:
    import ray

    _end_datasets()
    ray.shutdown()
    _shut_down_event.set()


def _end_datasets() -> None:
    """End the threads of datasets that were not read to their end, as at the limit of a run: they must not outlive Ray."""
    for thread in threading.enumerate():
        if type(thread).__name__ == "StreamingExecutor":
            thread.shutdown(force=False)  # type: ignore[attr-defined]
    deadline = time.monotonic() + _END_TIMEOUT_S
    for thread in threading.enumerate():
        if thread.name == RESULT_THREADS:  # the dataset that it reads has ended
            thread.join(max(0.0, deadline - time.monotonic()))


def _end_autoscaler() -> None:
    """Kill the autoscaler of a local Ray, which has no task. Ray has no option for this, and waits a second for its end."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(word.endswith("autoscaler/_private/monitor.py") for word in child.cmdline()):
                child.kill()


def _advice(error: Exception) -> str:
    """Return a suffix with the remedy for an error of a local Ray; empty if none is known."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    if isinstance(error, OSError) and str(error.filename or folder).startswith(folder):
        return f" (it keeps its files in {folder}; RAY_TMPDIR moves them)"
    return ""


@contextmanager
def _stderr_captured() -> Iterator[None]:
    """Capture the output of C++ to stderr while Ray starts, and show it only if the start fails."""
    with tempfile.TemporaryFile() as captured:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except Exception as error:
            if not isinstance(error, ImgbatchError):
                captured.seek(0)
                with suppress(OSError):  # stderr may be closed
                    os.write(stderr, captured.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _check_reachable(address: str) -> None:
    """Refuse an address where no cluster answers: Ray itself would wait for minutes, then kill the process.

    A cluster of Ray 2.60 may require a token, which `ray.init` sends only if RAY_AUTH_MODE is set; a cluster that requires
    none refuses a driver that sends one. So the mode is set according to the answer.

    Raises:
        ConfigError: the address is of another kind than HOST:PORT.
        ClusterError: no cluster answers.
    """
    import grpc

    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS={address}: a driver cannot run over Ray Client or a job server; use HOST:PORT of the head, "
            "or ray job submit --working-dir . -- python jobs/classify.py …"
        )
    if address in ("auto", "local"):
        return
    # The nodes of a cluster are not reached through an HTTP proxy. Ray too ignores http_proxy, unless this variable is set.
    use_proxy = os.environ.get("RAY_grpc_enable_http_proxy", "0").lower() in ("1", "true")  # noqa: SIM112
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", int(use_proxy))]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(
                b"", timeout=_CONNECT_TIMEOUT_S, wait_for_ready=False
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                os.environ.setdefault("RAY_AUTH_MODE", "token")
                return
            raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error.details()}") from error


def _runtime_env() -> dict[str, Any] | None:
    """Return a runtime environment that ships this package to the nodes; None under `ray job submit`, which ships its own."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    return {"py_modules": [str(Path(imgbatch.__file__).parent)], "excludes": ["__pycache__"]}

"""Ray: the connection to Ray: to a cluster, or to a Ray of this machine's own."""

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

_CONNECT_S = 10.0
_START_S = 300.0  # a Ray of a machine's own was seen to take a minute where others kept the cores busy
_END_S = 5.0
_ended = threading.Event()
"""Set when the Ray that this process has started is shut down: the thread that started it may end then."""


@contextmanager
def connected(call_s: float = ClusterConfig().call_s) -> Iterator[None]:
    """Be connected to the cluster of RAY_ADDRESS, or to a Ray of this machine's own that ends with the block.

    Where the block raises, Ray is left as it is and ends with the process (`process.exit_process`): threads of Ray Data are
    at work then, and one that calls Ray after its end has Ray's C++ end the process on the spot, with exit code 1 (2.60).

    Inside, stdout is Ray's to chatter on, and goes nowhere: a job's own output is for people and for pipes. While Ray
    starts or ends, `tick` is called four times a second; what it raises ends the wait, and Ray's processes end with this one.

    Args:
        call_s: seconds that the end may take; the start may take 300 s.

    Raises:
        ClusterError: the cluster does not answer, or not in time, or runs other versions.
        ConfigError: RAY_ADDRESS is of a kind that jobs do not run on.
        UsageError: a limit of the operating system is too low for Ray.
    """
    process_limits.require_limits()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; unset, Ray warns
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives the run must not start another Ray
    # A GCS that is gone for 60 s makes Ray's C++ end the driver with 1, without a word: limits of our own come first (2.60).
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "86400")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what Ray's C++ parts print on the terminal
    address = os.environ.get("RAY_ADDRESS", "")
    console.step("connecting to Ray" if address else "starting Ray on this machine")
    if address:
        _knock(address)
    else:
        _use_own_token()
    import ray  # behind the variables, which it reads when it is imported

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        if ray.is_initialized():
            yield
            return
        try:
            with _hushed():
                _start(address)
        except ImgbatchError:  # of `tick`
            raise
        except Exception as error:
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise ClusterError(f"cannot use {where}: {error}{'' if address else _hint(error)}") from error
        yield
        call_with_timeout(_shut_down, call_s, "ray.shutdown")


def _use_own_token() -> None:
    """Guard a Ray of this machine's own with a token of this process; Ray would write one to the home directory.

    That may be missing, or read-only.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _start(address: str) -> None:
    """Have Ray started by a thread: its calls into C++ may take a minute, in which no signal would reach Python."""
    started: Future[bool] = Future()
    _ended.clear()

    def start() -> None:
        try:
            _init(address)
        except BaseException as error:  # noqa: BLE001 - it is raised where Ray is waited for
            started.set_exception(error)
            return
        started.set_result(True)
        _ended.wait()  # the kernel kills Ray's processes when the thread ends that started them

    threading.Thread(target=start, name="ray", daemon=True).start()
    wait_for(started, _START_S, "ray.init")


def _init(address: str) -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, runtime_env=_shipped(), **quiet)
    else:  # "local": a bare init would join whatever a killed run has left behind
        ray.init(address="local", include_dashboard=False, **quiet)
        _end_autoscaler()


def end(limit_s: float = ClusterConfig().call_s) -> None:
    """End Ray after a job that failed, in a process that goes on.

    Threads of Ray Data are at work then, and one that calls Ray after its end has Ray's C++ end the process (2.60). So they
    are stopped first, and waited for.

    Raises:
        ClusterError: Ray does not end within so many seconds.
    """
    call_with_timeout(_shut_down, limit_s, "ray.shutdown")


def _shut_down() -> None:
    import ray

    _end_datasets()
    ray.shutdown()
    _ended.set()


def _end_datasets() -> None:
    """End the threads of datasets that were left early, at the limit of a run: they must not outlive Ray, see `connected`."""
    for thread in threading.enumerate():
        if type(thread).__name__ == "StreamingExecutor":
            thread.shutdown(force=False)  # type: ignore[attr-defined]
    deadline = time.monotonic() + _END_S
    for thread in threading.enumerate():
        if thread.name == RESULT_THREADS:  # what it waits for has come to its end
            thread.join(max(0.0, deadline - time.monotonic()))


def _end_autoscaler() -> None:
    """End the process that would add machines to this one: Ray waits a second for it at its own end, and has no option."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(word.endswith("autoscaler/_private/monitor.py") for word in child.cmdline()):
                child.kill()


def _hint(error: Exception) -> str:
    """Return what to do about an error of a Ray of this machine's own."""
    place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    if isinstance(error, OSError) and str(error.filename or place).startswith(place):
        return f" (it keeps its files in {place}; RAY_TMPDIR moves them)"
    return ""


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what C++ writes to stderr while Ray starts, and show it only if that fails."""
    with tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except Exception as error:
            if not isinstance(error, ImgbatchError):
                kept.seek(0)
                with suppress(OSError):  # nobody may be there to read it
                    os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _knock(address: str) -> None:
    """Refuse an address where no cluster answers: Ray itself would wait for minutes, then kill the process.

    A cluster of Ray 2.60 may want a token, which ray.init shows only where RAY_AUTH_MODE says so, and a cluster without
    does not get on with a driver that shows one.
    """
    import grpc

    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS={address}: Ray Client and job servers are no place for a driver; use HOST:PORT of the head, "
            "or ray job submit --working-dir . -- python jobs/classify.py …"
        )
    if address in ("auto", "local"):
        return
    # The nodes of a cluster are not behind an HTTP proxy. Ray itself ignores http_proxy, unless this variable is set.
    by_proxy = os.environ.get("RAY_grpc_enable_http_proxy", "0").lower() in ("1", "true")  # noqa: SIM112
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", int(by_proxy))]) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(
                b"", timeout=_CONNECT_S, wait_for_ready=False
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                os.environ.setdefault("RAY_AUTH_MODE", "token")
                return
            raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error.details()}") from error


def _shipped() -> dict[str, Any] | None:
    """Return a runtime environment that brings this very package to the nodes; `ray job submit` brings one of its own."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    return {"py_modules": [str(Path(imgbatch.__file__).parent)], "excludes": ["__pycache__"]}

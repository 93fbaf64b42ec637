"""Signals as stop requests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from imgbatch.concurrency.signals import SIGNALS, StopRequest
from imgbatch.errors import Interrupted


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the handlers of pytest. Under nohup, SIGHUP is ignored at the start."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    stop = StopRequest._current
    while stop is not None and stop.signum is not None and stop._requested_at is None:
        time.sleep(0.01)  # the listener must read the signal before the next test, or it would count for that test
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", SIGNALS)
def test_signal_is_recorded_and_raised_by_check(signum: signal.Signals) -> None:
    stop = StopRequest().install()
    stop.check()
    signal.raise_signal(signum)
    with pytest.raises(Interrupted) as raised:
        stop.check()
    assert raised.value.exit_code == {signal.SIGINT: 130}.get(signum, 143)
    assert "same command" in str(raised.value)


def test_signal_ends_an_iteration_at_the_next_item() -> None:
    stop = StopRequest().install()
    seen = []
    with pytest.raises(Interrupted):
        for item in range(10):
            stop.check()
            seen.append(item)
            if item == 3:
                signal.raise_signal(signal.SIGTERM)
    assert seen == [0, 1, 2, 3]


def test_signal_handlers_are_reinstalled_after_ray() -> None:
    stop = StopRequest().install()
    with stop.reinstall_after_ray():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM


def test_check_reinstalls_signal_handlers() -> None:
    stop = StopRequest().install()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop.check()
    signal.raise_signal(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM


def run(program: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    """Run a program that has a StopRequest; `blocked()` is a call in which Python runs no signal handler."""
    before = (
        "import ctypes, os, signal, subprocess, sys, time\n"
        "from imgbatch.concurrency.signals import StopRequest\n"
        "stop = StopRequest().install()\n"
        "def blocked():\n"
        "    deadline = time.monotonic() + 60\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, stop._signals)\n"  # they go to another thread
        "    while time.monotonic() < deadline: ctypes.CDLL(None).sleep(60)\n"
    )
    command = [*prefix, sys.executable, "-c", before + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_second_signal_exits_immediately() -> None:
    ended = run(
        "signal.raise_signal(signal.SIGINT); print('once', flush=True); time.sleep(0.5)\n"
        "for _ in range(60): signal.raise_signal(signal.SIGTERM); time.sleep(1)\n"
        "print('twice')"
    )
    assert ended.stdout == "once\n" and ended.returncode == 128 + signal.SIGTERM


def test_duplicated_ctrl_c_is_one_request() -> None:
    ended = run("for _ in range(3): signal.raise_signal(signal.SIGINT)\ntime.sleep(0.5); print(stop.signum)")
    assert ended.stdout == f"{signal.SIGINT:d}\n" and ended.returncode == 0


def test_second_signal_works_in_a_blocking_call() -> None:
    """The main thread is in a call into C, in which Python runs no signal handler."""
    ended = run(
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True)\n"
        "other = 'import os, signal, sys, time; time.sleep(1); os.kill(os.getppid(), signal.SIGTERM)\\n'\n"
        "other += 'for _ in range(60): time.sleep(1); os.kill(os.getppid(), signal.SIGINT)'\n"
        "subprocess.Popen([sys.executable, '-c', other]); blocked()"
    )
    assert ended.returncode == 128 + signal.SIGINT
    with suppress(psutil.NoSuchProcess):  # the process is a zombie if no parent reaps it
        child = psutil.Process(int(ended.stdout))
        deadline = time.monotonic() + 10  # the kernel may still be ending it
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "a child stays"
            time.sleep(0.05)


def test_a_request_is_passed_on_at_once_even_in_a_blocking_call() -> None:
    ended = run(
        "def pass_on(signum): print('asked', signum, flush=True); os._exit(0)\n"
        "with stop.on_request(pass_on):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); blocked()"
    )
    assert ended.returncode == 0 and ended.stdout == f"asked {signal.SIGTERM:d}\n"


def test_stop_timeout_ends_the_process() -> None:
    ended = run(
        "stop.timeout_s = 1.0\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "with stop.on_timeout(lambda signum: print('noted', signum, flush=True)): blocked()"
    )
    assert ended.returncode == 143 and ended.stdout == f"noted {signal.SIGTERM:d}\n"
    assert "stopped by signal 15, and could not end in order within 1 s (run.stop_timeout_s)" in ended.stderr


def test_unwritable_record_does_not_delay_the_exit() -> None:
    ended = run(
        "stop.timeout_s = 0.5; os.kill(os.getpid(), signal.SIGTERM)\n"
        "with stop.on_timeout(lambda signum: time.sleep(60)): blocked()"
    )
    assert ended.returncode == 143


def test_sighup_is_a_request_unless_ignored() -> None:
    program = "signal.raise_signal(signal.SIGHUP); print(stop.signum)"
    assert run(program).stdout == f"{signal.SIGHUP:d}\n"
    assert run(program, "nohup").stdout == "None\n"

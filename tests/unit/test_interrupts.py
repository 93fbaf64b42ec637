"""Signals as requests."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from imgbatch.errors import Interrupted
from imgbatch.interrupts import StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put the handlers of pytest back."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_raised_where_it_is_asked_for(signum: signal.Signals) -> None:
    stop = StopRequest().install()
    stop.check()
    signal.raise_signal(signum)
    with pytest.raises(Interrupted) as raised:
        stop.check()
    assert raised.value.exit_code == 128 + signum
    assert "same command" in str(raised.value)


def test_iteration_ends_with_the_next_item() -> None:
    stop = StopRequest().install()
    seen = []
    with pytest.raises(Interrupted):
        for item in range(10):
            stop.check()
            seen.append(item)
            if item == 3:
                signal.raise_signal(signal.SIGTERM)
    assert seen == [0, 1, 2, 3]


def test_behind_ray_signals_are_requests_again() -> None:
    stop = StopRequest().install()
    with stop.beside_ray():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)
    assert stop.signum == signal.SIGTERM


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import signal; from imgbatch.interrupts import StopRequest; StopRequest().install()\n"
        "signal.raise_signal(signal.SIGINT); print('once', flush=True); signal.raise_signal(signal.SIGTERM)\n"
        "print('twice')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "once\n" and ended.returncode == -signal.SIGTERM

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from imgbatch.concurrency.watchdog import Watchdog


def test_hanging_call_ends_the_process_despite_busy_threads() -> None:
    ended = threading.Event()
    watchdog = Watchdog(0.4, end=lambda code: ended.set())

    def hang() -> None:
        with watchdog.watching():
            ended.wait(30)

    thread = threading.Thread(target=hang)
    thread.start()
    while not ended.is_set():
        with watchdog.watching():
            time.sleep(0.01)
    thread.join()


def test_calls_that_return_do_not_end_the_process() -> None:
    ended = threading.Event()
    watchdog = Watchdog(0.4, end=lambda code: ended.set())
    for _ in range(10):
        with watchdog.watching():
            time.sleep(0.1)
    with pytest.raises(ZeroDivisionError), watchdog.watching():
        _ = 1 / 0
    assert not ended.wait(1)


def test_thread_ends_with_its_watchdog() -> None:
    before = set(threading.enumerate())
    watchdog = Watchdog(0.4)
    with watchdog.watching():
        time.sleep(0.2)  # the timer in C is armed
    (thread,) = set(threading.enumerate()) - before
    del watchdog
    thread.join(30)
    assert not thread.is_alive()
    assert not threading.Event().wait(1), "the timer would have ended the process"


@pytest.mark.parametrize("hanging", ["time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"], ids=["freely", "with the GIL"])
def test_process_ends_with_a_traceback_of_the_hang(hanging: str) -> None:
    code = f"""
import ctypes, time
from imgbatch.concurrency.watchdog import Watchdog
def hangs():
    {hanging}
with Watchdog(0.5).watching():
    time.sleep(0.3)
    hangs()
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "in hangs" in done.stderr
    assert time.monotonic() - began < 30


def test_code_after_a_call_may_hold_the_gil_longer() -> None:
    code = """
import ctypes, time
from imgbatch.concurrency.watchdog import Watchdog
with Watchdog(0.5).watching():
    time.sleep(0.4)
ctypes.PyDLL(None).sleep(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

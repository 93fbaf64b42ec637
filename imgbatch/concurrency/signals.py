"""Effects: signals as stop requests: a run stops in order, without losing results, and within a time limit."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

from imgbatch.concurrency.monitor import on_tick
from imgbatch.concurrency.process import exit_immediately
from imgbatch.errors import Interrupted, exit_code_of_signal

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

_POLL_S = 0.1
_DUPLICATE_S = 0.3  # a terminal and a wrapper of the command may both forward the same Ctrl-C
_SLOW = 0.25  # of the time limit
_RECORD_S = 3.0  # for writing the record after the time limit; with the default limit 28 s in all: Kubernetes gives 30


def plain_error_line(message: str) -> str:
    """Return an error as text."""
    return f"error: {message}"


error_line: Callable[[str], str] = plain_error_line
"""Formats the error of a process that the limit of the orderly stop ends; `--log-format json` replaces it."""


class StopRequest:
    """Records the first SIGHUP, SIGINT or SIGTERM. A second one ends the process at once.

    The exit code is 128 + the number of the signal that ended the run; SIGHUP counts as SIGTERM.

    Python runs signal handlers between two instructions of the main thread, which may be in a call into C++ or Rust that
    does not return. So `signal.set_wakeup_fd` notifies a thread as well. That thread limits the orderly stop to `timeout_s`;
    after that it calls `on_timeout`, for at most 3 s, and ends the process with its children.
    """

    _current: ClassVar[StopRequest | None] = None

    def __init__(self) -> None:
        self.signum: int | None = None
        self.timeout_s: float = math.inf
        """Set to `run.stop_timeout_s` when the config has been read."""
        self._on_timeout: Callable[[int], object] | None = None
        self._on_request: Callable[[int], object] | None = None
        self._signals: tuple[signal.Signals, ...] = ()
        self._requested_at: float | None = None

    def install(self) -> StopRequest:
        """Install the signal handlers, in the main thread only. Call it again after other code may have replaced them."""
        if not self._signals:
            # A process started by nohup ignores SIGHUP, and must survive the end of its terminal.
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            self._signals = tuple(signum for signum in SIGNALS if not (ignored and signum == signal.SIGHUP))
            is_first, StopRequest._current = StopRequest._current is None, self
            if is_first:
                _start_listener()
        for signum in self._signals:
            signal.signal(signum, self._record)  # also in C, where Ray's handler aborts the process 3 s after SIGTERM
        return self

    @property
    def is_slow(self) -> bool:
        """Whether a quarter of the time for the orderly stop has passed: files that a run can do without are left out then."""
        return self._requested_at is not None and time.monotonic() - self._requested_at >= _SLOW * self.timeout_s

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    @contextmanager
    def on_timeout(self, call: Callable[[int], object]) -> Iterator[None]:
        """Within the block, have `call` made in another thread, with the signal's number, if the orderly stop times out."""
        self._on_timeout = call
        try:
            yield
        finally:
            self._on_timeout = None

    @contextmanager
    def on_request(self, call: Callable[[int], object]) -> Iterator[None]:
        """Within the block, have `call` made at once when the first signal arrives, in another thread, with its number."""
        self._on_request = call
        try:
            yield
        finally:
            self._on_request = None

    @contextmanager
    def reinstall_after_ray(self) -> Iterator[None]:
        """Install the handlers again after the block: when Ray shuts down, it resets SIGTERM to the default (2.60)."""
        try:
            yield
        finally:
            if self._signals:
                self.install()

    def check(self) -> None:
        """Raise if a signal has arrived. Otherwise install the handlers again, since Ray replaces them in other threads.

        Raises:
            Interrupted: with the number of the signal.
        """
        if self._signals and threading.current_thread() is threading.main_thread():
            self.install()
        if self.signum is not None:
            raise Interrupted(self.signum)

    def receive(self, signum: int) -> None:
        """Record a signal in the listener's thread: the main thread may be unable to run its handler for a while."""
        if signal.getsignal(signum) != self._record:
            return
        signal.alarm(0)  # if Ray's handler ran first, it has set an alarm that aborts the process in 3 s
        if self._requested_at is not None:
            if time.monotonic() - self._requested_at >= _DUPLICATE_S:
                exit_immediately(exit_code_of_signal(signum))
            return
        self.signum, self._requested_at = self.signum or signum, time.monotonic()
        if self._on_request is not None:
            self._on_request(self.signum)
        threading.Thread(target=self._enforce_timeout, name="limit of the orderly stop", daemon=True).start()

    def _enforce_timeout(self) -> None:
        """End the process if it has not ended by itself when the time limit expires."""
        assert self._requested_at is not None and self.signum is not None
        never = threading.Event()
        # The limit is read in each step: the config may be read, and set it, after the signal.
        while time.monotonic() - self._requested_at < self.timeout_s:
            never.wait(_POLL_S)
        # Each step has a thread of its own, since both may block: the store, and a pipe on stderr that is not read.
        steps = [step for step in (self._report, self._on_timeout) if step is not None]
        threads = [threading.Thread(target=step, args=(self.signum,), daemon=True) for step in steps]
        deadline = time.monotonic() + _RECORD_S
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        exit_immediately(exit_code_of_signal(self.signum))

    def _report(self, signum: int) -> None:
        sys.stderr.write(error_line(str(Interrupted(signum, self.timeout_s))) + "\n")
        sys.stderr.flush()


@contextmanager
def handle_signals() -> Iterator[StopRequest]:
    """Handle signals as stop requests: `tick` raises within the block after one has arrived. In the main thread only."""
    stop = StopRequest().install()
    with on_tick(stop.check):
        yield stop


def _start_listener() -> None:
    """Have the C handler write signals into a pipe, and read the pipe in a thread, even while the main thread is blocked."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while signums := os.read(reader, 64):
            for signum in signums:
                if StopRequest._current is not None:
                    StopRequest._current.receive(signum)

    threading.Thread(target=listen, name="signals", daemon=True).start()

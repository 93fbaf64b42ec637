"""Effects: signals as requests: a run ends where nothing is lost by it, and within a limit."""

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
from imgbatch.concurrency.process import leave_at_once
from imgbatch.errors import Interrupted

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

_TICK_S = 0.1
_SAME_S = 0.3  # a terminal and a wrapper of the command may both pass on one Ctrl-C
_RECORD_S = 3.0  # of writing the record when the limit has expired; with the default limit 28 s: Kubernetes gives 30


class StopRequest:
    """Remembers the first SIGHUP, SIGINT or SIGTERM; a second one ends the process at once, with 128 + its number.

    The handlers of Python run between two instructions of the main thread, which may be in a call into C++ or Rust that does
    not return. So a thread is notified as well, by `signal.set_wakeup_fd`, and limits the orderly end to `timeout_s`. After
    that it calls `on_timeout`, for at most 3 s, and ends the process with its children.
    """

    _current: ClassVar[StopRequest | None] = None

    def __init__(self) -> None:
        self.signum: int | None = None
        self.timeout_s: float = math.inf
        """Set to `run.stop_timeout_s` when the config has been read."""
        self._on_timeout: Callable[[int], object] | None = None
        self._taken: tuple[signal.Signals, ...] = ()
        self._asked: float | None = None

    def install(self) -> StopRequest:
        """Take the signals over; in the main thread only. Called again whenever another may have taken them since."""
        if not self._taken:
            # What nohup has started is not to end with its terminal.
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            self._taken = tuple(signum for signum in SIGNALS if not (ignored and signum == signal.SIGHUP))
            first, StopRequest._current = StopRequest._current is None, self
            if first:
                _listen()
        for signum in self._taken:
            signal.signal(signum, self._remember)  # also in C, where Ray's handler aborts the process 3 s after SIGTERM
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    @contextmanager
    def on_timeout(self, call: Callable[[int], object]) -> Iterator[None]:
        """Have `call` made, with the number of the signal and in another thread, if the orderly end takes too long."""
        self._on_timeout = call
        try:
            yield
        finally:
            self._on_timeout = None

    @contextmanager
    def beside_ray(self) -> Iterator[None]:
        """Take the signals over again behind Ray, whose end leaves SIGTERM to the kernel: to die on the spot (2.60)."""
        try:
            yield
        finally:
            if self._taken:
                self.install()

    def check(self) -> None:
        """Raise if a signal came; take the signals over again if Ray, which starts and ends in other threads, has them.

        Raises:
            Interrupted: with its number.
        """
        if self._taken and threading.current_thread() is threading.main_thread():
            self.install()
        if self.signum is not None:
            raise Interrupted(self.signum)

    def heard(self, signum: int) -> None:
        """Note a signal, in the listening thread. The main thread may not come to it for a while."""
        if signal.getsignal(signum) != self._remember:
            return
        signal.alarm(0)  # if Ray's handler was first, it has set an alarm: the process would be aborted in 3 s
        if self._asked is not None:
            if time.monotonic() - self._asked >= _SAME_S:
                leave_at_once(128 + signum)
            return
        self.signum, self._asked = self.signum or signum, time.monotonic()
        threading.Thread(target=self._limit, name="limit of the orderly end", daemon=True).start()

    def _limit(self) -> None:
        """Wait for the end of the process, and end it when it does not come."""
        assert self._asked is not None and self.signum is not None
        never = threading.Event()
        while time.monotonic() - self._asked < self.timeout_s:  # which the config sets, perhaps after the signal
            never.wait(_TICK_S)
        # In threads of their own: the store may not answer, and nobody may read stderr.
        steps = [step for step in (self._say, self._on_timeout) if step is not None]
        last = [threading.Thread(target=step, args=(self.signum,), daemon=True) for step in steps]
        deadline = time.monotonic() + _RECORD_S
        for thread in last:
            thread.start()
        for thread in last:
            thread.join(max(0.0, deadline - time.monotonic()))
        leave_at_once(128 + self.signum)

    def _say(self, signum: int) -> None:
        sys.stderr.write(f"error: {Interrupted(signum, self.timeout_s)}\n")
        sys.stderr.flush()


@contextmanager
def handled() -> Iterator[StopRequest]:
    """Take the signals over, and have each `tick` within raise if one has come; in the main thread only."""
    stop = StopRequest().install()
    with on_tick(stop.check):
        yield stop


def _listen() -> None:
    """Have signals written into a pipe, whatever the main thread does, and read them in a thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while heard := os.read(reader, 64):
            for signum in heard:
                if StopRequest._current is not None:
                    StopRequest._current.heard(signum)

    threading.Thread(target=listen, name="signals", daemon=True).start()

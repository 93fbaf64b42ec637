"""Effects: ends a process in which a call does not return: a thread that hangs in C cannot be stopped otherwise."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_POLL_S = 1.0


class Watchdog:
    """Limits the time of calls in all threads of its process. Ray repeats the work of a process that was ended."""

    def __init__(self, seconds: float, end: Callable[[int], object] = os._exit) -> None:
        self._seconds, self._end = seconds, end
        self._started: dict[int, float] = {}
        self._armed = False
        interval_s = min(_POLL_S, seconds / 4)
        threading.Thread(target=_watch, args=(weakref.ref(self), interval_s), name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """End the process if the block takes longer than `seconds`."""
        thread = threading.get_ident()
        self._started[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._started[thread]
            if self._armed and not self._started:
                self._disarm()

    def check(self) -> bool:
        """End the process if a call has taken too long; return whether the timer in C runs. Called in a separate thread."""
        started = list(self._started.values())
        if not started:
            self._disarm()
        elif time.monotonic() - min(started) > self._seconds:
            faulthandler.dump_traceback()  # into the worker's log: it shows where the call hangs
            self._end(1)
        else:  # a call that never releases the GIL stops this thread as well; the timer in C needs no GIL
            self._armed = True
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True)
        return self._armed

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            faulthandler.cancel_dump_traceback_later()


def _watch(watchdog: weakref.ref[Watchdog], interval_s: float) -> None:
    """Check at regular intervals until the watchdog is deleted. The thread has a weak reference, or it would keep it alive."""
    never, armed = threading.Event(), False
    while not never.wait(interval_s):
        if (current := watchdog()) is None:
            if armed:  # the timer was started after the last call had ended
                faulthandler.cancel_dump_traceback_later()
            return
        armed = current.check()
        del current

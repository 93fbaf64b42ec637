"""Effects: ends a process in which a call does not return: a thread that hangs in C cannot be stopped in another way."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOKS_EVERY_S = 1.0


class Watchdog:
    """Watches calls in all threads of its process. What the process had under way is then Ray's to do again."""

    def __init__(self, seconds: float, end: Callable[[int], object] = os._exit) -> None:
        self._seconds, self._end = seconds, end
        self._began: dict[int, float] = {}
        self._armed = False
        interval_s = min(_LOOKS_EVERY_S, seconds / 4)
        threading.Thread(target=_watch, args=(weakref.ref(self), interval_s), name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """End the process if the block takes longer than `seconds`."""
        thread = threading.get_ident()
        self._began[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._began[thread]
            if self._armed and not self._began:
                self._disarm()

    def look(self) -> bool:
        """End the process if a call has taken too long; return whether C's timer runs. Called in a thread of its own."""
        began = list(self._began.values())
        if not began:
            self._disarm()
        elif time.monotonic() - min(began) > self._seconds:
            faulthandler.dump_traceback()  # into the worker's log: where it hangs
            self._end(1)
        else:  # a call that never lets go of the GIL stops this thread as well; C's timer needs no GIL
            self._armed = True
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True)
        return self._armed

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            faulthandler.cancel_dump_traceback_later()


def _watch(watchdog: weakref.ref[Watchdog], interval_s: float) -> None:
    """Look at regular intervals, for as long as somebody holds the watchdog: its thread must not keep it alive."""
    pause, armed = threading.Event(), False
    while not pause.wait(interval_s):
        if (held := watchdog()) is None:
            if armed:  # since its last call had ended
                faulthandler.cancel_dump_traceback_later()
            return
        armed = held.look()
        del held

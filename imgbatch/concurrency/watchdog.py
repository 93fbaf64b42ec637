"""Effects: ends a process in which a call does not return: a thread that hangs in C cannot be stopped in another way."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOOKS_EVERY_S = 1.0


class Watchdog:
    """Watches calls in all threads of its process. What the process had under way is then Ray's to do again."""

    def __init__(self, seconds: float, end: Callable[[int], object] = os._exit) -> None:
        self._seconds, self._end = seconds, end
        self._began: dict[int, float] = {}
        self._armed = False
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

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

    def _watch(self) -> None:
        tick = threading.Event()
        while not tick.wait(min(_LOOKS_EVERY_S, self._seconds / 4)):
            began = list(self._began.values())
            if not began:
                self._disarm()
            elif time.monotonic() - min(began) > self._seconds:
                faulthandler.dump_traceback()  # into the worker's log: where it hangs
                self._end(1)
                return
            else:  # a call that never lets go of the GIL stops this thread as well; C's timer needs no GIL
                self._armed = True
                faulthandler.dump_traceback_later(2 * self._seconds, exit=True)

    def _disarm(self) -> None:
        self._armed = False
        faulthandler.cancel_dump_traceback_later()

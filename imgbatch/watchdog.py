"""Ends a process in which a call does not return: a thread that hangs in C cannot be stopped in another way."""

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

    def _watch(self) -> None:
        while True:
            time.sleep(min(_LOOKS_EVERY_S, self._seconds / 4))
            began = list(self._began.values())
            if not began:
                faulthandler.cancel_dump_traceback_later()
            elif time.monotonic() - min(began) > self._seconds:
                faulthandler.dump_traceback()  # into the worker's log: where it hangs
                self._end(1)
                return
            else:  # a call that never lets go of the GIL stops this thread as well; C's timer needs no GIL
                faulthandler.dump_traceback_later(2 * self._seconds, exit=True)

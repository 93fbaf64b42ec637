"""Effects: how far the images of a run are: a bar on a terminal, a log line every 10 s elsewhere."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from imgbatch.terminal import console, plurals
from imgbatch.terminal.plurals import number

log = logging.getLogger(__name__)

_WINDOW_S = 30.0


@dataclass
class Rate:
    """Images a second over the last half minute, so that the time left is true when the rate changes."""

    clock: Callable[[], float] = time.monotonic
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def mark(self, done: int) -> None:
        """Note how many are done now; the time before the first is not the images'."""
        if not done:
            return
        now = self.clock()
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW_S:
            self._marks.popleft()

    def __call__(self) -> float:
        """Return the rate; 0 as long as it is not known."""
        if len(self._marks) < 2:
            return 0.0
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0


def line(done: int, total: int | None, rejected: int, rate: float) -> str:
    """Return how far the images are; the total is not known if tars are to be read.

    >>> line(1500, 4000, 2, 100.0)
    '1,500/4,000 images, 0:25 left, 100/s, 2 rejects'
    """
    speed, refused = f"{number(rate)}/s", f"{rejected:,} reject{'s' * (rejected != 1)}"
    if total is None:
        return f"{done:,} images, {speed}, {refused}"
    left = f"{plurals.clock((total - done) / rate)} left" if rate else "time left unknown"
    return f"{done:,}/{total:,} images, {left}, {speed}, {refused}"


class Progress:
    """Shows how many images of a step are done. Until the first row comes, it is the step before that is shown."""

    def __init__(self, name: str, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._total, self._rate = name, total, Rate(clock)
        self._done, self._waiting, self._started = 0, True, False

    def start(self, pending: int, rows: int) -> None:
        """Show that work is handed out, until rows of it come: `pending` images, in units of up to `rows`."""
        if self._started:
            what = "images" if self._total is not None else "images and tars"
            again = f"handing out {pending:,} {what} again that did not come back, in units of {rows:,}"
            log.info("%s", again)
            console.step(again)
        else:
            console.step("starting the workers")
        self._started = self._waiting = True

    def update(self, done: int, rejected: int) -> None:
        """Show `done` images with a row, `rejected` of them rejects."""
        self._rate.mark(done)
        if done > self._done:
            self._done, self._waiting = done, False
        if not self._waiting:
            console.step(self._name)
            console.show(line(done, self._total, rejected, self._rate()), done, self._total)

    def close(self) -> None:
        """Show that what remains is to be written."""
        console.step("committing the last rows")

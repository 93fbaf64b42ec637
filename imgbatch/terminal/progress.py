"""Effects: the progress of a run: a bar on a terminal, otherwise a log line every 10 s."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from imgbatch.terminal import console, plurals
from imgbatch.terminal.plurals import counted, number

log = logging.getLogger(__name__)

_WINDOW_S = 30.0


@dataclass
class Rate:
    """Images per second over the last 30 s, so that the time left follows changes of the rate."""

    clock: Callable[[], float] = time.monotonic
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def mark(self, done: int) -> None:
        """Record the number of images done now. The time before the first image does not count."""
        if not done:
            return
        now = self.clock()
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW_S:
            self._marks.popleft()

    def __call__(self) -> float:
        """Return the rate; 0 while it is unknown."""
        if len(self._marks) < 2:
            return 0.0
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def seconds_left(self, done: int, total: int | None) -> float | None:
        """Return the time for the remaining images at this rate; None if the rate or the total is unknown."""
        rate = self()
        return (total - done) / rate if rate and total is not None else None


def progress_line(done: int, total: int | None, rejected: int, rate: float) -> str:
    """Return the progress as a line of text. The total is unknown if the input has tars.

    >>> progress_line(1500, 4000, 2, 100.0)
    '1,500/4,000 images, 0:25 left, 100/s, 2 rejects'
    """
    speed, rejects = f"{number(rate)}/s", counted(rejected, "reject")
    if total is None:
        return f"{done:,} images, {speed}, {rejects}"
    left = f"{plurals.clock((total - done) / rate)} left" if rate else "time left unknown"
    return f"{done:,}/{total:,} images, {left}, {speed}, {rejects}"


class Progress:
    """Shows the progress of a step in images. Until the first row arrives, the step of starting or retrying is shown."""

    def __init__(self, name: str, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._total, self._rate = name, total, Rate(clock)
        self._done, self._waiting, self._started = 0, True, False

    def start(self, pending: int, rows: int) -> None:
        """Show, until rows arrive, that `pending` images were submitted in units of up to `rows`."""
        if self._started:
            noun = "images" if self._total is not None else "images and tars"
            text = f"submitting {pending:,} lost {noun} again, in units of {rows:,}"
            log.info("%s", text)
            console.step(text)
        else:
            console.step("starting the workers")
        self._started = self._waiting = True

    def update(self, done: int, rejected: int) -> None:
        """Show that `done` images have a row, `rejected` of them a reject."""
        self._rate.mark(done)
        if done > self._done:
            self._done, self._waiting = done, False
        if not self._waiting:
            console.step(self._name)
            console.show(progress_line(done, self._total, rejected, self._rate()), done, self._total)

    def facts(self) -> dict[str, int | float | None]:
        """Return the progress for run.json: images done, their total, images per second, and seconds left."""
        left = self._rate.seconds_left(self._done, self._total)
        return {
            "done": self._done,
            "total": self._total,
            "rate": round(self._rate(), 2) or None,
            "seconds_left": None if left is None else round(left, 1),
        }

    def close(self) -> None:
        """Show that the remaining rows are written."""
        console.step("committing the last rows")

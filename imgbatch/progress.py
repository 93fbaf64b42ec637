"""What a person sees while a run goes on: a line that moves on a terminal, a log line each 10 s elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TextIO

log = logging.getLogger("imgbatch")

_WINDOW_S = 30.0
_LOG_EACH_S = 10.0
_STARTING = "starting the actors"


class Progress(Protocol):
    """Shows how far a run is."""

    def update(self, done: int, rejected: int) -> None:
        """Show `done` images with a row, `rejected` of them rejects."""

    def close(self) -> None:
        """Stop showing."""


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
    """Return the progress line; the total is not known where tars are to be read.

    >>> line(1500, 4000, 2, 100.0)
    '1,500/4,000 images (37 %), 100/s, 2 rejects, 0:00:25 left'
    """
    if total is None:
        return f"{done:,} images, {rate:,.0f}/s, {rejected:,} reject{'s' * (rejected != 1)}"
    share = 100 * done // total if total else 100
    left = f"{_clock((total - done) / rate)} left" if rate else "time left not known yet"
    return f"{done:,}/{total:,} images ({share} %), {rate:,.0f}/s, {rejected:,} reject{'s' * (rejected != 1)}, {left}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


class LogProgress:
    """A log line each 10 s."""

    def __init__(self, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock, self._rate, self._said = total, clock, Rate(clock), clock()

    def update(self, done: int, rejected: int) -> None:
        """Log, if it is time."""
        self._rate.mark(done)
        if self._clock() - self._said >= _LOG_EACH_S:
            self._said = self._clock()
            text = line(done, self._total, rejected, self._rate()) if done else _STARTING
            log.info("%s", text)

    def close(self) -> None:
        """Do nothing."""


class TerminalProgress:
    """A bar that moves."""

    def __init__(self, total: int | None, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._total, self._rate = total, Rate()
        self._bar = Bar(BarColumn(24), TextColumn("{task.description}"), console=Console(file=stream), transient=True)
        self._task = self._bar.add_task(_STARTING, total=total)
        self._bar.start()

    def update(self, done: int, rejected: int) -> None:
        """Move the bar."""
        self._rate.mark(done)
        text = line(done, self._total, rejected, self._rate()) if done else _STARTING
        self._bar.update(self._task, completed=done, description=text)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def progress(total: int | None, stream: TextIO | None = None) -> Progress:
    """Return what fits the stream, stderr if none is given."""
    stream = stream or sys.stderr  # as it is now: it may have been replaced since the import
    return TerminalProgress(total, stream) if stream.isatty() else LogProgress(total)

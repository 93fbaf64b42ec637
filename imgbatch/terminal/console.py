"""Effects: what a job shows on stderr: log lines and, on a terminal, the current step below them.

Both go through one console, so that neither overwrites the other. Elsewhere (a pipe, cron, the logs of a Ray job) the
current step is a log line every 10 s, and nothing but text is written.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

from imgbatch.terminal.plurals import clock

log = logging.getLogger(__name__)

INTERVAL_S = 10.0
"""Between two log lines that name the current step, where there is no terminal."""

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_DATE = "%Y-%m-%dT%H:%M:%S%z"  # ISO 8601
_NO_CURSOR = ("", "dumb", "unknown")  # values of TERM
# Names of files may hold control characters, which a terminal would obey.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Formatter(logging.Formatter):
    """Writes a log record as `2026-11-28T19:44:36+0000 INFO text`, with control characters escaped."""

    def __init__(self) -> None:
        super().__init__(_FORMAT, _DATE)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or lines."""
        return escaped(super().format(record))


@dataclass(slots=True)
class State:
    """What the job is doing."""

    started: float
    """When the job began, on the console's clock."""
    name: str = ""
    """Of the current step; empty: there is none."""
    since: float = 0.0
    text: str = ""
    """How far the step is."""
    done: int = 0
    total: int | None = None

    @property
    def share(self) -> str:
        """How much of the step is done, if that is known."""
        return f"{100 * self.done // self.total} %" if self.total else ""

    def line(self, now: float) -> str:
        """Return the step as a log line shows it."""
        text = ", ".join(filter(None, (self.share, self.text)))
        return f"{self.name}: {text}" if text else f"{self.name} ({clock(now - self.since)})"


class View(Protocol):
    """Shows the current step."""

    def refresh(self) -> None:
        """Show it at once, since there is another one."""

    def close(self) -> None:
        """Stop showing it."""


class Console:
    """Log lines and the current step of a job, on one stream."""

    def __init__(
        self, stream: TextIO | None = None, *, quiet: bool = False, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Without a stream, nothing is shown: somebody else's program uses the package."""
        self.now = now
        self.state = State(now())
        self._stream, self._quiet = stream, quiet
        self._view: View | None = None
        self._terminal = None
        if stream is not None:
            handler: logging.Handler = logging.StreamHandler(stream)
            if is_terminal(stream):
                from imgbatch.terminal import live_line  # rich takes 40 ms to import

                self._terminal = live_line.open_on(stream)
                handler = live_line.Handler(self._terminal)
            handler.setFormatter(Formatter())
            logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler], force=True)

    def step(self, name: str) -> None:
        """Name what the job does from now on; the same name again changes nothing."""
        if name == self.state.name:
            return
        self.state = State(self.state.started, name, self.now())
        if self._view is not None:
            self._view.refresh()
        elif self._stream is not None and not self._quiet:
            if self._terminal is None:
                self._view = LogView(self)
            else:
                from imgbatch.terminal.live_line import TerminalView

                self._view = TerminalView(self, self._terminal)

    def show(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Say how far the current step is, with a bar if there is a total."""
        self.state.text, self.state.done, self.state.total = text, done, total

    def close(self) -> None:
        """Remove what is shown of the step; the next step shows itself again."""
        view, self._view = self._view, None
        if view is not None:
            view.close()
        self.state = State(self.state.started)


class LogView:
    """Logs the current step every 10 s, from a thread: the main thread may be waiting for anything."""

    def __init__(self, console: Console, *, tick_s: float = 1.0) -> None:
        self._console, self._logged = console, console.now()
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=(tick_s,), name="console", daemon=True).start()

    def tick(self) -> None:
        """Log the step, if it is time."""
        now, state = self._console.now(), self._console.state
        if state.name and now - self._logged >= INTERVAL_S:
            self._logged = now
            log.info("%s", state.line(now))

    def refresh(self) -> None:
        """Wait for the time to log it."""

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _run(self, tick_s: float) -> None:
        while not self._closed.wait(tick_s):
            self.tick()


def escaped(text: str) -> str:
    r"""Return a text without control characters but newlines and tabs.

    >>> escaped("a\x1b[2J.jpg")
    'a\\x1b[2J.jpg'
    """
    return text.translate(_CONTROL)


def is_terminal(stream: TextIO) -> bool:
    """Return whether lines can be drawn again on a stream."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in _NO_CURSOR


def log_in_worker() -> None:
    """Give the warnings of a worker process the format of the driver's, in whatever file Ray keeps them."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])  # nothing, if there is a handler already


_console = Console()


def install(stream: TextIO, *, quiet: bool = False) -> None:
    """Show the log and the steps of this process from now on; with `quiet`, warnings and errors alone."""
    global _console
    _console.close()
    _console = Console(stream, quiet=quiet)


def step(name: str) -> None:
    """Name what the job does from now on."""
    _console.step(name)


def show(text: str, done: int = 0, total: int | None = None) -> None:
    """Say how far the current step is."""
    _console.show(text, done, total)


def close() -> None:
    """Remove what is shown of the current step."""
    _console.close()

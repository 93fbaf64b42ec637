"""Effects: what a job shows on stderr: log lines and, on a terminal, the current step below them.

Both are written by one console, so that neither overwrites the other. Without a terminal (a pipe, cron, the logs of a Ray
job), the current step is logged every 10 s, and only plain text is written.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO

from imgbatch.config.secrets import masked
from imgbatch.terminal.plurals import clock

log = logging.getLogger(__name__)

INTERVAL_S = 10.0
"""Seconds between two log lines about the current step, without a terminal."""

_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_DATE = "%Y-%m-%dT%H:%M:%S%z"  # ISO 8601
_NO_CURSOR = ("", "dumb", "unknown")  # values of TERM
# File names may contain control characters, which a terminal would execute.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Formatter(logging.Formatter):
    """Formats a log record as `2026-11-28T19:44:36+0000 INFO text`, with control characters escaped."""

    def __init__(self) -> None:
        super().__init__(_FORMAT, _DATE)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line or lines of a record."""
        return escape_control_characters(super().format(record))


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON: time, level, logger, message, and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = masked(self.formatException(record.exc_info))
        return json.dumps(line)


@dataclass(slots=True)
class State:
    """The current step of a job, and its progress."""

    started: float
    """The start of the job, by the console's clock."""
    name: str = ""
    """The name of the step; empty: no step."""
    since: float = 0.0
    """The start of the step."""
    text: str = ""
    """The progress of the step."""
    done: int = 0
    total: int | None = None

    @property
    def percentage(self) -> str:
        """The proportion of the step that is done; empty if the total is unknown."""
        return f"{100 * self.done // self.total} %" if self.total else ""

    def line(self, now: float) -> str:
        """Return the text of a log line about the step."""
        text = ", ".join(filter(None, (self.percentage, self.text)))
        return f"{self.name}: {text}" if text else f"{self.name} ({clock(now - self.since)})"


class View(Protocol):
    """A display of the current step."""

    def refresh(self) -> None:
        """Update the display: the step has changed."""

    def close(self) -> None:
        """Remove the display."""


class Console:
    """Shows log lines and the current step of a job on one stream."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        quiet: bool = False,
        json_lines: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up logging on a stream. Without a stream nothing is shown, for programs that import the package."""
        self.now = now
        self.state = State(now())
        self._stream, self._quiet = stream, quiet
        self._view: View | None = None
        self._terminal = None
        if stream is not None:
            handler: logging.Handler = logging.StreamHandler(stream)
            if is_terminal(stream) and not json_lines:
                from imgbatch.terminal import live_line  # rich takes 40 ms to import

                self._terminal = live_line.open_on(stream)
                handler = live_line.Handler(self._terminal)
            handler.setFormatter(JsonFormatter() if json_lines else Formatter())
            logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler], force=True)

    def step(self, name: str) -> None:
        """Start a step. Nothing changes if it is already the current one."""
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
        """Show the progress of the current step, with a bar if there is a total."""
        self.state.text, self.state.done, self.state.total = text, done, total

    def close(self) -> None:
        """Remove the display of the step, until the next step starts."""
        view, self._view = self._view, None
        if view is not None:
            view.close()
        self.state = State(self.state.started)


class LogView:
    """Logs the current step every 10 s, in a thread, since the main thread may block."""

    def __init__(self, console: Console, *, tick_s: float = 1.0) -> None:
        self._console, self._logged = console, console.now()
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=(tick_s,), name="console", daemon=True).start()

    def tick(self) -> None:
        """Log the step if the last line is 10 s old."""
        now, state = self._console.now(), self._console.state
        if state.name and now - self._logged >= INTERVAL_S:
            self._logged = now
            log.info("%s", state.line(now))

    def refresh(self) -> None:
        """Do nothing: the step is logged at the next interval."""

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _run(self, tick_s: float) -> None:
        while not self._closed.wait(tick_s):
            self.tick()


def json_error(message: str, error: BaseException | None = None) -> str:
    """Return an error that ends the process as a log line of JSON; with its traceback if it is a bug."""
    info = None if error is None else (type(error), error, error.__traceback__)
    return JsonFormatter().format(logging.LogRecord("imgbatch", logging.ERROR, "", 0, message, (), info))


def escape_control_characters(text: str) -> str:
    r"""Return a text with its control characters escaped, except newlines and tabs.

    >>> escape_control_characters("a\x1b[2J.jpg")
    'a\\x1b[2J.jpg'
    """
    return text.translate(_CONTROL)


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in _NO_CURSOR


def log_in_worker() -> None:
    """Use the log format of the driver in a worker process, for the log files of Ray."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])  # no effect if there is a handler already


_console = Console()


def install(stream: TextIO, *, quiet: bool = False, json_lines: bool = False) -> None:
    """Show the log and the steps of this process on a stream.

    Args:
        quiet: only warnings and errors.
        json_lines: a JSON object a line, also for Python's warnings and for errors of threads.
    """
    global _console
    _console.close()
    _console = Console(stream, quiet=quiet, json_lines=json_lines)
    logging.captureWarnings(json_lines)
    threading.excepthook = _log_thread_error if json_lines else threading.__excepthook__


def _log_thread_error(hook: threading.ExceptHookArgs) -> None:
    """Log an error that ended a thread."""
    error = hook.exc_value or hook.exc_type()
    name = hook.thread.name if hook.thread is not None else "?"
    log.error("thread %s ended: %s", name, error, exc_info=error)


def step(name: str) -> None:
    """Start a step, on the console of this process."""
    _console.step(name)


def show(text: str, done: int = 0, total: int | None = None) -> None:
    """Show the progress of the current step."""
    _console.show(text, done, total)


def current_step() -> dict[str, Any] | None:
    """Return the current step for run.json: its name, progress and seconds; None if there is none."""
    state = _console.state
    if not state.name:
        return None
    seconds = round(_console.now() - state.since, 1)
    return {"name": state.name, "text": state.text, "done": state.done, "total": state.total, "seconds": seconds}


def close() -> None:
    """Remove the display of the current step."""
    _console.close()

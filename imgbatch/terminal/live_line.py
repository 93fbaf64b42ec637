"""Effects: the console on a terminal, with rich: a line with a spinner, a clock and the current step, below the log.

Imported only if stderr is a terminal.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleDimensions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from imgbatch.terminal.plurals import clock

if TYPE_CHECKING:
    from imgbatch.terminal.console import Console

_printing = threading.RLock()
"""Held while a record is printed, and while the line is shown first or removed. rich does both in several steps: a record of
another thread between them would be on the same line, or would be erased in its place."""
_PER_SECOND = 5  # redraws, in a thread of the driver; more of them would slow down the handling of rows
_MIN_BAR, _MAX_BAR = 8, 40
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}


class Terminal(RichConsole):
    """A terminal with a cursor that is always visible: a process that is killed could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing: rich would hide the cursor."""
        return False

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        """The size of this terminal. rich asks the three standard streams, which may be redirected."""
        try:
            columns, lines = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError):
            columns, lines = 0, 0
        return ConsoleDimensions(columns or 80, lines or 25)


def open_on(stream: TextIO) -> Terminal:
    """Return the terminal of a stream."""
    return Terminal(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)


class Handler(logging.Handler):
    """Prints log records above the current step."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record. The terminal wraps long lines, so that a URI can be copied as a whole."""
        try:
            text = Text(self.format(record))
            text.stylize("dim", 0, len(text.plain.partition(" ")[0]))
            if style := _STYLES.get(record.levelno):
                at = text.plain.index(record.levelname)
                text.stylize(style, at, at + len(record.levelname))
            with _printing:
                self._terminal.print(text, soft_wrap=True)
        except Exception:  # noqa: BLE001 - as logging's own handlers do
            self.handleError(record)


class TerminalView:
    """Draws the current step as the last line, and removes it at the end."""

    def __init__(self, console: Console, terminal: Terminal) -> None:
        self._console, self._terminal = console, terminal
        self._spinner = Spinner("dots" if terminal.encoding.startswith("utf") else "line")
        # Other output to stderr, such as warnings, is printed above the line. stdout is for results only.
        self._live = Live(
            console=terminal, get_renderable=self._line, transient=True, refresh_per_second=_PER_SECOND,
            redirect_stdout=False, redirect_stderr=True,
        )  # fmt: skip
        with _printing:
            self._live.start(refresh=True)

    def refresh(self) -> None:
        """Draw the line now."""
        self._live.refresh()

    def close(self) -> None:
        """Remove the line."""
        with _printing:
            self._live.stop()

    def _line(self) -> Table:
        """Return the line, cut to the width: first the bar is narrowed, then replaced by a percentage, then the text is cut."""
        state, now = self._console.state, self._console.now()
        width = self._terminal.width - 1  # terminals handle a full last column differently
        frame = self._spinner.render(self._terminal.get_time())
        left = Text(f"{frame} {clock(now - state.started)} {state.name}", style="cyan")
        text = Text(state.text or f"({clock(now - state.since)})")
        bar = min(_MAX_BAR, width - len(left) - len(text) - 2)
        has_bar = bool(state.total) and bar >= _MIN_BAR
        if state.percentage and not has_bar:
            text = Text(f"{state.percentage}, {state.text}")
        left.truncate(width, overflow="crop")
        text.truncate(max(0, width - len(left) - 1), overflow="crop")
        parts: list[Text | ProgressBar] = [left, text]
        if has_bar:
            parts.insert(1, ProgressBar(total=state.total, completed=state.done, width=bar))
        grid = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        for _ in parts:
            grid.add_column(no_wrap=True)
        grid.add_row(*parts)
        return grid

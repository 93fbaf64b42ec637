"""Effects: lines of text that are redrawn in place on a terminal, with rich. Imported only if there is a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from imgbatch.terminal import live_line
from imgbatch.terminal.console import escape_control_characters

_MAX_BAR = 60


class LiveView:
    """Draws lines, and a bar below them, at the end of a terminal. As a context manager it leaves the last lines there."""

    def __init__(self, stream: TextIO) -> None:
        self._terminal = live_line.open_on(stream)
        self._live = Live(console=self._terminal, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._live.stop()

    def show(self, lines: Sequence[str], done: int | None = None, total: int | None = None) -> None:
        """Replace the lines; with a bar if there is a total."""
        parts: list[RenderableType] = [Text(escape_control_characters(line)) for line in lines]
        if done is not None and total:
            parts.append(ProgressBar(total=total, completed=done, width=min(_MAX_BAR, self._terminal.width - 1)))
        self._live.update(Group(*parts), refresh=True)

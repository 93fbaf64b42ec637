"""A terminal for tests: a program runs in it, and what it would show is a list of lines."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence

_CODE = re.compile(r"\x1b\[(\??\d*(?:;\d+)*)([A-Za-z])")
# The child becomes the leader of a session whose terminal this is: Ctrl-C then reaches it.
_LEAD = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(2, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Screen:
    """Obeys the few control codes that a line that is drawn again takes; any other one is an error.

    As xterm does, a line that is full is wrapped only when the next character comes.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.at = [0, 0]
        """Row and column of the cursor."""
        self.seen: set[str] = set()
        """Each line as it was whenever the cursor left it, or something was drawn over it."""
        self._rest = ""

    @property
    def lines(self) -> list[str]:
        """What stands there now, without the empty lines at the end."""
        shown = ["".join(row).rstrip() for row in self.rows]
        while shown and not shown[-1]:
            shown.pop()
        return shown

    def feed(self, text: str) -> None:
        """Take what a program wrote; a control code may come in two pieces."""
        text = self._rest + text
        cut = text.rfind("\x1b")
        self._rest = ""
        if cut >= 0 and not _CODE.match(text, cut):
            text, self._rest = text[:cut], text[cut:]
        place = 0
        while place < len(text):
            if text[place] == "\x1b":
                code = _CODE.match(text, place)
                assert code, repr(text[place : place + 20])
                self._obey(code[1], code[2])
                place = code.end()
            else:
                self._write(text[place])
                place += 1

    def _write(self, character: str) -> None:
        if character in "\r\n":
            self._note()
            self.at = [self.at[0] + (character == "\n"), 0 if character == "\r" else self.at[1]]
        else:
            assert character >= " ", repr(character)
            if self.at[1] == self.columns:
                self.at = [self.at[0] + 1, 0]
            self._fill()
            row = self.rows[self.at[0]]
            row[self.at[1] : self.at[1] + 1] = [character]
            self.at[1] += 1
        self._fill()

    def _obey(self, numbers: str, letter: str) -> None:
        self._note()
        if letter == "A":
            self.at[0] -= int(numbers or 1)
            assert self.at[0] >= 0
        elif (numbers, letter) == ("2", "K"):
            self.rows[self.at[0]] = []
        else:
            assert letter == "m", (numbers, letter)  # colours

    def _fill(self) -> None:
        while len(self.rows) <= self.at[0]:
            self.rows.append([])
        row = self.rows[self.at[0]]
        row += [" "] * (self.at[1] - len(row))

    def _note(self) -> None:
        if self.at[0] < len(self.rows):
            self.seen.add("".join(self.rows[self.at[0]]).rstrip())


class InTerminal:
    """A program that runs in a terminal."""

    def __init__(self, command: Sequence[object], columns: int, env: Mapping[str, str], cwd: os.PathLike[str]) -> None:
        self.screen = Screen(columns)
        self.raw = ""
        self._outside, inside = os.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LEAD, sys.executable, *map(str, command)],
            stdin=inside, stdout=inside, stderr=inside, cwd=cwd, env={**env, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(inside)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._outside, text.encode())

    def read(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """Show what the program writes until something is so, or to its end; return its exit code, None if it goes on."""
        while not until():
            try:
                data = os.read(self._outside, 4096)
            except OSError as error:  # Linux says so when nobody holds the other end
                assert error.errno == errno.EIO
                data = b""
            if not data:
                os.close(self._outside)
                return self.process.wait(timeout=60)
            text = data.decode("utf-8", "replace")
            self.raw += text
            self.screen.feed(text)
        return None

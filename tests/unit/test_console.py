"""Log lines and the current step, with and without a terminal."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgbatch.terminal import console
from imgbatch.terminal.console import Console, LogView, State
from tests.unit.screen import InTerminal, Screen

ROOT = Path(__file__).parents[2]
SPINNER = re.compile("[⠀-⣿]")
DATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
JOB = """
import logging, os, sys, time, warnings
from imgbatch import cli
from imgbatch.concurrency import process
from imgbatch.terminal import console
from imgbatch.errors import InputError
from imgbatch.terminal.progress import Progress
log = logging.getLogger("imgbatch")
def body():
    console.step("listing")
    log.info("images listed " + "x" * 300)
    time.sleep(0.3)
    shown = Progress("labelling", 3000)
    shown.start(3000, 4096)
    for number in range(12):
        shown.update(250 * number, number)
        log.warning("line %d of a file called a\\x1b[2Jb", number)
        if number == 6:
            warnings.warn("a library complains")
        time.sleep(0.1)
    shown.close()
    if "fail" in sys.argv:
        raise InputError("nothing is right")
    cli.result("3,000 images")
    return 0
flags = cli.arguments(cli.parser(""), [each for each in sys.argv[1:] if each != "fail"])
process.exit_process(cli.run(body, quiet=flags.quiet))
"""


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """Restore the log handlers of pytest."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    console.close()
    root.handlers[:] = before
    root.setLevel(level)


def environment(**more: str) -> dict[str, str]:
    """Return an environment without settings of colours."""
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **more}


@pytest.mark.parametrize("columns", [40, 80, 140])
@pytest.mark.parametrize("colours", [True, False])
def test_log_lines_and_bar_do_not_mix(columns: int, colours: bool) -> None:
    env = environment() if colours else environment(NO_COLOR="1")
    job = InTerminal(["-c", JOB], columns, env, ROOT)
    assert job.read() == 0
    seen = job.screen.seen
    steps = [line for line in seen if SPINNER.match(line)]
    assert any("listing" in line for line in steps) and any("starting the workers" in line for line in steps)
    assert not any(re.fullmatch(r". \d+:\d+ +(\(.*)?", line) for line in steps), "there is no step without a name"
    assert any("labelling" in line and "/3,000" in line for line in steps)
    assert any("━━━━━━━━" in line for line in steps) == (columns > 40), "the bar is the first to go"
    assert any(re.search(r"labelling \d+ %", line) for line in steps) == (columns == 40)
    assert all(len(line) < columns for line in steps)
    assert not any(DATED.search(line) or ".py" in line for line in steps)
    shown = job.screen.lines
    assert not any(SPINNER.search(line) or "━" in line for line in shown), "nothing of it is left"
    text = "".join(line.ljust(columns) if len(line) == columns else line + "\n" for line in shown)
    assert text.count("x" * 300) == 1, "a long line can be copied as a whole"
    assert [line for line in shown if DATED.match(line)] and len(re.findall(r"of a file called a\\x1b\[2J", text)) == 12
    assert "UserWarning: a library complains" in text.replace("\n", " ")
    assert shown[-1] == "3,000 images"
    assert "\x1b[?25l" not in job.raw, "a process that is killed cannot show the cursor again"
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", job.raw)) == colours


def test_error_is_the_last_line_of_a_terminal() -> None:
    job = InTerminal(["-c", JOB, "fail"], 80, environment(), ROOT)
    assert job.read() == 2
    assert job.screen.lines[-1] == "error: nothing is right"


BUSY = """
import logging, sys, threading
from imgbatch.terminal import console
console.install(sys.stderr)
log, ended = logging.getLogger("imgbatch"), threading.Event()
def write():
    while not ended.is_set():
        log.info("a record of another thread")
thread = threading.Thread(target=write)
thread.start()
for number in range(100):
    console.step(f"step {number}")
    console.close()
ended.set()
thread.join()
"""


def test_a_record_of_another_thread_does_not_keep_the_step_on_the_screen() -> None:
    job = InTerminal(["-c", BUSY], 80, environment(), ROOT)
    assert job.read() == 0
    lines = job.screen.lines
    assert any("a record of another thread" in line for line in lines)
    assert not [line for line in lines if SPINNER.search(line)]


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_terminal_without_cursor_gets_plain_lines(term: str) -> None:
    command = ["-c", f"import os; os.environ['TERM'] = {term!r}\n{JOB}"]
    job = InTerminal(command, 80, environment(), ROOT)
    assert job.read() == 0
    assert "\x1b" not in job.raw and job.screen.lines[-1] == "3,000 images"


def test_pipe_gets_dated_lines_without_control_characters() -> None:
    env = environment(TERM="xterm-256color", FORCE_COLOR="1", TZ="Asia/Kolkata")
    done = subprocess.run([sys.executable, "-c", JOB], cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and done.stdout == "3,000 images\n"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stderr), "names of files are escaped"
    lines = [line for line in done.stderr.splitlines() if "UserWarning" not in line and "warnings.warn" not in line]
    assert len(lines) == 13 and all(DATED.match(line) for line in lines) and all("+0530 " in line for line in lines)
    assert sum(" WARNING line" in line for line in lines) == 12


@pytest.mark.parametrize("in_terminal", [True, False])
def test_quiet_shows_warnings_errors_and_summary(in_terminal: bool) -> None:
    if in_terminal:
        job = InTerminal(["-c", JOB, "--quiet", "fail"], 80, environment(NO_COLOR="1"), ROOT)
        assert job.read() == 2
        text = "\n".join(job.screen.lines)
        assert not any(SPINNER.search(line) for line in job.screen.seen)
    else:
        command = [sys.executable, "-c", JOB, "--quiet", "fail"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=60).stderr
    assert "INFO" not in text and text.count(" WARNING ") == 12 and text.rstrip().endswith("error: nothing is right")


def test_step_is_logged_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    shown = Console(None, now=lambda: now)
    view = LogView(shown, tick_s=3600)
    said = []
    with caplog.at_level(logging.INFO, "imgbatch"):
        for second in range(36):
            now = float(second)
            if second in (0, 15):
                shown.step("starting the workers" if second else "listing")
            if second == 25:
                shown.show("5 of 9")
            view.tick()
            said += [(second, record.getMessage()) for record in caplog.records]
            caplog.clear()
        shown.close()
        now = 100.0
        view.tick()
    view.close()
    assert said == [
        (10, "listing (0:10)"), (20, "starting the workers (0:05)"), (30, "starting the workers: 5 of 9"),
    ]  # fmt: skip
    assert not caplog.records, "no step, no line"


def test_starting_the_same_step_again_changes_nothing() -> None:
    now = 0.0
    shown = Console(None, now=lambda: now)
    shown.step("listing")
    shown.show("3 images so far")
    now = 5.0
    shown.step("listing")
    assert shown.state == State(0.0, "listing", 0.0, "3 images so far")
    shown.step("labelling")
    assert shown.state == State(0.0, "labelling", 5.0)


def test_without_install_nothing_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    console.step("listing")
    console.show("3 images so far")
    console.close()
    assert capfd.readouterr() == ("", "")


def test_log_goes_to_the_given_stream() -> None:
    stream = io.StringIO()
    console.install(stream)
    logging.getLogger("imgbatch").info("hello")
    console.close()
    assert DATED.match(stream.getvalue()) and stream.getvalue().endswith(" INFO hello\n")


def test_screen_emulates_a_terminal() -> None:
    screen = Screen(4)
    screen.feed("abcd")
    assert (screen.lines, screen.at) == (["abcd"], [0, 4]), "it is wrapped when the next character comes"
    screen.feed("ef\r\nx\x1b[1")
    screen.feed("A\r\x1b[2Kg")
    assert screen.lines == ["abcd", "g", "x"] and {"abcd", "ef", "x"} <= screen.seen | set(screen.lines)

"""`--log-format json`: each line on stderr is a JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.unit.screen import InTerminal
from tests.unit.test_console import environment

ROOT = Path(__file__).parents[2]
JOB = """
import logging, sys, threading, time, warnings
from imgbatch import cli
from imgbatch.concurrency import process, signals
from imgbatch.terminal import console
from imgbatch.errors import InputError
from imgbatch.terminal.progress import Progress
log, end = logging.getLogger("imgbatch"), sys.argv[1]
def body():
    console.step("listing")
    log.info("a file called a\\x1b[2Jb\\nc")
    shown = Progress("labelling", 3000)
    shown.start(3000, 4096)
    shown.update(250, 1)
    warnings.warn("a library complains")
    thread = threading.Thread(target=lambda: 1 / 0, name="fetch")
    thread.start()
    thread.join()
    shown.close()
    if end == "fail":
        raise InputError("nothing is right: https://me:secret@host/x")
    if end == "bug":
        raise KeyError("https://me:secret@host/x")
    if end == "late":
        with signals.handle_signals() as stop:
            stop.timeout_s = 0.1
            signals.signal.raise_signal(signals.signal.SIGTERM)
            time.sleep(60)
    cli.result("3,000 images")
    return 0
flags = cli.arguments(cli.parser("", verb="classify"), sys.argv[2:])
process.exit_process(cli.run(body, verb="classify", quiet=flags.quiet, log_format=flags.log_format))
"""


def run(end: str, *flags: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Run the job; return its exit code, stdout, and the objects on stderr."""
    command = [sys.executable, "-c", JOB, end, "--log-format", "json", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=60)
    return done.returncode, done.stdout, [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_an_object_with_time_level_logger_and_message() -> None:
    code, out, lines = run("well")
    assert (code, out) == (0, "3,000 images\n")
    *logged, end = lines
    assert end["event"] == "end" and end["message"] == "3,000 images"
    for line in logged:
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
    first, warning, thread = logged
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "imgbatch", "a file called a\x1b[2Jb\nc")
    assert (warning["level"], warning["logger"]) == ("WARNING", "py.warnings")
    assert "UserWarning: a library complains" in warning["message"]
    assert thread["message"] == "thread fetch ended: division by zero" and "Traceback" in thread["exception"]


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("fail", 2, "nothing is right: https://***@host/x"),
        ("bug", 1, "KeyError: 'https://***@host/x'"),
        ("late", 143, "stopped by signal 15, and could not end in order within 0.1 s (run.stop_timeout_s)"),
    ],
)
def test_the_error_is_an_object_before_the_end_line(end: str, code: int, message: str) -> None:
    ended, out, lines = run(end, "--quiet")
    assert (ended, out) == (code, "")
    *_, error, last = lines
    assert error["level"] == "ERROR" and error["message"].startswith(message)
    assert ("exception" in error) == (end == "bug") and "secret" not in json.dumps(lines)
    assert (last["event"], last["exit_code"]) == ("end", code)
    assert not [line for line in lines if line.get("level") == "INFO"]


@pytest.mark.parametrize("flags", [["--log-format=json", "--no-such-flag"], ["--log-format", "json", "--limit"]])
def test_a_wrong_flag_is_an_object_too(flags: list[str]) -> None:
    command = [sys.executable, "-m", "imgbatch", "classify", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=60)
    error, last = map(json.loads, done.stderr.splitlines())
    assert done.returncode == 2 and error["level"] == "ERROR" and flags[-1] in error["message"]
    assert (last["event"], last["exit_code"]) == ("end", 2)


def test_a_terminal_gets_no_progress_bar() -> None:
    job = InTerminal(["-c", JOB, "well", "--log-format", "json"], 400, environment(), ROOT)
    assert job.read() == 0
    assert "\x1b" not in job.raw
    assert [json.loads(line).get("level") for line in job.raw.splitlines() if line.startswith("{")] == [
        "INFO", "WARNING", "ERROR", None,
    ]  # fmt: skip


def test_another_format_is_refused() -> None:
    command = [sys.executable, "-m", "imgbatch", "classify", "--log-format", "xml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 2 and "invalid choice: 'xml' (choose from" in done.stderr

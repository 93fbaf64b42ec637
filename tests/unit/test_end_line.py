"""The end line: what a command writes last, as a Ray job or with --log-format json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imgbatch import cli
from imgbatch.config.sections import StorageConfig
from imgbatch.errors import BudgetError
from imgbatch.ledger import run_record
from imgbatch.orchestration import end_line
from imgbatch.storage.stores import Folder, Stores

ROOT = Path(__file__).parents[2]


def last(text: str) -> dict[str, Any]:
    """Return the end line of a log; it must be the last line."""
    found = end_line.last_end_line(text)
    assert found is not None and json.loads(text.splitlines()[-1]) == found
    return found


@pytest.fixture
def record(tmp_path: Path) -> run_record.Record:
    return run_record.Record(Folder(Stores(StorageConfig(), {}), str(tmp_path)), {"counts": {"listed": 3}})


def test_the_line_has_the_facts_of_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        output = Folder(Stores(StorageConfig(), {}), str(tmp_path))
        record = run_record.Record(output, {"counts": {"listed": 3}, "rejects": {"empty": 1}})
        record.start()
        with record.recording_failure():
            raise BudgetError("too many: https://me:secret@host/x")

    assert cli.run(body, verb="classify", log_format="json") == 4
    shown = capsys.readouterr()
    line = last(shown.err)
    (run_id,) = os.listdir(tmp_path / "runs")
    assert line == {
        "event": "end", "verb": "classify", "exit_code": 4, "retry": False, "status": "failed", "run_id": run_id,
        "output": str(tmp_path), "counts": {"listed": 3}, "rejects": {"empty": 1},
        "message": "too many: https://***@host/x",
    }  # fmt: skip
    assert json.loads((tmp_path / "runs" / run_id / "run.json").read_text())["retry"] is False


def test_the_line_of_a_success_and_of_a_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> int:
        cli.result("3 images listed")
        return 0

    monkeypatch.setenv(end_line.RAY_JOB, "{}")
    assert cli.run(body, verb="verify") == 0
    line = last(capsys.readouterr().err)
    assert (line["status"], line["message"], "run_id" in line) == ("succeeded", "3 images listed", False)

    assert cli.run(lambda: 1 // 0, verb="verify") == 1
    line = last(capsys.readouterr().err)
    assert (line["exit_code"], line["message"]) == (1, "ZeroDivisionError: integer division or modulo by zero")


def test_no_line_without_a_reader(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(end_line.RAY_JOB, raising=False)
    assert cli.run(lambda: 0, verb="classify") == 0
    monkeypatch.setenv(end_line.RAY_JOB, "{}")
    assert cli.run(lambda: 0) == 0
    assert capsys.readouterr().err == ""


def test_a_wrong_flag_has_a_line() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "imgbatch", "classify", "--inptu", "x"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, end_line.RAY_JOB: "{}"},
    )  # fmt: skip
    assert ran.returncode == 2 and last(ran.stderr)["exit_code"] == 2
    assert "--inptu" in last(ran.stderr)["message"] and last(ran.stderr)["verb"] == "classify"


PROGRAM = """
import signal, sys, time
from imgbatch import cli
from imgbatch.concurrency import signals
def body():
    with signals.handle_signals() as stop:
        stop.timeout_s = {timeout_s}
        for signum in {signums}:
            signal.raise_signal(signum)
            time.sleep(0.5)
        time.sleep(60)
cli.run(body, verb="classify", log_format="json")
"""


@pytest.mark.parametrize(
    ("signums", "timeout_s", "code"), [([15, 2], 60, 130), ([2, 1], 60, 143), ([15], 0.2, 143)],
    ids=["second signal", "second signal is SIGHUP", "time limit"],
)  # fmt: skip
def test_a_process_that_is_ended_at_once_has_a_line(signums: list[int], timeout_s: float, code: int) -> None:
    program = PROGRAM.format(signums=signums, timeout_s=timeout_s)
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    line = last(ran.stderr)
    assert (ran.returncode, line["exit_code"], line["status"], line["retry"]) == (code, code, "interrupted", True)


def test_the_calls_at_the_end_of_a_run_are_made_once_and_harm_nothing(record: run_record.Record) -> None:
    seen: list[Any] = []

    def failing(facts: Any) -> None:
        raise ZeroDivisionError

    with run_record.on_finish(failing), run_record.on_finish(seen.append):
        inner = run_record.Record(record.output, {"counts": {"listed": 5}})
    inner.start()
    inner.finish("succeeded", 0)
    inner.record_interrupt(15)
    assert [(facts["exit_code"], facts["retry"], facts["counts"]) for facts in seen] == [(0, False, {"listed": 5})]

    record.start()
    record.finish("succeeded", 0)
    assert len(seen) == 1, "the block has ended before this record was made"

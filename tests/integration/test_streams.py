"""stdout and stderr that are closed, full, without a reader or of a limited encoding: the exit code is that of the run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Job, clean_environment
from tests.integration import tables
from tests.unit.pictures import encode, scene

BROKEN = {
    "stderr closed": "2>&-",
    "stdout closed": ">&-",
    "all closed": "<&- >&- 2>&-",
    "stdout full": ">/dev/full",
    "both full": ">/dev/full 2>/dev/full",
}
NARROW = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "ascii, strictly": {"PYTHONIOENCODING": "ascii:strict"},
    "locale C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def output(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, warm: Job) -> Path:
    """A finished output whose path and images have names that are not ASCII; a run on it finds no work."""
    place = tmp_path_factory.mktemp("übung")
    for number, label in enumerate(["Äpfel", "Birnen"] * 2):
        (place / "bilder" / label).mkdir(parents=True, exist_ok=True)
        (place / "bilder" / label / f"é{number}.jpg").write_bytes(encode(scene(seed=number), "JPEG"))
    ended = warm("classify", "--input", place / "bilder", "--output", place / "out", "--model", tiny_model)
    assert ended.code == 0, ended.err
    return place / "out"


def shell(redirection: str, *command: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with redirections of a shell; capture streams that are not redirected."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, *map(str, command)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env={**clean_environment(), **(env or {})},
    )  # fmt: skip


def classify_again(output: Path) -> list[object]:
    """Return a command that finds no work."""
    record = tables.runs(output)[0]
    model = record["model"]["name"]
    return ["jobs/classify.py", "--input", *record["config"]["input"], "--output", output, "--model", model]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_run_ends_with_its_own_exit_code(output: Path, broken: str) -> None:
    (output / "_SUCCESS").unlink()
    done = shell(BROKEN[broken], *classify_again(output))
    assert done.returncode == 0, done.stderr
    assert tables.success(output)["counts"]["labelled"] == 4
    assert "Traceback" not in done.stderr and "error" not in done.stderr
    assert done.stdout == "" or broken == "stderr closed"
    if broken == "stderr closed":
        assert done.stdout.startswith("4 images listed") and done.stdout.count("\n") == 1, "no log among the results"


def test_a_run_that_starts_ray_needs_no_streams(output: Path, tmp_path: Path) -> None:
    command = classify_again(output)
    command[command.index(output)] = tmp_path / "out"
    done = shell(BROKEN["all closed"], *command)
    assert done.returncode == 0, tables.runs(tmp_path / "out")
    assert tables.success(tmp_path / "out")["counts"]["labelled"] == 4


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", ["classify", "evaluate", "train", "verify"])
def test_a_refusal_ends_with_its_own_exit_code(tmp_path: Path, name: str, broken: str) -> None:
    place = ["--input", tmp_path / "é", "--output", tmp_path / "out"] if name != "verify" else [tmp_path / "é"]
    done = shell(BROKEN[broken], f"jobs/{name}.py", *place)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("broken", BROKEN)
def test_verify_ends_with_its_own_exit_code(output: Path, broken: str) -> None:
    done = shell(BROKEN[broken], "jobs/verify.py", output)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], None], ids=["help", "run"])
def test_a_closed_pipe(output: Path, arguments: list[str] | None) -> None:
    """Like `| head -1` after head has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(each) for each in (["jobs/classify.py", *arguments] if arguments else classify_again(output))]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=writing, stderr=writing, timeout=240, env=clean_environment()
    )
    os.close(writing)
    assert done.returncode == 0


@pytest.mark.parametrize("narrow", NARROW)
def test_names_outside_the_encoding(output: Path, narrow: str, tmp_path: Path) -> None:
    for command in (classify_again(output), ["jobs/verify.py", output]):
        done = shell("", *command, env=NARROW[narrow])
        assert done.returncode == 0, done.stderr
        shown = narrow == "locale C"  # which Python's UTF-8 mode takes the place of
        assert done.stdout.isascii() != shown and ("\\" in done.stdout) != shown, "what cannot be shown is escaped"
    done = shell("", "jobs/classify.py", "--input", tmp_path / "ä", "--output", tmp_path / "out", env=NARROW[narrow])
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("redirection", ["", ">&-", ">/dev/full"])
def test_the_table_of_the_demo(output: Path, redirection: str) -> None:
    show = (
        "import sys; from pathlib import Path; from imgbatch import cli; from imgbatch.commands import demo;"
        "from imgbatch.concurrency import process;"
        "cli.parser(''); demo.show(Path(sys.argv[1])); process.exit_process(0)"
    )
    done = shell(redirection, "-c", show, output, env={"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and (bool(done.stdout) == (redirection == ""))
    assert done.stdout.isascii() and done.stdout.count(".jpg") == 4 * (redirection == "")


def test_a_closed_terminal_does_not_stop_the_progress_bar() -> None:
    """rich draws the bar in a thread."""
    draw = (
        "import logging, os, sys, time; from imgbatch import cli; from imgbatch.concurrency import process\n"
        "from imgbatch.terminal import console; from imgbatch.terminal.progress import Progress\n"
        "def body():\n"
        "    shown = Progress('labelling', 10); shown.start(10, 10); shown.update(1, 0); os.close(int(sys.argv[1]))\n"
        "    for n in range(10): shown.update(n, 0); logging.warning('still there'); time.sleep(0.05)\n"
        "    assert 'imgbatch.terminal.live_line' in sys.modules\n"
        "    return 0\n"
        "cli.parser(''); process.exit_process(cli.run(body))"
    )
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", draw, str(terminal)], cwd=ROOT, stderr=inside, stdout=subprocess.DEVNULL,
        pass_fds=[terminal], env={**clean_environment(), "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    os.close(inside)
    assert process.wait(timeout=60) == 0

"""Limits of the operating system, as shells and batch systems set them: reported before Ray starts, or raised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Ended, clean_environment
from tests.integration import tables
from tests.integration.test_refusals import require_refusal

SHOW_FILES = """
import resource
from imgbatch.concurrency import process_limits
process_limits.require_limits()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limited(limit: str, *command: object, poison: Path | None = None) -> Ended:
    """Run Python under a limit. With `poison`, a folder, imports of Ray fail."""
    path = [str(ROOT)]
    if poison is not None:
        poison.mkdir(exist_ok=True)
        (poison / "ray.py").write_text("raise RuntimeError('ray was imported')")
        path.insert(0, str(poison))
    done = subprocess.run(
        ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", sys.executable, *map(str, command)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**clean_environment(), "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("-v 3000000", ["2.9 GiB", "RLIMIT_AS", "ulimit -v unlimited"]),
        ("-v 8000000", ["7.6 GiB", "RLIMIT_AS", "ulimit -v unlimited"]),
        ("-d 1500000", ["1.4 GiB", "RLIMIT_DATA", "ulimit -d unlimited"]),
        ("-f 100000", ["RLIMIT_FSIZE", "ulimit -f unlimited"]),
        ("-n 100", ["100 files", "RLIMIT_NOFILE", "ulimit -n 4096"]),
    ],
)
def test_a_limit_that_is_too_low_for_ray_is_reported_before_it_starts(
    folder: Path, tiny_model: Path, tmp_path: Path, limit: str, words: list[str]
) -> None:
    output = tmp_path / "out"
    command = ("jobs/classify.py", "--input", folder, "--output", output, "--model", tiny_model)
    message = require_refusal(limited(limit, *command, poison=tmp_path / "poison"), 2)
    assert all(each in message for each in words), message
    assert [(record["status"], record["exit_code"]) for record in tables.runs(output)] == [("failed", 2)]


def test_training_reports_the_limit(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        place = tmp_path / "classes" / f"class-{number % 2}" / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    command = ("jobs/train.py", "--input", tmp_path / "classes", "--output", tmp_path / "model", "--base", tiny_model)
    ended = limited("-v 8000000", *command)
    assert ended.code == 2 and "RLIMIT_AS" in ended.err.splitlines()[-1] and "Traceback" not in ended.err, ended.err


def test_a_process_without_memory_for_a_network_names_the_limit(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The network is built before Ray starts, in a separate process."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in tiny_model.iterdir():  # another description is another model: nothing is known of it yet
        content = path.read_bytes()
        (copy / path.name).write_bytes(content.replace(b'"a"', b'"no room"') if path.name == "config.json" else content)
    command = ("jobs/classify.py", "--input", folder, "--output", tmp_path / "out", "--model", copy)
    message = require_refusal(limited("-v 700000", *command), 2)
    assert "ulimit -v" in message


def test_the_limit_of_open_files_is_raised() -> None:
    ended = limited("-S -n 100", "-c", SHOW_FILES)
    assert ended.code == 0, ended.err
    soft, hard = map(int, ended.out.split())
    assert soft == min(hard, 1 << 16) > 100

"""Nodes whose disks are read-only or full, in separate mount namespaces (`unshare` of util-linux)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Ended, Job, clean_environment
from tests.integration import tables
from tests.integration.test_refusals import require_refusal
from tests.unit.pictures import encode, scene

READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && '
TINY = 'mount -t tmpfs -o size=72k none "$0" && '


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder for Ray's files. Its path is short, since the paths of sockets have a maximum length."""
    with tempfile.TemporaryDirectory(prefix="ib-", dir="/tmp") as path:
        yield Path(path)


def run_with(mounts: str, place: Path, *arguments: object) -> Ended:
    """Run classify with `place`, the folder for Ray's files, mounted as a test requires."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mounts} exec "$@"', str(place)]
    done = subprocess.run(
        [*command, sys.executable, "jobs/classify.py", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env={**clean_environment(), "RAY_TMPDIR": str(place)},
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_temporary_folder_that_is_read_only(folder: Path, tiny_model: Path, tmp_path: Path, place: Path) -> None:
    ended = run_with(READ_ONLY, place, "--input", folder, "--output", tmp_path / "out", "--model", tiny_model)
    message = require_refusal(ended, 3)
    assert "Read-only file system" in message and str(place) in message and "RAY_TMPDIR" in message
    assert [record["status"] for record in tables.runs(tmp_path / "out")] == ["failed"]


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_without_permission(
    job: Job, folder: Path, tiny_model: Path, tmp_path: Path, variable: str
) -> None:
    command = ("--input", folder, "--output", tmp_path / "out", "--model", tiny_model)
    message = require_refusal(job("classify", *command, env={variable: "/proc/self/fdinfo"}), 3)
    assert "keeps its files in /proc/self/fdinfo" in message and "RAY_TMPDIR moves them" in message


@pytest.mark.long
def test_a_temporary_folder_that_is_full(job: Job, folder: Path, tiny_model: Path, tmp_path: Path, place: Path) -> None:
    command = ("--input", folder, "--output", tmp_path / "out", "--model", tiny_model)
    ended = run_with(TINY, place, *command, "--set", "cluster.stall_timeout_s=60")
    assert ended.code == 3 and "Traceback" not in ended.err, ended.err
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    ended = job("classify", *command)
    assert ended.code == 0, ended.err
    tables.require_single(tmp_path / "out", [path.name for path in folder.iterdir()])


@pytest.mark.long
def test_an_output_disk_that_becomes_full_during_the_run(
    job: Job, tiny_model: Path, tmp_path: Path, place: Path
) -> None:
    """The output is a separate disk with space for a few parts."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(1200):
        (images / f"{number:04d}.jpg").write_bytes(encode(scene(seed=number % 24), "JPEG"))
    # The same folder again, outside the namespace, has what fitted: it is copied out at the end.
    output, kept = place / "out", tmp_path / "kept"
    mounts = f'mkdir -p "{output}" && mount -t tmpfs -o size=68k none "{output}" && '
    after = f'; code=$?; cp -r "{output}" "{kept}"; exit $code'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mounts} "$@" {after}', str(place)]
    arguments = ["--input", str(images), "--output", str(output), "--model", str(tiny_model)]
    done = subprocess.run(
        [*command, sys.executable, "jobs/classify.py", *arguments, "--set", "run.commit_interval_s=0.1"],
        cwd=ROOT, capture_output=True, text=True, timeout=280, env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 3 and "No space left on device" in done.stderr, done.stderr
    labels = tables.labels(kept)
    assert not (kept / "_SUCCESS").exists() and 0 < len(labels) < 1200
    arguments[3] = str(kept)
    ended = job("classify", *arguments)
    assert ended.code == 0, ended.err
    tables.require_single(kept, [path.name for path in images.iterdir()])
    print(f"{len(labels)} of 1,200 images fitted onto the disk, and were not labelled again")

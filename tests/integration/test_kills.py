"""Drivers killed with SIGKILL at critical points: after the same command again, every image is in exactly one row."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest

from tests.conftest import Job, S3Server
from tests.integration import faults, tables
from tests.unit.pictures import encode, scene

DIE = "os.kill(os.getpid(), signal.SIGKILL)"

# module, method, the argument that names the object, and whether to die before or after the call.
POINTS = {
    "in mid-listing": ("imgbatch.storage.stores", "Folder.put", "page-", "before"),
    "before the PUT of a part": ("imgbatch.storage.stores", "Folder.create", "rejects/part-", "before"),
    "after the PUT of a part": ("imgbatch.storage.stores", "Folder.create", "labels/part-", "after"),
    "between the two logs": ("imgbatch.storage.stores", "Folder.create", "labels/part-", "before"),
    "before the seal": ("imgbatch.ledger.ledger", "Ledger.seal", "", "before"),
    "after the seals": ("imgbatch.ledger.ledger", "Ledger.seal", "", "after"),
    "before _SUCCESS": ("imgbatch.storage.stores", "Folder.create", "_SUCCESS", "before"),
    "after _SUCCESS": ("imgbatch.storage.stores", "Folder.create", "_SUCCESS", "after"),
    "before an old row is removed": ("imgbatch.ledger.commit_log", "Log.rewrite", "", "before"),
    "after an old row is removed": ("imgbatch.ledger.commit_log", "Log.rewrite", "", "after"),
}


def deadly(place: Path, point: str) -> dict[str, str]:
    """Return an environment in which the driver dies at that point."""
    module, method, name, when = POINTS[point]
    kind, attribute = method.split(".")
    before, after = (DIE, "pass") if when == "before" else ("pass", DIE)
    body = f"""
original = module.{kind}.{attribute}
def deadly(self, *arguments):
    hit = {name!r} in (self.at(arguments[0]) if hasattr(self, "at") else "")
    if hit:
        {before}
    result = original(self, *arguments)
    if hit:
        {after}
    return result
module.{kind}.{attribute} = deadly
"""
    return faults.patched(place, module, body)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 200 pictures of 24 kinds, and six files that are not images."""
    images = tmp_path / "images"
    images.mkdir()
    kinds = [encode(scene(seed=number), "JPEG") for number in range(24)]
    for number in range(200):
        (images / f"{number:03d}.jpg").write_bytes(kinds[number % 24])
    for number in range(6):
        (images / f"{number * 30:03d}-bad.jpg").write_text("no image")
    return images


@pytest.fixture
def killed(started: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> Callable[..., None]:
    """Run a job that must be killed at a point."""

    def run(point: str, *command: object) -> None:
        process = started(*command, env=deadly(tmp_path / "deadly", point))
        out, err = process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL, f"{point} was not reached: {out}\n{err}"

    return run


def require_whole(output: Path, before: dict[str, str]) -> dict[str, str]:
    """Require that tables can be read, hold no image twice, and have lost no row; return the labels."""
    labels, rejected = tables.labels(output), tables.reasons(output)
    assert not labels.keys() & rejected.keys()
    assert len(tables.rows(output, "rejects")) == len(rejected)
    assert labels.items() >= before.items(), "a committed row is gone"
    return labels


@pytest.mark.parametrize(
    "points",
    [["after the PUT of a part", "between the two logs"], pytest.param(list(POINTS)[:4], marks=pytest.mark.long)],
    ids=["some", "all"],
)
def test_kills_at_points_of_a_run(
    job: Job, warm: Job, killed: Callable[..., None], images: Path, tiny_model: Path, tmp_path: Path, points: list[str]
) -> None:
    expected = {path.name for path in images.iterdir()}
    command = ("classify", "--input", images, "--model", tiny_model, "--set", "run.commit_interval_s=0.1")
    assert warm(*command, "--output", tmp_path / "calm").code == 0
    calm = tables.labels(tmp_path / "calm")
    output = tmp_path / "out"
    command = (*command, "--output", output)

    labels: dict[str, str] = {}
    for point in points:
        killed(point, *command)
        labels = require_whole(output, labels)
        assert not (output / "_SUCCESS").exists()
    asked = time.monotonic()
    killed("before the seal", *command)
    assert time.monotonic() - asked < 60, "a dead owner on this machine is known at once"
    labels = require_whole(output, labels)
    assert len(labels) == 200, "all rows are there"
    between_the_seals = "between the two logs"  # no rows are left, so these parts are the seals
    for point in (between_the_seals, *(["after the seals", "before _SUCCESS"] if len(points) > 2 else [])):
        killed(point, *command)
        assert require_whole(output, labels) == labels
        assert not (output / "_SUCCESS").exists()
    killed("after _SUCCESS", *command)
    assert job("verify", output).code == 0, "with _SUCCESS the run is done, whatever became of its driver"

    ended = job(*command)
    assert ended.code == 0 and "(206 already done" in ended.out
    tables.require_single(output, sorted(expected))
    # Random weights, but the same: no kind of picture has its two best classes within 0.01 of each other.
    assert tables.labels(output) == calm


@pytest.mark.long
def test_kills_while_changed_images_are_labelled_again(
    job: Job, warm: Job, killed: Callable[..., None], images: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = ("classify", "--input", images, "--output", output, "--model", tiny_model)
    assert warm(*command).code == 0
    first = tables.labels(output)
    changed = [f"{number:03d}.jpg" for number in range(0, 200, 10)]
    for name in changed:
        (images / name).write_bytes(encode(scene(70, 50, seed=3), "JPEG"))
    untouched = {name: label for name, label in first.items() if name not in changed}

    killed("before an old row is removed", *command)
    assert require_whole(output, untouched) == first
    killed("after an old row is removed", *command)
    labels = require_whole(output, untouched)
    assert labels == untouched, "in between they have no row, which is better than an old one"

    ended = warm(*command)
    assert ended.code == 0, ended.err
    tables.require_single(output, [path.name for path in images.iterdir()])
    assert {tables.labels(output)[name] for name in changed} == {tables.labels(output)["003.jpg"]}
    assert job("verify", output).code == 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_night_of_kills_over_three_thousand_objects(
    job: Job, started: Callable[..., subprocess.Popen[str]], s3: S3Server, tmp_path: Path
) -> None:
    """Five kills, with the default model: two at named points of a commit, three at random moments after one."""
    count, seed = 3000, int(time.time())
    print(f"seed {seed}, {sys.version}")
    chance = random.Random(seed)
    kinds = [encode(scene(500, 375, seed=number), "JPEG", quality=90) for number in range(60)]
    for number in range(count):
        obstore.put(s3.bucket("images"), f"night/{number % 7}/{number:04d}.jpg", kinds[number % 60])
    command = ("classify", "--input", "s3://images/night", "--set", "run.commit_interval_s=1")
    calm = job(*command, "--output", "s3://out/calm", env=s3.environment, timeout=1200)
    assert calm.code == 0, calm.err
    expected = {row["uri"]: row for row in tables.rows(tables.download(s3.bucket("out"), "calm", tmp_path / "calm"))}

    def parts() -> int:
        return len(obstore.list_with_delimiter(s3.bucket("out"), "night/labels")["objects"])

    known: dict[str, str] = {}
    late = 0
    for attempt, point in enumerate(["between the two logs", "", "after the PUT of a part", "", ""]):
        environment = s3.environment | (deadly(tmp_path / "deadly", point) if point else {})
        before = parts()
        process = started(*command, "--output", "s3://out/night", env=environment)
        if not point:
            while process.poll() is None and parts() == before:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 4))
            process.kill()
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, f"kill {attempt + 1} came too late"
        place = tables.download(s3.bucket("out"), "night", tmp_path / f"after-{attempt}")
        known = require_whole(place, known)
        print(f"kill {attempt + 1}, {point or 'at random'}: {len(known)} rows")
        late += len(known) > 0
    assert late >= 3
    ended = job(*command, "--output", "s3://out/night", env=s3.environment, timeout=1200)
    assert ended.code == 0, ended.err
    assert job("verify", "s3://out/night", env=s3.environment).code == 0
    rows_found = tables.rows(tables.download(s3.bucket("out"), "night", tmp_path / "end"))
    assert len(rows_found) == count and {row["uri"] for row in rows_found} == expected.keys()
    for row in rows_found:
        best = expected[row["uri"]]["top_k"]
        if best[0]["score"] - best[1]["score"] > 0.01:
            assert row["label"] == expected[row["uri"]]["label"]

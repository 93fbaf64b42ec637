"""SIGTERM, when the orderly stop takes longer than Ray's own handler allows, or does not return."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, S3Server, clean_environment
from tests.integration import faults, tables
from tests.integration.test_interrupts import wait_for, wait_for_end_of
from tests.unit.pictures import encode, scene

Start = Callable[..., "subprocess.Popen[str]"]

KINDS, EACH = 6, 300
SLOW_S = 0.02  # for decoding one image
BANNER = "SIGTERM received"


@pytest.fixture(scope="module")
def by_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in two folders named after classes of the tiny model."""
    images = tmp_path_factory.mktemp("by-class")
    kinds = [encode(scene(seed=number), "JPEG") for number in range(KINDS)]
    for label in ("a", "b"):
        (images / label).mkdir()
        for number in range(EACH):
            (images / label / f"{label}{number:03d}.jpg").write_bytes(kinds[number % KINDS])
    return images


class Writes:
    """Delays PUTs whose path contains `only`, after the first PUT whose path contains `first`."""

    def __init__(self, first: str, seconds: float, only: str = "") -> None:
        self.begun = self.slow = False
        """Whether the first PUT was made; whether a PUT is delayed."""
        self._first, self._seconds, self._only = first, seconds, only

    def __call__(self, method: str, path: str, before: int) -> float | None:
        if method != "PUT":
            return None
        if self.begun and self._only in path:
            self.slow = True
            return self._seconds
        self.begun = self.begun or self._first in path
        return None


FLAGS = {
    "classify": ("--model", "/labels/part-", "--set", "run.commit_interval_s=0.3"),
    "evaluate": ("--model", "/labels/part-", "--set", "run.commit_interval_s=0.3"),
    "train": ("--base", "/pixels-", "--set", "train.method=finetune"),
}


def record_of(name: str, s3: S3Server, prefix: str, place: Path) -> tuple[Path, dict[str, object]]:
    """Return the output of a run in the store, and its record."""
    output = tables.download(s3.bucket("out"), prefix, place)
    (record,) = tables.runs(output / "_training" if name == "train" else output)
    return output, record


@pytest.mark.parametrize(
    "name", ["classify", *(pytest.param(name, marks=pytest.mark.long) for name in ("evaluate", "train"))]
)
def test_sigterm_with_slow_puts(
    started: Start, s3: S3Server, by_class: Path, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    model, first, *settings = FLAGS[name]
    writes = Writes(first, 5.0)
    prefix = f"slow-{name}"
    command = (name, "--input", by_class, "--output", f"s3://out/{prefix}", model, tiny_model, *settings)
    environment = {**s3.environment, **faults.slow_decoding(tmp_path / "slow", SLOW_S)}
    with faults.proxy(s3.endpoint, writes) as endpoint:
        process = started(*command, env={**environment, "AWS_ENDPOINT_URL": endpoint})
        wait_for(lambda: writes.slow, process)
        process.terminate()
        _, err = process.communicate(timeout=100)
    assert process.returncode == 143, err
    assert BANNER not in err and "Traceback" not in err
    assert err.rstrip().splitlines()[-1].startswith("error: stopped by signal 15; run the same command again to resume")
    output, record = record_of(name, s3, prefix, tmp_path / "out")
    assert (record["status"], record["exit_code"]) == ("interrupted", 143)
    assert not [*output.glob("runs/*/report.html"), *output.glob("runs/*/metrics.prom")], "there was no time for them"
    if name != "train":
        assert record["counts"]["labelled"] == len(tables.labels(output)) > 0  # type: ignore[index]
    wait_for_end_of(process.pid)


@pytest.mark.parametrize(
    ("only", "status"), [("/part-", "interrupted"), pytest.param("", "running", marks=pytest.mark.long)]
)
def test_sigterm_with_unanswered_puts(
    started: Start, s3: S3Server, by_class: Path, tiny_model: Path, tmp_path: Path, only: str, status: str
) -> None:
    """The main thread waits for the store for minutes: the run exits after the timeout, with a message if possible."""
    writes = Writes("/labels/part-", 600.0, only)
    prefix = f"never-{status}"
    command = ("classify", "--input", by_class, "--output", f"s3://out/{prefix}", "--model", tiny_model)
    settings = ("--set", "run.commit_interval_s=0.3", "--set", "run.stop_timeout_s=4")
    environment = {**s3.environment, **faults.slow_decoding(tmp_path / "slow", SLOW_S)}
    with faults.proxy(s3.endpoint, writes) as endpoint:
        process = started(*command, *settings, env={**environment, "AWS_ENDPOINT_URL": endpoint})
        wait_for(lambda: writes.slow, process)
        process.terminate()
        _, err = process.communicate(timeout=100)
    assert process.returncode == 143, err
    assert BANNER not in err and "Traceback" not in err
    assert "could not end in order within 4 s (run.stop_timeout_s)" in err
    _, record = record_of("classify", s3, prefix, tmp_path / "out")
    assert record["status"] == status
    wait_for_end_of(process.pid)


OWNERS = """
import ctypes, signal, sys
from imgbatch.engine import session
from imgbatch.concurrency.signals import SIGNALS, StopRequest

libc = ctypes.CDLL(None)
def owners():
    found = []
    for signum in SIGNALS:
        action = (ctypes.c_void_p * 64)()
        assert libc.sigaction(int(signum), None, action) == 0
        found.append(action[0])
    return found

stop = StopRequest().install()
ours = owners()
def say(when):
    print(when, owners() == ours, file=sys.stderr)

with stop.reinstall_after_ray(), session.connected():
    say("started")
    stop.check()
    say("checked")
    import ray, ray.data
    say("imported")
    queue = ray.remote(lambda: 7)
    assert ray.get(queue.remote()) == 7
    say("task")
    rows = ray.data.range(8).map_batches(lambda batch: batch, concurrency=1)
    assert len(list(rows.iter_rows())) == 8
    say("dataset")
    from ray.util.queue import Queue
    Queue(actor_options={"num_cpus": 0}).shutdown(force=True)
    say("actor")
say("ended")
"""


def test_signal_handlers_are_ours_after_ray_started() -> None:
    """The handlers are read in C, since Python does not see those that Ray's C++ sets."""
    ran = subprocess.run(
        [sys.executable, "-c", OWNERS], capture_output=True, text=True, env=clean_environment(), cwd=ROOT, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    said = dict(line.rsplit(" ", 1) for line in ran.stderr.splitlines() if line.endswith(("True", "False")))
    assert said.pop("started") == "False", "Ray no longer replaces signal handlers: the code against it can be removed"
    assert list(said) == ["checked", "imported", "task", "dataset", "actor", "ended"]
    assert set(said.values()) == {"True"}, said

"""A run as it is seen from outside: run.json while it works, `imgbatch status` from another process, and the notification."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest

from tests.conftest import Job, S3Server
from tests.integration import faults, tables
from tests.integration.test_interrupts import wait_for, wait_for_end_of
from tests.integration.test_train import pictures
from tests.unit.pictures import encode, scene
from tests.unit.test_run_metrics import Hook, hook, metrics_of

__all__ = ["hook"]  # a fixture

Start = Callable[..., "subprocess.Popen[str]"]
COUNT = 600


def test_status_of_a_run_that_works_is_killed_and_resumed(
    started: Start, job: Job, s3: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    bucket = s3.bucket("images")
    kinds = [encode(scene(seed=number), "JPEG") for number in range(20)]
    for number in range(COUNT):
        obstore.put(bucket, f"status/{number:03d}.jpg", kinds[number % 20] if number else b"no image")
    command = ("--input", "s3://images/status", "--output", "s3://out/status", "--model", tiny_model)
    command += ("--set", "run.commit_interval_s=0.5")
    slow = faults.slow_decoding(tmp_path / "slow", 0.05)

    def status(*flags: str) -> tuple[int, dict[str, Any]]:
        done = job("status", "s3://out/status", "--json", *flags, env=s3.environment)
        assert done.err == "" or done.code == 2, done.err
        return done.code, json.loads(done.out) if done.out else {}

    assert status() == (2, {})
    run = started("classify", *command, env={**s3.environment, **slow})
    wait_for(lambda: (status()[1].get("progress") or {}).get("committed"), run)
    code, state = status()
    assert (code, state["state"], state["exit_code"], state["stage"]) == (0, "running", None, "labelling")
    progress = state["progress"]
    assert 0 < progress["committed"] <= progress["done"] < progress["total"] == COUNT and progress["bytes"] > 1_000
    assert progress["last_commit"] and state["counts"]["listed"] == COUNT and state["bottleneck"] == "decode"
    assert list(state["stages"]) == ["listing", "starting", "labelling"] and min(state["stages"].values()) > 0
    assert state["step"]["name"] == "labelling" and set(state["seconds"]) == {"fetch", "decode", "classify", "commit"}

    watching = started("status", "s3://out/status", "--watch", env=s3.environment)
    assert watching.stdout is not None and watching.stdout.readline().partition(" ")[2].startswith("labelling: ")
    os.killpg(run.pid, signal.SIGKILL)
    wait_for_end_of(run.pid)
    out, _ = watching.communicate(timeout=60)
    assert watching.returncode == 3 and "is lost while labelling: its heartbeat stopped, and no end is recorded" in out
    code, state = status()
    assert (code, state["state"], state["exit_code"], state["retry"]) == (3, "lost", 3, True)

    assert job("classify", *command, env=s3.environment).code == 0
    code, state = status()
    assert (code, state["state"], state["exit_code"]) == (0, "succeeded", 0)
    assert (
        state["counts"]["labelled"] == COUNT - 1 and state["rejects"] == {"not_an_image": 1} and state["step"] is None
    )
    assert list(state["stages"]) == ["listing", "starting", "labelling", "auditing"]
    text = job("status", "s3://out/status", env=s3.environment).out
    assert f"{COUNT} listed, {COUNT - 1} labelled, 1 rejected, " in text and "rejects     1: 1 not_an_image" in text


def test_train_and_evaluate_are_recorded_and_notified(warm: Job, hook: Hook, tiny_model: Path, tmp_path: Path) -> None:
    data, model, scores = pictures(tmp_path / "data"), tmp_path / "model", tmp_path / "scores"
    textfile = tmp_path / "imgbatch.prom"
    keys = ("--set", f"notify.url={hook.url}", "--set", f"metrics.textfile={textfile}")
    trained = warm("train", "--input", data, "--output", model, "--base", tiny_model, *keys)
    assert trained.code == 0, trained.err
    record = json.loads((model / "training.json").read_text())
    assert list(record["stages"])[:3] == ["listing", "preparing", "training"] and record["stage"] == "writing"
    assert record["config"]["notify"]["url"] == "***" and "SECRET" not in (model / "training.json").read_text()
    figures = metrics_of(textfile)
    assert figures["imgbatch_exit_code"] == 0 and figures["imgbatch_end_timestamp_seconds"] > 0
    shown = warm("status", model)
    assert shown.code == 0 and " succeeded" in shown.out.splitlines()[0], shown

    scored = warm("evaluate", "--input", data, "--output", scores, "--model", model, *keys)
    assert scored.code == 0, scored.err
    shown = warm("status", scores)
    assert shown.code == 0 and "images      24 listed, 24 labelled" in shown.out, shown.out
    (record,) = tables.runs(scores)
    figures = metrics_of(scores / "runs" / record["run_id"] / "metrics.prom")
    assert figures["imgbatch_images_total labelled"] == 24 and figures == metrics_of(textfile)

    refused = warm("evaluate", "--input", data, "--output", scores, "--model", tmp_path / "none", *keys)
    assert refused.code == 2 and "SECRET" not in refused.err + trained.err + scored.err
    ends = [(content["verb"], content["status"], content["exit_code"]) for content in hook.posted]
    assert ends == [("train", "succeeded", 0), ("evaluate", "succeeded", 0), ("evaluate", "failed", 2)]
    assert hook.posted[1]["text"].startswith("imgbatch evaluate succeeded: 24 images listed, 24 labelled, 0 rejected. ")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_is_notified(
    started: Start, hook: Hook, tiny_model: Path, folder: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    output = tmp_path / "out"
    environment = {"IMGBATCH_NOTIFY_URL": hook.url, **faults.slow_decoding(tmp_path / "slow", 20)}
    run = started(
        "classify",
        "--input",
        folder,
        "--output",
        output,
        "--model",
        tiny_model,
        "--log-format",
        "json",
        env=environment,
    )
    wait_for(lambda: any(record.get("stage") == "starting" for record in tables.runs(output)), run)
    run.send_signal(stop)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (128 + stop, "")
    (content,) = hook.posted
    assert (content["status"], content["exit_code"], content["retry"]) == ("interrupted", 128 + stop, True)
    assert content["text"].startswith(
        f"imgbatch classify interrupted with exit code {128 + stop}: stopped by signal {stop}"
    )
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[-1]["event"] == "end" and lines[-2]["level"] == "ERROR" and "SECRET" not in err
    (record,) = tables.runs(output)
    assert metrics_of(output / "runs" / record["run_id"] / "metrics.prom")["imgbatch_exit_code"] == 128 + stop

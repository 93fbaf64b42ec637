"""Guards, as their users meet them: a shifted night is held back, held back again without Ray, and accepted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from tests.conftest import Job
from tests.integration import tables
from tests.unit.pictures import encode, scene


def test_a_shifted_night_is_held_back_until_it_is_accepted(
    job: Job, warm: Job, tmp_path: Path, tiny_model: Path
) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(60):
        (images / f"first-{number:02d}.jpg").write_bytes(encode(scene(seed=number), "JPEG"))
    command = ("--input", images, "--output", output, "--model", tiny_model, "--set", "guard.max_label_shift=0.1")
    assert warm("classify", *command).code == 0
    first = tables.success(output)
    label_of = tables.labels(output)
    common = Counter(label_of.values()).most_common(1)[0][0]
    picture = next(name for name, label in label_of.items() if label == common)

    for number in range(60):
        shutil.copy(images / picture, images / f"second-{number:02d}.jpg")
    held = warm("classify", *command)
    record = tables.runs(output)[-1]
    assert held.code == 8 and "held back by guard.max_label_shift=0.1" in held.err and "Traceback" not in held.err
    assert f"--set guard.accept={record['run_id']}" in held.err and repr(common) in held.err
    assert (record["exit_code"], record["retry"], record["counts"]["labelled"]) == (8, False, 120)
    assert not (output / "_SUCCESS").exists() and len(tables.rows(output)) == 120
    assert json.loads((output / "runs" / "last_success.json").read_text()) == first

    poison = tmp_path / "poison"
    poison.mkdir()
    for name in ("ray", "torch"):
        (poison / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    without_ray = {"PYTHONPATH": str(poison)}
    assert job("classify", *command, env=without_ray).code == 8
    accept = ("--set", f"guard.accept={record['run_id']}", "--set", "guard.accepted_by=ada@example.org")
    accepted = job("classify", *command, *accept, env=without_ray)
    assert accepted.code == 0, accepted.err
    assert tables.runs(output)[-1]["drift"]["accepted"] == {"run_id": record["run_id"], "by": "ada@example.org"}
    assert tables.success(output)["rows"]["after"] == first["run_id"]
    assert job("verify", output).code == 0


def test_a_model_with_other_preprocessing_is_stopped_by_the_canary(
    job: Job, warm: Job, tmp_path: Path, tiny_model: Path
) -> None:
    images, output, canary = tmp_path / "images", tmp_path / "out", tmp_path / "canary"
    images.mkdir()
    for number in range(30):
        (images / f"{number:02d}.jpg").write_bytes(encode(scene(seed=number), "JPEG"))
    command = ("--input", images, "--output", output, "--model", tiny_model)
    assert warm("classify", *command).code == 0
    for name, label in tables.labels(output).items():
        (canary / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(images / name, canary / label)
    shutil.rmtree(output)

    guarded = (*command, "--set", f"guard.canary={canary}", "--set", "guard.canary_accuracy=0.95")
    failed = warm("classify", *guarded, "--set", "model.mean=[0, 0, 0]")
    record = tables.runs(output)[-1]
    assert failed.code == 8 and "held back by guard.canary" in failed.err and "Traceback" not in failed.err
    assert (record["status"], record["exit_code"], record["retry"]) == ("failed", 8, False)
    (score,) = record["canary"]
    assert (
        not score["passed"] and score["images"] == 30 and score["accuracy"] < 0.95 and score["host"] and score["node"]
    )
    assert not [*output.glob("labels/*"), *output.glob("rejects/*"), *output.glob("_SUCCESS")], "no row is committed"
    accepted = job("classify", *guarded, "--set", f"guard.accept={record['run_id']}")
    assert accepted.code == 2 and "which cannot be accepted" in accepted.err

    passed = warm("classify", *guarded)
    assert passed.code == 0, passed.err
    (score,) = tables.runs(output)[-1]["canary"]
    assert score["passed"] and score["accuracy"] == 1 and len(tables.rows(output)) == 30
    assert job("verify", output).code == 0

    (canary / "zebra").mkdir()
    shutil.copy(images / "00.jpg", canary / "zebra")
    for flags in ((), ("--dry-run",)):
        unknown = job("classify", *guarded, *flags, env={"RAY_ADDRESS": "ray://127.0.0.1:9"})
        assert unknown.code == 2 and "unknown to" in unknown.err and "'zebra'" in unknown.err

"""Invalid runs are refused at once: with the right exit code, a short message with value and remedy, and no loss.

None of these runs may reach Ray: an import of it is made to fail.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Ended, Job, S3Server, write_model
from tests.integration import tables


@pytest.fixture
def refused(job: Job, tmp_path: Path) -> Callable[..., str]:
    """Run a job that must end with `code` before it uses Ray; return its stderr."""
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "ray.py").write_text("raise RuntimeError('ray was imported')")

    def run(code: int, *arguments: object, env: dict[str, str] | None = None) -> str:
        ended = job("classify", *arguments, env={"PYTHONPATH": str(poison), **(env or {})}, timeout=60)
        return require_refusal(ended, code)

    return run


def require_refusal(ended: Ended, code: int) -> str:
    """Require an exit code with one clear error; return stderr."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    message = [line for line in ended.err.splitlines() if line.startswith(("error: ", "imgbatch classify: error: "))]
    assert len(message) == 1 and ended.err.rstrip().endswith(message[0]), "an error is the last line, and one line"
    assert len(ended.err) < 2000, "more than a screen"
    assert ended.out == ""
    return ended.err


@pytest.mark.parametrize("flag", ["--input", "--output"])
def test_a_path_that_is_not_utf8(refused: Callable[..., str], tmp_path: Path, flag: str) -> None:
    places = {"--input": str(tmp_path / "in"), "--output": str(tmp_path / "out")}
    places[flag] += os.fsdecode(b"/caf\xe9")
    message = refused(2, *(word for pair in places.items() for word in pair))
    assert f"{flag} " in message and r"caf\xe9 is not UTF-8" in message and "convmv" in message


def test_a_table_with_a_log(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "in/_delta_log").mkdir(parents=True)
    (tmp_path / "in/_delta_log/00000000000000000000.json").write_text("{}")
    pq.write_table(pa.table({"jpg": [b"1"]}), tmp_path / "in/part-0.parquet")
    message = refused(2, "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert f"{tmp_path}/in is a table in the Delta format" in message and "deltalake" in message


def test_a_prefix_without_images(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "pdfs").mkdir()
    for number in range(3):
        (tmp_path / "pdfs" / f"{number}.pdf").write_bytes(b"%PDF-1.7")
    output = tmp_path / "out"
    for place, why in (("pdfs", "source.allow_empty"), ("typo", "does not exist"), ("typo/*.jpg", "does not exist")):
        message = refused(2, "--input", tmp_path / place, "--output", output)
        assert str(tmp_path / place) in message and why in message
    assert "3 other objects ignored" in refused(2, "--input", tmp_path / "pdfs", "--output", output)
    assert not (output / "_SUCCESS").exists() and not (output / "labels").exists()
    assert {(run["status"], run["exit_code"]) for run in tables.runs(output)} == {("failed", 2)}


def test_a_model_whose_head_is_not_a_softmax(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", seed=0, labels=("defect",))
    command = ("--input", folder, "--output", tmp_path / "out", "--model")
    assert "Make it a head of two" in refused(2, *command, one)
    several = write_model(tmp_path / "several", seed=0)
    config = json.loads((several / "config.json").read_text())
    (several / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    assert "best class of a softmax" in refused(2, *command, several)
    assert not (tmp_path / "out").exists()


def test_flags_that_are_missing_or_wrong(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "--output" in refused(2, "--input", folder)
    assert "--input" in refused(2, "--output", output)
    assert "--imput" in refused(2, "--imput", folder, "--output", output)
    assert "limit" in refused(2, "--input", folder, "--output", output, "--limit", 0)
    assert "{model} and {date}" in refused(2, "--input", folder, "--output", tmp_path / "{modell}")
    assert "nothing.toml" in refused(2, "--input", folder, "--output", output, "--config", tmp_path / "nothing.toml")
    (tmp_path / "bad.toml").write_text("[cluster\n")
    assert "bad.toml is not TOML" in refused(
        2, "--input", folder, "--output", output, "--config", tmp_path / "bad.toml"
    )
    assert not output.exists()


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("rejects.max_shar=0.5", "did you mean 'rejects.max_share'?"),
        ("clusters.device=cpu", "did you mean"),
        ("cluster.device=cud", "did you mean 'cuda'?"),
        ("top_k=many", "top_k='many'"),
        ("top_k", "section.key=value"),
        ("rejects.max_share=1.5", "between 0 and 1"),
        ("cluster.max_actors=0", "cluster.max_actors=0"),
        ("fetch=3", "fetch"),
        ("source.format=zip", "source.format"),
    ],
)
def test_a_config_key_that_is_wrong(
    refused: Callable[..., str], folder: Path, tmp_path: Path, setting: str, hint: str
) -> None:
    assert hint in refused(2, "--input", folder, "--output", tmp_path / "out", "--set", setting)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_used(
    refused: Callable[..., str], folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    command = ("--input", folder, "--output", tmp_path / "out", "--model")

    def broken(name: str, change: Callable[[dict[str, Any]], object] = lambda config: None) -> Path:
        copy = Path(shutil.copytree(tiny_model, tmp_path / name))
        config = json.loads((copy / "config.json").read_text())
        change(config)
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    assert "did you mean 'efficientnet_lite0'?" in refused(2, *command, "eficientnet_lite0")
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(2, *command, tmp_path / "nowhere")
    (broken("headless") / "config.json").unlink()
    assert "config.json" in refused(2, *command, tmp_path / "headless")
    (broken("weightless") / "model.safetensors").unlink()
    assert "model.safetensors" in refused(2, *command, tmp_path / "weightless")
    (broken("torn") / "config.json").write_text("{")
    assert "not JSON" in refused(2, *command, tmp_path / "torn")
    short = broken("few", lambda config: config["label_names"].pop())
    assert "has 6 names, and the network has 7 classes" in refused(2, *command, short)
    twice = broken("twice", lambda config: config["label_names"].__setitem__(1, "a"))
    assert "'a' is the name of more than one class" in refused(2, *command, twice)
    nameless = broken("nameless", lambda config: config.pop("label_names"))
    assert "label_names" in refused(2, *command, nameless)
    assert not (tmp_path / "out").exists()


def test_an_input_with_unexpected_content(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "out")
    (tmp_path / "images.zip").write_bytes(b"PK")
    assert "of archives only" in refused(2, "--input", tmp_path / "images.zip", *output)
    (tmp_path / "list.csv").write_text("url,split\na.jpg,train\n")
    assert "no column 'uri'; it has: url, split" in refused(2, "--input", tmp_path / "list.csv", *output)
    (tmp_path / "list.parquet").write_bytes(b"PAR1 and then nothing")
    assert "cannot be read as Parquet" in refused(2, "--input", tmp_path / "list.parquet", *output)
    (tmp_path / "list.jsonl").write_text('{"uri": "a.jpg"}\n{"uri": ')
    assert "cannot be read as JSON Lines" in refused(2, "--input", tmp_path / "list.jsonl", *output)
    missing = refused(2, "--input", tmp_path / "no.csv", "--set", "source.format=manifest", *output)
    assert "no.csv" in missing
    assert "foo" in refused(2, "--input", "foo://bucket/x", *output)
    assert "names no bucket" in refused(2, "--input", "s3://", *output)
    assert not (tmp_path / "out" / "labels").exists()


def test_an_invalid_output(refused: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    for inside in (folder, folder / "out", f"{folder}/../images/out/"):
        assert "inside --input" in refused(2, "--input", folder, "--output", inside)
    assert "inside --input" in refused(2, "--input", f"{folder}/**", "--output", folder / "out")
    file = tmp_path / "file"
    file.write_text("no folder")
    assert str(file) in refused(2, "--input", folder, "--output", file)
    assert str(file) in refused(2, "--input", folder, "--output", file / "deeper")
    assert "names no bucket" in refused(2, "--input", folder, "--output", "s3:///labels")
    assert "foo" in refused(2, "--input", folder, "--output", "foo://bucket/x")
    assert [path.name for path in folder.iterdir() if not path.suffix] == []


@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_foreign_parts(refused: Callable[..., str], folder: Path, tmp_path: Path, table: str) -> None:
    place = tmp_path / "out" / table
    place.mkdir(parents=True)
    command = ("--input", folder, "--output", tmp_path / "out")
    rows = pa.table({"uri": ["a.jpg"]})
    newer = {"format_version": "2", "fingerprint": "{}", "run_id": "x", "nonce": "", "seal": "false"}
    for name, write, hint in (
        ("part-00000001.parquet", lambda path: pq.write_table(rows, path), "was not written by imgbatch"),
        ("part-00000001.parquet", lambda path: path.write_bytes(b"PAR1 torn"), "not a complete Parquet file"),
        ("part-00000001.parquet", lambda path: pq.write_table(rows.replace_schema_metadata(newer), path), "version 2"),
        ("labels.csv", lambda path: path.write_text("uri,label"), "not written by imgbatch"),
    ):
        write(place / name)
        content = (place / name).read_bytes()
        assert hint in refused(5, *command)
        assert hint in refused(5, *command, "--dry-run")
        assert (place / name).read_bytes() == content
        (place / name).unlink()
    assert not list((tmp_path / "out").glob("labels/part-*"))


def test_a_bucket_with_a_typo(refused: Callable[..., str], s3: S3Server, folder: Path, tmp_path: Path) -> None:
    message = refused(2, "--input", "s3://imagse/photos", "--output", tmp_path / "out", env=s3.environment)
    assert "imagse" in message
    for command in (("--output", "s3://outt/labels"), ("--output", "s3://outt/labels", "--dry-run")):
        message = refused(2, "--input", folder, *command, env=s3.environment)
        assert "--output" in message and "outt" in message


def test_a_wrong_key(refused: Callable[..., str], s3: S3Server, folder: Path, tmp_path: Path) -> None:
    wrong = {**s3.environment, "AWS_SECRET_ACCESS_KEY": "no-secret-of-anybody"}
    for command in (
        ("--input", "s3://images/photos", "--output", tmp_path / "out"),
        ("--input", folder, "--output", "s3://out/wrong-key"),
    ):
        message = refused(3, *command, env=wrong)
        assert "s3://" in message and "no-secret" not in message
    assert not (tmp_path / "out" / "labels").exists()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


def test_a_store_that_does_not_respond(
    refused: Callable[..., str], s3: S3Server, folder: Path, tmp_path: Path, silent_port: int
) -> None:
    quick = ("--set", "storage.timeout_s=1", "--set", "storage.retries=1")
    for endpoint in (f"http://127.0.0.1:{silent_port}", "http://127.0.0.1:9"):
        away = {**s3.environment, "AWS_ENDPOINT_URL": endpoint}
        started = time.monotonic()
        message = refused(3, "--input", "s3://images/x", "--output", tmp_path / "out", *quick, env=away)
        assert "s3://images/x" in message
        message = refused(3, "--input", folder, "--output", "s3://out/x", *quick, env=away)
        assert "s3://out/x" in message
        assert time.monotonic() - started < 40, "two requests of a second, tried twice"

"""Outputs and models that version 0.1.0 wrote stay valid; tests/data/v0.1.0/make.py made them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import obstore
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, Ended, Job, S3Server
from tests.integration import tables

OLD = ROOT / "tests" / "data" / "v0.1.0"
IMAGES, MODEL = "s3://images/v0.1.0", "s3://images/v0.1.0-model"
EXACT = ("--set", "classify.runtime=torch", "--set", "classify.dtype=float32", "--set", "cluster.device=cpu")


@pytest.fixture
def output(s3: S3Server) -> Iterator[str]:
    """The store as 0.1.0 left it, with a copy of its output for one test; return the name of the output."""
    name = "v0.1.0"
    for bucket, prefix, folder in (
        ("images", "v0.1.0", OLD / "images"),
        ("images", "v0.1.0-model", OLD / "model"),
        ("out", name, OLD / "output"),
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                obstore.put(s3.bucket(bucket), f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
    yield name
    bucket_of_outputs = s3.bucket("out")
    for batch in obstore.list(bucket_of_outputs, name):
        obstore.delete(bucket_of_outputs, [entry["path"] for entry in batch])


def classify(job: Job, s3: S3Server, tmp_path: Path, output: str, *options: object) -> Ended:
    """Run the command of the old run again, where an import of Ray fails: nothing can be fetched or labelled."""
    poison = tmp_path / "poison"
    poison.mkdir(exist_ok=True)
    (poison / "ray.py").write_text("raise RuntimeError('ray was imported')")
    record = json.loads(next((OLD / "output").glob("runs/*/run.json")).read_text())
    inputs = [argument for uri in record["config"]["input"] for argument in ("--input", uri)]
    return job(
        "classify", *inputs, "--model", MODEL, "--output", f"s3://out/{output}", *EXACT, *options,
        env={**s3.environment, "PYTHONPATH": os.pathsep.join([str(poison), str(ROOT)])},
    )  # fmt: skip


def test_a_run_continues_an_old_output_without_inference(job: Job, s3: S3Server, output: str, tmp_path: Path) -> None:
    ended = classify(job, s3, tmp_path, output)
    assert ended.code == 0, ended.err
    assert "23 images listed, 22 labelled, 1 rejected (23 already done, 0 kept" in ended.out
    now = tables.download(s3.bucket("out"), output, tmp_path / "now")
    for table in ("labels", "rejects"):
        assert tables.rows(now, table) == tables.rows(OLD / "output", table)
    assert [record["exit_code"] for record in tables.runs(now)] == [0, 0]
    written = [pq.read_metadata(path) for path in now.glob("*/part-*.parquet")]
    assert len(written) == 5 and all((part.num_rows > 0) == (part.num_row_groups > 0) for part in written)

    ended = job("verify", f"s3://out/{output}", env=s3.environment)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("23 images listed, 22 labelled, 1 rejected, 0 kept; 23 rows, no image twice")


def test_options_at_their_defaults_do_not_invalidate_an_old_output(
    job: Job, s3: S3Server, output: str, tmp_path: Path
) -> None:
    ended = classify(job, s3, tmp_path, output, "--set", "top_k=5", "--set", "output.columns=[]")
    assert ended.code == 0, ended.err
    for option, named in (
        ("top_k=3", "top_k: 5 there, 3 here"),
        ("output.embeddings=true", "output.embeddings: false there"),
    ):
        ended = classify(job, s3, tmp_path, output, "--set", option)
        assert ended.code == 5 and named in ended.err and "weights" not in ended.err, ended.err


def test_an_old_model_evaluates_as_before(warm: Job, s3: S3Server, output: str, tmp_path: Path) -> None:
    ended = warm(
        "evaluate", "--input", f"{IMAGES}/unseen", "--model", MODEL, "--output", tmp_path / "out", *EXACT,
        env=s3.environment,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    then, now = (json.loads((place / "metrics.json").read_text()) for place in (OLD, tmp_path / "out"))
    assert now["model"]["digest"] == then["model"]["digest"]
    assert (now["n"], now["top1"], now["top5"], now["levels"]) == (
        then["n"],
        then["top1"],
        then["top5"],
        then["levels"],
    )
    assert now["temperature"] == then["temperature"]
    for figure in ("ece", "ece_before_temperature"):
        assert now[figure] == pytest.approx(then[figure], abs=1e-4)
    assert 0 < then["top1"] < 1, "or a change of the labels could go unnoticed"

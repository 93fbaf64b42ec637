"""`imgbatch plan` as its users meet it: a plan, the run after it, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Job, S3Server
from tests.integration import tables
from tests.unit.pictures import encode, scene
from tests.weed import READER


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Photos in two formats, a text that is called .jpg, a table of images, and tars."""
    images = tmp_path / "mixed"
    for number in range(80):
        path = images / f"day{number % 2}" / (f"{number:03d}.png" if number % 4 == 0 else f"{number:03d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(scene(64 + number, 64, seed=number), "PNG" if number % 4 == 0 else "JPEG"))
    (images / "notes.jpg").write_text("no image")
    contents = [encode(scene(64, 64, seed=number), "JPEG") for number in range(30)]
    pq.write_table(pa.table({"image": pa.array(contents, pa.binary())}), images / "table.parquet", row_group_size=10)
    for shard in range(2):
        with tarfile.open(images / f"shard-{shard}.tar", "w") as tar:
            for number in range(300):
                info = tarfile.TarInfo(f"{number:04d}.jpg")
                info.size = len(contents[number % 30])
                tar.addfile(info, io.BytesIO(contents[number % 30]))
    return images


def files_of(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_plan_writes_nothing_else_and_the_run_after_it_is_compared_with_it(
    warm: Job, mixed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output, before = tmp_path / "out", files_of(mixed)
    arguments = ("--input", mixed, "--output", output, "--model", tiny_model)

    planned = warm("plan", *arguments, "--json")

    assert planned.code == 0, planned.err
    plan = json.loads(planned.out)
    kept = json.loads((output / "runs" / "plan.json").read_text())
    assert {**kept, "kept": plan["kept"]} == plan and plan["kept"].endswith("out/runs/plan.json")
    assert list(files_of(output)) == ["runs/plan.json"] and files_of(mixed) == before
    assert plan["images"]["listed"] == 111 and plan["images"]["streams"] == 2 and plan["images"]["rows"] == 113
    assert plan["images"]["to_label"]["mid"] == pytest.approx(711, rel=0.03)  # 81, 30, and 600 in tars
    rows = {(row["format"], row["size"]): row for row in plan["contents"]}
    assert rows["png", "below 16 kB"]["images"] == 20 and rows["parquet", "unknown size"]["images"] == 30
    sample = plan["sample"]
    assert sample["streams"] >= 1 and sample["rejects"] in ({}, {"not_an_image": 1}) and sample["not_reached"] == 0
    assert sample["formats"]["jpeg"] > 256 and sample["formats"]["png"] >= 6
    stages = plan["per_image"]["core_ms"]
    assert all(0 <= value["low"] <= value["mid"] <= value["high"] for value in stages.values())
    assert stages["decode"]["mid"] > 0 and stages["classify"]["mid"] > 0
    total = plan["forecast"]["seconds"]["total"]
    assert 0 < total["low"] < total["mid"] < total["high"]
    assert all(check["passed"] for check in plan["checks"])

    ended = warm("classify", *arguments)

    assert ended.code == 0, ended.err
    (run,) = tables.runs(output)
    assert run["plan"]["id"] == plan["id"] and run["plan"]["predicted_s"] == total
    assert run["plan"]["actual_s"] == pytest.approx(run["this_run"]["seconds"], abs=1) and "inside" in run["plan"]
    assert run["cluster"]["actors"] == plan["cluster"]["actors"] and f"planned: {total['mid']:.1f} s" in ended.err
    assert len(tables.rows(output)) == 710 and tables.reasons(output) == {"notes.jpg": "not_an_image"}
    assert warm("verify", output).code == 0

    again = warm("plan", *arguments)

    assert again.code == 0, again.err
    assert "nothing to label" in again.out and "711 already labelled or rejected; 0 to label" in again.out
    assert tables.runs(output) == [run]


def test_the_rest_of_a_tar_and_a_limit_are_planned(warm: Job, mixed: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--input", mixed / "shard-0.tar", "--output", tmp_path / "out", "--model", tiny_model)
    assert warm("classify", *arguments, "--limit", 100).code == 0

    rest = json.loads(warm("plan", *arguments, "--json").out)
    limited = json.loads(warm("plan", *arguments, "--limit", 150, "--nodes", 4, "--json").out)

    assert rest["images"]["already_done"] == 100
    assert rest["images"]["to_label"]["mid"] == pytest.approx(200, rel=0.03)
    assert limited["images"]["to_label"]["mid"] == 50
    assert limited["cluster"]["actors"] == limited["forecast"]["actors"] == 1  # one worker reads "the first images"


def test_a_plan_on_s3_without_the_right_to_write_is_printed_and_says_so(
    warm: Job, s3: S3Server, folder: Path, tiny_model: Path
) -> None:
    for path in folder.iterdir():
        s3.bucket("images").put(f"planned/{path.name}", path.read_bytes())
    reader = dataclasses.replace(s3, key=READER[0], secret=READER[1])
    command = ("plan", "--input", "s3://images/planned", "--output", "s3://out/planned", "--model", tiny_model)

    ended = warm(*command, env=reader.environment)

    assert ended.code == 0, ended.err
    assert "12 images listed" in ended.out and "not kept: the output cannot be written" in ended.out
    assert "no  write" in ended.out and "s3://out/planned cannot be written" in ended.out
    assert not list(s3.bucket("out").list("planned"))

    ended = warm(*command, "--json", env=s3.environment)

    assert ended.code == 0 and json.loads(ended.out)["kept"] == "s3://out/planned/runs/plan.json", ended.err
    assert [entry["path"] for batch in s3.bucket("out").list("planned") for entry in batch] == [
        "planned/runs/plan.json"
    ]


def test_the_deadline_the_nodes_and_the_price_of_a_run(
    warm: Job, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "vms.csv").write_text("InstanceType,vCPUs,MemoryGiB,Price,SpotPrice,Region\nbig.box,2,8,0.5,,here\n")
    arguments = ("--input", folder, "--output", tmp_path / "out", "--model", tiny_model)
    extra = ("--nodes", 3, "--prices", tmp_path / "vms.csv", "--machine", "big.box", "--finish-by", "2099-01-01T06:00Z")

    ended = warm("plan", *arguments, *extra, "--json")

    assert ended.code == 0, ended.err
    plan: dict[str, Any] = json.loads(ended.out)
    assert plan["forecast"]["nodes"] == 3 and plan["forecast"]["actors"] == 3 * plan["cluster"]["actors"]
    assert plan["finish_by"]["in_time"] and plan["finish_by"]["nodes"] == 1
    (price,) = plan["prices"]
    hours = plan["forecast"]["seconds"]["total"]["mid"] / 3600
    assert price["on_demand"]["mid"] == pytest.approx(3 * 0.5 * hours, rel=0.01) and "spot" not in price
    text = warm("plan", *arguments, "--finish-by", "2001-01-01T06:00Z")
    assert text.code == 0 and "too late" in text.out and "no number of nodes is enough" in text.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--input", "{empty}"), 2, "there is no object below it"),
        (("--prices", "{empty}/none.csv"), 2, "--prices"),
        (("--prices", "{prices}", "--machine", "small.bxo"), 2, "did you mean 'small.box'"),
        (("--prices", "{prices}"), 2, "has no machine like the nodes of this cluster"),
        (("--machine", "small.box"), 2, "--machine needs --prices"),
        (("--finish-by", "6 o'clock"), 2, 'run.finish_by="6 o\'clock" is not a time'),
        (("--finish-by", "06:00@Nowhere"), 2, "there is no time zone 'Nowhere'"),
        (("--nodes", "0"), 2, "must be 1 or more"),
        (
            ("--set", "cluster.device=cuda", "--set", "cluster.startup_timeout_s=1"),
            3,
            "asks for 1 GPU, the cluster has 0",
        ),
    ],
)
def test_what_no_run_could_do_is_refused(
    arguments: tuple[str, ...], code: int, message: str, warm: Job, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    prices = tmp_path / "vms.csv"
    prices.write_text("InstanceType,vCPUs,Price\nsmall.box,1000,0.5\n")
    extra = [argument.format(empty=tmp_path / "empty", prices=prices) for argument in arguments]
    source = () if "--input" in extra else ("--input", folder)

    ended = warm("plan", *source, "--output", tmp_path / "out", "--model", tiny_model, *extra)

    assert ended.code == code, ended.err
    assert message in ended.err and not (tmp_path / "out" / "labels").exists()


def test_a_run_that_passes_its_deadline_warns_once_and_records_it(
    warm: Job, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ("--input", folder, "--output", tmp_path / "out", "--model", tiny_model)

    ended = warm("classify", *arguments, "--set", "run.finish_by=2001-01-01T06:00")

    assert ended.code == 0, ended.err
    assert ended.err.count("the run is late") == 1
    (run,) = tables.runs(tmp_path / "out")
    assert run["late"]["finish_by"] == "2001-01-01T06:00:00+00:00" and len(tables.rows(tmp_path / "out")) == 12

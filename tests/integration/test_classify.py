"""The main job, end to end, as its users meet it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from imgbatch.concurrency.monitor import on_tick
from imgbatch.config import reading
from imgbatch.errors import EXIT_CODES
from imgbatch.pipeline import preflight
from tests.conftest import SECRET, Job, S3Server, write_model
from tests.integration import tables
from tests.integration.tables import by_hand
from tests.unit.pictures import encode, scene

CATS = {"tabby", "tiger cat", "Egyptian cat"}

# DESIGN.md, section 4, written out once more: schema.py must not be able to change it unseen.
CANDIDATE = 'STRUCT("label" VARCHAR, label_id INTEGER, score FLOAT)[]'
LEVEL = 'STRUCT("level" VARCHAR, "label" VARCHAR, score FLOAT)[]'
OBJECT = {"size": "BIGINT", "etag": "VARCHAR", "last_modified": "TIMESTAMP WITH TIME ZONE"}
RUN = {"run_id": "VARCHAR", "model": "VARCHAR"}
LABELS = {
    "uri": "VARCHAR", "label": "VARCHAR", "label_id": "INTEGER", "score": "FLOAT", "top_k": CANDIDATE, "levels": LEVEL,
    "answer": "VARCHAR", "answer_level": "VARCHAR", "answer_score": "FLOAT", "width": "INTEGER", "height": "INTEGER",
    **OBJECT, **RUN,
}  # fmt: skip
REJECTS = {
    "uri": "VARCHAR", "stage": "VARCHAR", "reason": "VARCHAR", "message": "VARCHAR", "passing": "BOOLEAN",
    "attempts": "INTEGER", **OBJECT, **RUN,
}  # fmt: skip


def columns(output: Path, table: str) -> dict[str, str]:
    """Return the columns of a table and their types, as DuckDB sees them."""
    with duckdb.connect() as connection:
        return {row[0]: row[1] for row in connection.sql(f"describe from '{output}/{table}/*.parquet'").fetchall()}


@pytest.fixture
def album(photos: list[Path], tmp_path: Path) -> Path:
    """The photos, and beside them what is no image and what only says so."""
    album = tmp_path / "album"
    (album / "more").mkdir(parents=True)
    for number, photo in enumerate(photos):
        (album / ("more" if number % 2 else "") / photo.name).write_bytes(photo.read_bytes())
    (album / "notes.jpg").write_text("bread, butter, a text that somebody called .jpg")
    (album / "README.txt").write_text("no image")
    (album / ".hidden.jpg").write_bytes(photos[0].read_bytes())
    return album


@pytest.fixture
def without_ray(tmp_path: Path) -> dict[str, str]:
    """An environment in which whoever imports Ray or torch fails."""
    poison = tmp_path / "poison"
    poison.mkdir()
    for name in ("ray", "torch"):
        (poison / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    return {"PYTHONPATH": str(poison)}


def test_real_photos_in_a_folder_with_the_default_model(
    job: Job, album: Path, photos: list[Path], tmp_path: Path, without_ray: dict[str, str]
) -> None:
    output = tmp_path / "out"
    command = ("classify", "--input", album, "--output", output)

    ended = job(*command)

    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    last = ended.out.strip().splitlines()[-1]
    assert last.startswith("6 images listed, 5 labelled, 1 rejected (0 already done, 0 kept, 2 objects ignored) in ")
    found = tables.labels(output)
    assert found["chelsea.png"] in CATS
    assert found["coffee.png"] == "espresso"
    assert set(found) == {photo.name for photo in photos}
    assert tables.reasons(output) == {"notes.jpg": "not_an_image"}
    assert columns(output, "labels") == LABELS
    assert columns(output, "rejects") == REJECTS
    _check_values(output, album)
    _check_records(output, code=0)

    before = tables.parts(output)
    again = job(*command, env=without_ray)

    assert again.code == 0, again.err
    assert "(6 already done, 0 kept, 2 objects ignored)" in again.out
    assert tables.parts(output) == before
    second = tables.runs(output)[-1]
    assert second["counts"]["already_done"] == 6 and "images_per_second" not in second
    assert tables.success(output)["run_id"] == second["run_id"] != tables.runs(output)[0]["run_id"]
    assert job("verify", output, env=without_ray).code == 0


def _check_values(output: Path, album: Path) -> None:
    for row in tables.rows(output):
        path = Path(row["uri"])
        assert path.is_relative_to(album) and row["size"] == path.stat().st_size and row["etag"] is None
        assert abs(row["last_modified"].timestamp() - path.stat().st_mtime) < 1e-3
        best = row["top_k"]
        assert len(best) == 5 and len({each["label_id"] for each in best}) == 5
        assert best[0] == {name: row[name] for name in ("label", "label_id", "score")}
        scores = [each["score"] for each in best]
        assert scores == sorted(scores, reverse=True) and scores[-1] >= 0 and sum(scores) <= 1.001
        assert [level["level"] for level in row["levels"]] == ["domain", "group", "kind", "label"]
        assert (row["levels"][-1]["label"], row["levels"][-1]["score"]) == (row["label"], row["score"])
        rolled_up = [level["score"] for level in row["levels"]]
        assert rolled_up == sorted(rolled_up, reverse=True) and rolled_up[0] <= 1
        sure = [level for level in row["levels"] if level["score"] >= 0.5]
        finest = sure[-1] if sure else dict.fromkeys(("label", "level", "score"))
        assert [row["answer"], row["answer_level"], row["answer_score"]] == [
            finest[n] for n in ("label", "level", "score")
        ]
    cat = next(row for row in tables.rows(output) if row["uri"].endswith("chelsea.png"))
    assert (cat["width"], cat["height"]) == (451, 300)
    assert (cat["answer"], cat["answer_level"]) == ("cat", "kind")
    (refused,) = tables.rows(output, "rejects")
    assert (refused["stage"], refused["passing"], refused["attempts"]) == ("decode", False, 1)
    assert "bread, butter" in refused["message"]


def _check_records(output: Path, code: int) -> None:
    (record,) = tables.runs(output)
    counts = {
        "listed": 6, "labelled": 5, "rejected": 1, "already_done": 0, "updated": 0, "ignored": 2, "duplicates": 0, "kept": 0,
        "unpaired_sidecars": 0,
    }  # fmt: skip
    assert record["counts"] == counts
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", record["run_id"])
    assert (record["status"], record["exit_code"]) == ("succeeded", code)
    assert record["rejects"] == {"not_an_image": 1}
    assert record["seconds"].keys() == {"fetch", "decode", "classify", "commit"}
    assert record["images_per_second"] > 0 and record["batch_size"] == 8
    assert record["device"] == "cpu" and record["dtype"] in ("bfloat16", "float32")
    assert (
        record["runtime"].startswith(("torch ", "openvino "))
        and record["versions"]["ray"]
        and record["hardware"]["driver_cpus"]
    )
    assert record["config"]["output"]["uri"] == str(output)
    assert {row["model"] for row in tables.rows(output)} == {record["model"]["reference"]}
    assert {row["run_id"] for row in tables.rows(output)} == {record["run_id"]}
    assert tables.success(output) == {
        "run_id": record["run_id"], "counts": counts, "limit": None, "seal": record["run_id"],
        "rows": {"after": "", "through": record["run_id"], "new_rejects": counts["rejected"], "transient": 0},
    }  # fmt: skip
    for path in [*output.glob("labels/*"), *output.glob("rejects/*")]:
        footer = pq.read_metadata(path).metadata
        assert footer[b"format_version"] == b"1" and footer[b"run_id"].decode() == record["run_id"]
        assert json.loads(footer[b"fingerprint"]) == record["fingerprint"]


def test_a_bucket_that_grows_changes_and_shrinks(warm: Job, s3: S3Server, tiny_model: Path, tmp_path: Path) -> None:
    images, out = s3.bucket("images"), s3.bucket("out")
    for number in range(8):
        obstore.put(images, f"grows/{number}.jpg", encode(scene(seed=number), "JPEG"))
    command = ("classify", "--input", "s3://images/grows/", "--output", "s3://out/grows", "--model", tiny_model)

    assert warm(*command, env=s3.environment).code == 0
    first = tables.download(out, "grows", tmp_path / "first")
    etags = {row["uri"]: row["etag"] for row in tables.rows(first)}
    assert etags["s3://images/grows/3.jpg"] == obstore.head(images, "grows/3.jpg")["e_tag"].strip('"')

    obstore.put(images, "grows/3.jpg", encode(scene(seed=103), "JPEG"))
    obstore.put(images, "grows/new.jpg", encode(scene(seed=9), "JPEG"))
    obstore.delete(images, "grows/5.jpg")
    dry = warm(*command, "--dry-run", env=s3.environment)
    assert "would classify 2 of 8 images" in dry.out and "6 already done, 1 of the 2 to classify changed" in dry.out
    ended = warm(*command, env=s3.environment)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("8 images listed, 8 labelled, 0 rejected (6 already done, 1 kept,")
    second = tables.download(out, "grows", tmp_path / "second")
    ran = {row["uri"]: row["run_id"] for row in tables.rows(second)}
    newest = tables.success(second)["run_id"]
    assert {uri for uri, run in ran.items() if run == newest} == {
        "s3://images/grows/3.jpg", "s3://images/grows/new.jpg"
    }  # fmt: skip
    tables.require_single(second, [*(f"{number}.jpg" for number in range(8)), "new.jpg"])
    assert tables.success(second)["counts"]["kept"] == 1
    assert json.dumps(tables.runs(second)).find(SECRET) < 0 and SECRET not in ended.out + ended.err

    ended = warm(*command, "--set", "run.prune=true", env=s3.environment)
    assert ended.code == 0, ended.err
    third = tables.download(out, "grows", tmp_path / "third")
    tables.require_single(third, [*(f"{number}.jpg" for number in range(8) if number != 5), "new.jpg"])
    assert tables.success(third)["counts"]["kept"] == 0
    assert warm("verify", "s3://out/grows", env=s3.environment).code == 0


def test_a_limit_takes_the_first_and_is_noted(
    job: Job, warm: Job, folder: Path, tiny_model: Path, tmp_path: Path, without_ray: dict[str, str]
) -> None:
    output = tmp_path / "out"
    command = ("classify", "--input", folder, "--output", output, "--model", tiny_model)

    dry = job(*command, "--dry-run")
    assert dry.code == 0 and "would classify 12 of 12 images" in dry.out and "nothing was written" in dry.out
    assert "0 already done, 0 objects ignored, 0 duplicates" in dry.out, "not 0 of the 12 changed"
    assert "160×160 px from 168 (crop 0.952), bilinear, mean 0.5" in dry.out and "7 classes: a, b, c, …" in dry.out
    assert not output.exists()

    assert warm(*command, "--limit", 5).code == 0
    tables.require_single(output, [f"{number:02d}.jpg" for number in range(5)])
    assert tables.success(output)["limit"] == 5
    before = tables.parts(output)
    assert job(*command, "--limit", 5, env=without_ray).code == 0, "done ones count"
    assert tables.parts(output) == before

    (folder / "03.jpg").write_bytes(encode(scene(seed=103), "JPEG"))
    assert warm(*command).code == 0
    tables.require_single(output, [f"{number:02d}.jpg" for number in range(12)])
    assert tables.success(output)["limit"] is None
    newest = tables.success(output)["run_id"]
    redone = {Path(row["uri"]).name for row in tables.rows(output) if row["run_id"] == newest}
    assert redone == {"03.jpg", *(f"{number:02d}.jpg" for number in range(5, 12))}


def test_inputs_of_all_kinds_in_one_run_from_a_file(
    warm: Job, folder: Path, tiny_model: Path, tmp_path: Path, s3: S3Server
) -> None:
    obstore.put(s3.bucket("images"), "kinds/a b+ü%20.JPG", encode(scene(seed=30), "JPEG"))
    obstore.put(s3.bucket("images"), "kinds/no-suffix", encode(scene(seed=31), "PNG"))
    (tmp_path / "list.csv").write_text("uri,split,size\nimages/00.jpg,train,\nextra/one.bin,test,\n")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "one.bin").write_bytes(encode(scene(seed=32), "WEBP"))
    lines = [json.dumps({"uri": str(folder / "01.jpg"), "split": "val"})]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    inputs = [tmp_path / "list.csv", tmp_path / "list.jsonl", f"{folder}/0[2-4].jpg", folder / "05.jpg", folder,
              "s3://images/kinds"]  # fmt: skip
    run = tmp_path / "run.toml"
    run.write_text(
        f"input = {json.dumps([str(each) for each in inputs])}\n"
        f'output = "{tmp_path}/out/{{model}}/{{date}}"\nmodel = "{tiny_model}"\ntop_k = 99\n'
        '[classify]\nbatch_size = 4\ndtype = "float32"\n'
    )

    ended = warm(
        "classify", "--config", run, "--set", "top_k=3", "--set", "run.commit_interval_s=0.2", env=s3.environment
    )

    assert ended.code == 0, ended.err
    output = tmp_path / "out" / "tiny" / datetime.now(UTC).strftime("%Y-%m-%d")
    tables.require_single(
        output, [*(f"{number:02d}.jpg" for number in range(12)), "one.bin", "a b+ü%20.JPG", "no-suffix"]
    )
    assert tables.success(output)["counts"]["duplicates"] == 6
    splits = {Path(row["uri"]).name: row["input_split"] for row in tables.rows(output)}
    assert (splits["00.jpg"], splits["01.jpg"], splits["one.bin"], splits["02.jpg"]) == ("train", "val", "test", None)
    assert {len(row["top_k"]) for row in tables.rows(output)} == {3}
    (record,) = tables.runs(output)
    assert (
        record["config"]["classify"] == {"batch_size": 4, "dtype": "float32", "runtime": "auto"}
        and record["dtype"] == "float32"
    )
    assert SECRET not in json.dumps(record)


def test_a_model_directory_of_timm_gives_the_labels_that_timm_gives(
    warm: Job, folder: Path, tiny_model: Path, tmp_path: Path, s3: S3Server
) -> None:
    for path in tiny_model.iterdir():
        obstore.put(s3.bucket("images"), f"models/tiny/{path.name}", path.read_bytes())
    output = tmp_path / "out"
    command = ("classify", "--input", folder, "--output", output)
    exact = ("--set", "classify.dtype=float32", "--set", "classify.batch_size=5")

    ended = warm(*command, "--model", "s3://images/models/tiny", *exact, env=s3.environment)

    assert ended.code == 0, ended.err
    expected = by_hand(tiny_model, sorted(folder.iterdir()))
    clear = {name for name, (_, _, lead) in expected.items() if lead > 0.05}
    assert len(clear) >= 9, "a test that compares next to nothing"
    assert len({expected[name][0] for name in clear}) >= 4
    for row in tables.rows(output):
        label, score, _ = expected[Path(row["uri"]).name]
        assert abs(row["score"] - score) < 0.05
        assert row["label"] == label or Path(row["uri"]).name not in clear
        assert len(row["top_k"]) == 5 and np.isclose(row["top_k"][0]["score"], row["score"])

    assert warm(*command, "--model", tiny_model).code == 0, "the same bytes elsewhere are the same model"
    before = tables.parts(output)
    other = warm(*command, "--model", write_model(tmp_path / "other", seed=1, labels="hijklmn"))
    assert other.code == 5
    assert "labels" in other.err and "weights" in other.err and "preprocess" not in other.err
    assert "--output of its own" in other.err
    fewer = warm(*command, "--model", tiny_model, "--set", "top_k=2")
    assert fewer.code == 5 and "top_k: 5 there, 2 here" in fewer.err
    assert tables.parts(output) == before
    assert (output / "_SUCCESS").exists(), "a refused run takes nothing away"


def test_embeddings_and_chosen_columns(warm: Job, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (folder / "zz.jpg").write_text("no image")
    command = ("classify", "--input", folder, "--output", output, "--model", tiny_model)
    chosen = (
        "--set",
        "output.embeddings=true",
        "--set",
        "output.columns=['score', 'label']",
        "--set",
        "rejects.max_count=1",
    )
    misspelt = warm(*command, "--set", "output.columns=['lable']")
    assert misspelt.code == 2 and "did you mean 'label'" in misspelt.err
    assert "no input carries 'input_x'" in warm(*command, "--set", "output.columns=['input_x']").err

    ended = warm(*command, *chosen)

    assert ended.code == 0, ended.err
    assert columns(output, "labels") == {
        "uri": "VARCHAR", "label": "VARCHAR", "score": "FLOAT", "embedding": "FLOAT[]", **OBJECT
    }  # fmt: skip
    assert columns(output, "rejects") == REJECTS
    net = timm.create_model(f"local-dir:{tiny_model}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
    for row in tables.rows(output):
        with Image.open(row["uri"]) as image, torch.inference_mode():
            features = net.forward_features(transform(image.convert("RGB"))[None])
            expected = net.forward_head(features, pre_logits=True)[0].numpy()
        found = np.array(row["embedding"])
        assert found.shape == expected.shape
        assert found @ expected > 0.99 * np.linalg.norm(found) * np.linalg.norm(expected)
    for part in output.glob("labels/*"):
        assert pq.read_schema(part).field("embedding").type == pa.list_(pa.float16(), 96), "of seals, too"
    before = tables.parts(output)
    assert "(13 already done" in warm(*command, *chosen).out
    other = warm(*command, *chosen[:2])
    assert other.code == 5 and "output.columns" in other.err and "output.embeddings" not in other.err
    assert tables.parts(output) == before and warm("verify", output).code == 0


def test_an_input_that_may_be_empty(job: Job, tmp_path: Path, without_ray: dict[str, str]) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    command = ("classify", "--input", tmp_path / "empty", "--output", output, "--set", "source.allow_empty=true")
    ended = job(*command, env=without_ray)
    assert ended.code == 0, ended.err
    assert tables.success(output)["counts"]["listed"] == 0
    assert tables.rows(output) == [] and set(columns(output, "labels")) == set(LABELS)
    assert job("verify", output).code == 0


def test_a_long_listing_keeps_the_heart_beating(folder: Path, tmp_path: Path) -> None:
    chosen = reading.load(None, [], input=(str(folder), f"{folder}/*.jpg"), output=str(tmp_path / "out"))
    beats: list[int] = []
    with on_tick(lambda: beats.append(1)):
        preflight.list_images(preflight.prepare(chosen), None)
    assert len(beats) >= 2, "one a batch"


def test_help_names_every_config_key_and_exit_code(job: Job) -> None:
    ended = job("classify", "--help")
    assert ended.code == 0
    for word in ("rejects.max_share", "cluster.gpus_per_actor", "storage.options", "--dry-run"):
        assert word in ended.out
    shown = re.findall(r"^  (\d+(?:, \d+)*)  ", ended.out, re.MULTILINE)
    assert [int(code) for codes in shown for code in codes.split(", ")] == [each.code for each in EXIT_CODES]

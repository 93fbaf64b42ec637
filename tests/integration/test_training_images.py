"""An evaluation reports which of its images the model was trained on, in any form of input."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.evaluation.training_images import FILE, TrainingImages, content_hash
from tests.conftest import Ended, Job
from tests.integration import tables
from tests.integration.test_train import FAST, pictures, settings
from tests.unit.pictures import encode, scene

NOT_KNOWN = "whether the model was trained on them is not known"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in a folder a class."""
    return pictures(tmp_path_factory.mktemp("seen") / "data")


@pytest.fixture(scope="module")
def model(data: Path, tiny_model: Path, warm: Job) -> Path:
    """A model that was trained on them, with a refit on those that were held out first."""
    return trained(warm, data, tiny_model, data.parent / "model")


def trained(warm: Job, data: Path, base: Path, output: Path, *more: object) -> Path:
    ended = warm("train", "--input", data, "--base", base, "--output", output, "--set", "train.dtype=float32", *more)
    assert ended.code == 0, ended.err
    return output


def others(folder: Path, each: int = 2) -> Path:
    """Make pictures that no model has seen."""
    for number, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            (folder / name / f"new {i}.jpg").write_bytes(encode(scene(96, 64, seed=5_000 + 10 * number + i), "JPEG"))
    return folder


def evaluated(warm: Job, data: Path, output: Path, *more: object) -> tuple[Ended, Any]:
    """Return what an evaluation left, and what its metrics.json says of images that the model has seen."""
    ended = warm("evaluate", "--input", data, "--output", output, *more)
    assert ended.code == 0, ended.err
    return ended, json.loads((output / "metrics.json").read_text())


def as_tar(data: Path, path: Path) -> Path:
    """Pack pictures, each with its class beside it."""
    with tarfile.open(path, "w") as tar:
        for number, picture in enumerate(sorted(data.rglob("*.jpg"))):
            for suffix, content in (("jpg", picture.read_bytes()), ("cls", picture.parent.name.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def as_parquet(data: Path, path: Path) -> Path:
    """Write pictures as rows of a table."""
    paths = sorted(data.rglob("*.jpg"))
    rows = {"image": [picture.read_bytes() for picture in paths], "label": [picture.parent.name for picture in paths]}
    pq.write_table(pa.table(rows), path, row_group_size=7)
    return path


def test_the_model_directory_has_the_hashes_of_all_training_images(data: Path, model: Path) -> None:
    images = TrainingImages.read((model / FILE).read_bytes())
    assert images.trained.all() and images.proportion == 1.0
    assert images.hashes.tolist() == sorted(content_hash(path.read_bytes()) for path in data.rglob("*.jpg"))


def test_training_images_new_ones_and_both(warm: Job, data: Path, model: Path, tmp_path: Path) -> None:
    ended, metrics = evaluated(warm, data, tmp_path / "same", "--model", model)
    assert "; 24 of 24 images were trained on: " in ended.out.strip().splitlines()[-1]
    assert metrics["seen"] == {"trained": 24, "selected": 0, "compared": 24, "share_of_hashes": 1.0, "unseen": None}
    page = (tmp_path / "same" / "evaluation.html").read_text()
    assert 'class="notice warning"><b>24 of 24 images were trained on' in page
    assert metrics["top1"] == 1 and metrics["interval_95"]["top1"] == pytest.approx([24 / (24 + 3.8415), 1], abs=1e-4)

    new = others(tmp_path / "new")
    ended, metrics = evaluated(warm, new, tmp_path / "none", "--model", model)
    assert "; none of 6 images was trained on: " in ended.out and metrics["seen"]["trained"] == 0
    assert 'class="notice warning"' not in (tmp_path / "none" / "evaluation.html").read_text()

    shutil.copytree(data, new, dirs_exist_ok=True)
    ended, mixed = evaluated(warm, new, tmp_path / "both", "--model", model)
    assert "; 24 of 30 images were trained on: " in ended.out
    assert mixed["seen"]["unseen"] == {"n": 6, "top1": metrics["top1"], "interval_95": metrics["interval_95"]["top1"]}


@pytest.mark.parametrize("pack", [as_tar, as_parquet])
def test_members_of_tars_and_rows_of_tables_are_recognised_by_their_bytes(
    warm: Job, data: Path, model: Path, tmp_path: Path, pack: Any
) -> None:
    both = others(tmp_path / "both")
    shutil.copytree(data, both, dirs_exist_ok=True)
    name = "set.tar" if pack is as_tar else "set.parquet"
    ended, metrics = evaluated(warm, pack(both, tmp_path / name), tmp_path / "out", "--model", model)
    assert "; 24 of 30 images were trained on: " in ended.out and metrics["seen"]["unseen"]["n"] == 6


@pytest.mark.parametrize("pack", [as_tar, as_parquet])
def test_a_model_that_was_trained_on_a_tar_or_a_table_has_seen_the_same_images_in_folders(
    warm: Job, data: Path, tiny_model: Path, tmp_path: Path, pack: Any
) -> None:
    packed = pack(data, tmp_path / ("set.tar" if pack is as_tar else "set.parquet"))
    model = trained(warm, packed, tiny_model, tmp_path / "model")
    ended, _ = evaluated(warm, data, tmp_path / "out", "--model", model)
    assert "; 24 of 24 images were trained on: " in ended.out


@pytest.mark.parametrize("method", ["head", pytest.param("finetune", marks=pytest.mark.long)])
def test_without_a_refit_held_out_images_were_used_to_select_the_model(
    warm: Job, data: Path, model: Path, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    data, broken = Path(shutil.copytree(data, tmp_path / "data")), b"\xff\xd8\xff\xe0 and no more"
    (data / "red" / "broken.jpg").write_bytes(broken)
    more = settings(["train.refit=false", *(FAST if method == "finetune" else [])])
    selected_model = trained(warm, data, tiny_model, tmp_path / "model", *more)
    assert content_hash(broken) not in TrainingImages.read((selected_model / FILE).read_bytes()).hashes.tolist()
    (data / "red" / "broken.jpg").unlink()
    held = set(pq.read_table(selected_model / "predictions.parquet")["uri"].to_pylist())
    ended, metrics = evaluated(warm, data, tmp_path / "out", "--model", selected_model, "--against", model)
    assert len(held) == metrics["seen"]["selected"] == 24 - metrics["seen"]["trained"] == 6
    last = ended.out.strip().splitlines()[-1]
    assert "; 18 of 24 images were trained on, 6 of 24 images were used to select the model; " in last
    assert f"against {model}@" in last and "(24 of 24 images were trained on): " in last
    assert metrics["against"]["seen"]["trained"] == 24
    assert (tmp_path / "out" / "evaluation.html").read_text().count('class="notice warning"') == 2

    for path in data.rglob("*.jpg"):  # the held-out images alone, in a set of their own
        if str(path) in held:
            (tmp_path / "held" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "held" / path.parent.name / f"copy of {path.name}")
    ended, _ = evaluated(warm, tmp_path / "held", tmp_path / "two", "--model", selected_model)
    assert "; 6 of 6 images were used to select the model: " in ended.out


def test_a_model_has_seen_what_its_base_has_seen(warm: Job, data: Path, model: Path, tmp_path: Path) -> None:
    new = others(tmp_path / "new", each=4)
    second = trained(warm, new, model, tmp_path / "second")
    ended, _ = evaluated(warm, data, tmp_path / "out", "--model", second)
    assert "; 24 of 24 images were trained on: " in ended.out


def test_models_and_outputs_without_hashes_are_still_evaluated(
    warm: Job, data: Path, model: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(data, tmp_path / "data"))
    before = Path(shutil.copytree(model, tmp_path / "before"))
    (before / FILE).unlink()
    ended, metrics = evaluated(warm, data, tmp_path / "a", "--model", before)
    assert f"; {NOT_KNOWN}: " in ended.out and metrics["seen"] is None

    # What an evaluation of 0.1 left is what the main job writes with all classes named.
    out = tmp_path / "out"
    classified = warm("classify", "--input", data, "--model", model, "--output", out, "--set", "top_k=1000")
    assert classified.code == 0, classified.err
    parts = tables.parts(out)
    ended, metrics = evaluated(warm, data, out, "--model", model)
    assert f"; {NOT_KNOWN}: " in ended.out and metrics["seen"] is None and metrics["n"] == 24
    assert tables.parts(out) == parts, "nothing was labelled again"
    assert "content_hash" not in tables.rows(out)[0]

    (data / "blue" / "more.jpg").write_bytes(next(data.rglob("*.jpg")).read_bytes())
    ended, metrics = evaluated(warm, data, out, "--model", model)
    assert metrics["n"] == 25 and not any("content_hash" in row for row in tables.rows(out)), "it is continued"


def test_labels_with_hashes_are_compared_with_the_training_images(
    warm: Job, data: Path, model: Path, tmp_path: Path
) -> None:
    arguments = ("classify", "--input", data, "--model", model)
    for name, more in (("with", ["--set", "output.content_hash=true"]), ("without", [])):
        assert warm(*arguments, "--output", tmp_path / name, *more).code == 0
    rows = tables.rows(tmp_path / "with")
    assert {row["uri"]: row["content_hash"] for row in rows} == {
        str(path): content_hash(path.read_bytes()) for path in data.rglob("*.jpg")
    }
    ended, _ = evaluated(warm, data, tmp_path / "a", "--labels", tmp_path / "with")
    assert "; 24 of 24 images were trained on: " in ended.out
    ended, _ = evaluated(warm, data, tmp_path / "b", "--labels", tmp_path / "without")
    assert f"; {NOT_KNOWN}: " in ended.out
    refused = warm(*arguments, "--output", tmp_path / "with")
    assert refused.code == 5 and "output.content_hash: true there" in refused.err

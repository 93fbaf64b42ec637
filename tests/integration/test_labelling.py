"""The labelling loop: classify, export, label, train, classify; and what `explain` says on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import Job, write_model
from tests.integration import tables
from tests.unit.pictures import encode, scene
from tests.unit.test_label_studio import problems

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, str]]:
    """A flat folder of pictures of which one channel is full, and the true class of each, by its path."""
    folder, truth = tmp_path_factory.mktemp("loop") / "images", {}
    folder.mkdir()
    for number in range(36):
        name = CLASSES[number % 3]
        pixels = scene(96, 64, seed=number)
        pixels[..., {"red": 0, "green": 1, "blue": 2}[name]] = 255
        path = folder / f"{number:02d}.jpg"
        path.write_bytes(encode(pixels, "JPEG"))
        truth[str(path)] = name
    (folder / "bad.jpg").write_bytes(b"")
    return folder, truth


def annotated(tasks: list[dict[str, Any]], truth: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what Label Studio exports when a person has labelled all tasks but the first, which was skipped."""
    exported = []
    for number, task in enumerate(tasks, 1):
        value = {"choices": [truth[task["data"]["uri"]]]}
        result = {"id": f"r{number}", "type": "choices", "value": value, "from_name": "label", "to_name": "image"}
        skipped = {"id": number, "result": [], "was_cancelled": True, "completed_by": 1}
        said = {"id": number, "result": [result], "was_cancelled": False, "ground_truth": False, "completed_by": 1}
        exported.append(
            {
                "id": number,
                "annotations": [skipped if number == 1 else said],
                "data": task["data"],
                "predictions": [number],
            }
        )
    return exported


def accuracy(output: Path, truth: Mapping[str, str]) -> float:
    rows = tables.rows(output)
    return float(np.mean([row["label"] == truth[row["uri"]] for row in rows]))


def test_the_loop_from_uncertain_labels_to_a_better_model(
    tmp_path: Path, images: tuple[Path, Mapping[str, str]], warm: Job
) -> None:
    folder, truth = images
    base = write_model(tmp_path / "base", seed=1, labels=CLASSES)
    first = tmp_path / "first"
    ended = warm("classify", "--input", folder, "--output", first, "--model", base, "--set", "output.embeddings=true")
    assert ended.code == 0, ended.err

    tasks_file = tmp_path / "tasks.json"
    ended = warm("export", first, "--to", tasks_file, "--uncertain", 30, "--format", "label-studio")
    assert ended.code == 0, ended.err
    assert "30 images of 36 exported, the smallest margins, diverse by embedding" in ended.out
    tasks, config = json.loads(tasks_file.read_text()), (tmp_path / "tasks.xml").read_text()
    assert len(tasks) == 30 and not [problem for task in tasks for problem in problems(config, task)]
    assert all(task["predictions"] for task in tasks)

    export = tmp_path / "export.json"
    export.write_text(json.dumps(annotated(tasks, truth)))
    model = tmp_path / "model"
    ended = warm("train", "--input", export, "--output", model, "--base", base)
    assert ended.code == 0, ended.err
    assert "1 task without a label omitted" in ended.err
    classes = json.loads((model / "training.json").read_text())["data"]["classes"]
    assert set(classes) == set(CLASSES) and sum(classes.values()) == 29

    second = tmp_path / "second"
    ended = warm("classify", "--input", folder, "--output", second, "--model", model)
    assert ended.code == 0, ended.err
    assert accuracy(second, truth) > max(0.8, accuracy(first, truth))

    ended = warm("evaluate", "--input", export, "--labels", second, "--output", tmp_path / "evaluation")
    assert ended.code == 0, ended.err
    assert "29 images scored" in ended.out

    copy = tmp_path / "copy"
    ended = warm("compact", second, "--to", copy)
    assert ended.code == 0, ended.err
    assert pq.read_table(copy / "labels").num_rows == 36 and len(list(copy.glob("*/*.parquet"))) == 2


def test_explain_labels_an_image_again_and_shows_what_the_network_sees(
    tmp_path: Path, images: tuple[Path, Mapping[str, str]], warm: Job, job: Job
) -> None:
    folder, _ = images
    model, output = write_model(tmp_path / "model", seed=2, labels=CLASSES), tmp_path / "out"
    assert warm("classify", "--input", folder, "--output", output, "--model", model).code == 0
    path, seen = folder / "04.jpg", tmp_path / "seen.png"
    ended = job("explain", output, path, "--again", "--image", seen, "--json")
    assert ended.code == 0, ended.err
    values, (row,) = json.loads(ended.out), [row for row in tables.rows(output) if row["uri"] == str(path)]
    assert values["status"] == "labelled" and values["row"]["label"] == row["label"]
    assert values["now"]["row"]["label"] == row["label"] and values["now"]["difference"] is None
    assert not values["now"]["changed"] and values["listings"][0]["uri"] == str(path)
    with Image.open(seen) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (160, 160, 3) and pixels[..., 1].mean() > 240, "the green picture, at the network's size"

    ended = warm("explain", output, folder / "bad.jpg", "--again")
    assert ended.code == 0 and ended.out.count("rejected     empty") == 2, ended.out + ended.err
    path.write_bytes((folder / "05.jpg").read_bytes())
    ended = warm("explain", output, path, "--again")
    assert ended.code == 0 and "the image has changed since" in ended.out, ended.out + ended.err
    ended = warm("explain", output, folder / "4.jpg")
    assert ended.code == 2 and "no object of that name exists; did you mean" in ended.err
    write_model(tmp_path / "model2", seed=3, labels=CLASSES)
    ended = warm("explain", output, path, "--again", "--model", tmp_path / "model2")
    assert ended.code == 2 and "is not the model that wrote the labels" in ended.err

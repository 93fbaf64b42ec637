"""Training, end to end, as its users meet it: labelled images in, a model directory out that others open."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.commands import train
from imgbatch.evaluation.training_images import TrainingImages
from imgbatch.storage.stores import Folder
from tests.conftest import Job, S3Server
from tests.unit.pictures import encode, scene

COLOURS = {"blue": 2, "green": 1, "red": 0}
FAST = ["train.method=finetune", "train.epochs=2", "train.resolution=64", "train.lr=0.003", "train.batch_size=6"]


def pictures(folder: Path, names: Sequence[str] = tuple(COLOURS), each: int = 8) -> Path:
    """Make a folder a class, and pictures in it of which one channel is full."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = scene(96, 64, seed=100 * number + i)
            pixels[..., COLOURS.get(name, number % 3)] = 255
            (folder / name / f"{i:02d}.jpg").write_bytes(encode(pixels, "JPEG"))
    return folder


def settings(pairs: Sequence[str]) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def rows(query: str) -> list[tuple]:
    with duckdb.connect() as connection:
        return connection.sql(query).fetchall()


def test_timm_and_the_main_job_predict_with_a_trained_head_what_training_predicted(
    tmp_path: Path, tiny_model: Path, warm: Job
) -> None:
    data = pictures(tmp_path / "data")
    (data / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (data / "grey").mkdir()
    (data / "lone").mkdir()
    (data / "lone" / "one.jpg").write_bytes(encode(scene(96, 64, seed=999), "JPEG"))
    tree = tmp_path / "tree.csv"
    tree.write_text("label,kind\nred,warm\nblue,cold\ngreen,cold\nlone,cold\n")
    model, labels = tmp_path / "model", tmp_path / "labels"
    same = settings(["train.dtype=float32", "classify.dtype=float32"])
    arguments = ("--input", data, "--output", model, "--base", tiny_model, "--taxonomy", tree)
    ended = warm("train", *arguments, *same[:2])
    assert ended.code == 0, ended.err
    assert "head of" in ended.err and "for 7 classes is replaced by one for 4" in ended.err
    assert f"{data}/grey holds no image: it is no class" in ended.err
    assert "1 class with one image" in ended.err and "lone" in ended.err
    assert "1 rejected" in ended.out

    wanted = {"config.json", "model.safetensors", "taxonomy.csv", "metrics.json", "training.json", "training.html"}
    wanted |= {"predictions.parquet", "rejects.parquet", "training_images.parquet"}
    assert {path.name for path in model.iterdir()} == wanted
    assert (model / "taxonomy.csv").read_bytes() == tree.read_bytes()
    page = (model / "training.html").read_text()
    assert "1 images could not be read" not in page and "1 image could not be read" in page
    assert rows(f"select reason, uri from '{model}/rejects.parquet'") == [("truncated", f"{data}/red/broken.jpg")]
    figures, record = (json.loads((model / name).read_text()) for name in ("metrics.json", "training.json"))
    assert figures["n"] == 24 and figures["top1"] > 0.7 and set(figures["levels"]) == {"kind", "label"}
    assert record["temperature"] > 0 and record["data"]["classes"] == {"blue": 8, "green": 8, "lone": 1, "red": 9}

    assert warm("classify", "--input", data, "--output", labels, "--model", model, *same[2:]).code == 0
    assert rows(f"select distinct levels[1].level from '{labels}/labels/*.parquet'") == [("kind",)]
    (data / "red" / "broken.jpg").unlink()
    assert _all_three_agree(warm, model, model, data, labels, tmp_path / "evaluation", *same[2:]) == 24
    _timm_agrees(model, labels, data)


def _all_three_agree(
    warm: Job, model: object, trained: Path, data: Path, labels: Path, out: Path, *more: str, **env: Any
) -> int:
    """Compare the predictions of training, evaluate.py and classify.py for the held-out images; return their number."""
    ended = warm("evaluate", "--input", data, "--model", model, "--output", out, *more, **env)
    assert ended.code == 0, ended.err
    compared = rows(
        f"select p.label, l.label, e.label, p.score, l.score, e.score, p.truth, e.truth "
        f"from '{trained}/predictions.parquet' p join '{labels}/labels/*.parquet' l using (uri) "
        f"join '{out}/predictions.parquet' e using (uri)"
    )
    for trained_label, classified, evaluated, *scores, truth, evaluated_truth in compared:
        assert trained_label == classified == evaluated and truth == evaluated_truth
        assert max(scores) - min(scores) < 0.002
    return len(compared)


def test_images_that_could_not_be_read_are_retried_by_the_next_training(
    tmp_path: Path, tiny_model: Path, warm: Job
) -> None:
    data, listed = pictures(tmp_path / "data", each=4), tmp_path / "list.csv"
    paths = sorted(data.rglob("*.jpg"))
    listed.write_text("uri,label,split\n" + "".join(f"{path},{path.parent.name},\n" for path in paths))
    away = paths[5].rename(tmp_path / "away.jpg")
    cached = ["--input", listed, "--base", tiny_model, "--set", f"train.cache={tmp_path / 'cache'}"]
    first = warm("train", *cached, "--output", tmp_path / "first")
    assert first.code == 0 and "1 rejected" in first.out, first.err
    assert rows(f"select reason from '{tmp_path}/first/rejects.parquet'") == [("vanished",)]
    away.rename(paths[5])
    second = warm("train", *cached, "--output", tmp_path / "second")
    assert second.code == 0 and "0 rejected" in second.out, second.err


def test_without_a_refit_the_model_is_not_trained_on_held_out_images(
    tmp_path: Path, tiny_model: Path, warm: Job
) -> None:
    names = ["n01440764", "n02123159", "n02124075"]  # of WordNet: they stay what they are called in the input
    data, model, tree = pictures(tmp_path / "data", names, each=10), tmp_path / "model", tmp_path / "tree.csv"
    (data / "lone").mkdir()
    (data / "lone" / "one.jpg").write_bytes(encode(scene(96, 64, seed=999), "JPEG"))
    (data / "test").mkdir()
    (data / "test" / "0.tar").write_bytes(b"nobody reads this")
    tree.write_text("label,kind\nn01440764,fish\nn02123159,cat\nn02124075,cat\nlone,other\n")
    same = settings(["train.dtype=float32", "train.refit=false"])
    ended = warm("train", "--input", data, "--output", model, "--base", tiny_model, "--taxonomy", tree, *same)
    assert ended.code == 0 and ", 0 rejected" in ended.out, ended.err
    record = json.loads((model / "training.json").read_text())
    assert record["metrics"]["n"] == 6 and record["images"] == 25 and record["folds"] == 1
    held = rows(f"select label, unseen_label, score, unseen_score from '{model}/predictions.parquet'")
    for label, unseen, score, unseen_score in held:
        assert label == unseen and score == pytest.approx(unseen_score, abs=0.02)

    labels = tmp_path / "labels"
    assert (
        warm("classify", "--input", *(data / name for name in names[:1]), "--output", labels, "--model", model).code
        == 0
    )
    predicted = rows(f"select label, levels[1].label from '{labels}/labels/*.parquet'")
    assert {label for label, _ in predicted} <= {*names, "lone"} and {kind for _, kind in predicted} <= {
        "fish",
        "cat",
        "other",
    }


def tar_of(tar: Path, names: dict[Path, str], labels: dict[Path, str]) -> None:
    """Write a tar with all images, and then their sidecars in the reverse order."""
    with tarfile.open(tar, "w") as archive:
        for path, name in names.items():
            archive.add(path, f"{name}.jpg")
        for path, name in reversed(names.items()):
            sidecar = tarfile.TarInfo(f"{name}.cls")
            sidecar.size = len(labels[path])
            archive.addfile(sidecar, io.BytesIO(labels[path].encode()))


def test_labels_far_from_their_images_in_a_tar_are_learned_and_scored(
    tmp_path: Path, tiny_model: Path, warm: Job
) -> None:
    images = sorted(pictures(tmp_path / "in", each=4).rglob("*.jpg"))
    names = {path: f"day{number % 2}/{number:02d}" for number, path in enumerate(images)}
    tar_of(tmp_path / "a.tar", names, {path: path.parent.name for path in names})
    command = ("--input", tmp_path / "a.tar", "--output")
    ended = warm("train", *command, tmp_path / "model", "--base", tiny_model)
    assert ended.code == 0, ended.err
    data = json.loads((tmp_path / "model" / "training.json").read_text())["data"]
    assert data["classes"] == dict.fromkeys(COLOURS, 4) and data["unlabelled"] == 0
    assert data["sources"] == [{"uri": str(tmp_path / "a.tar"), "labels": "sidecars", "splits": "none"}]
    scored = warm("evaluate", *command, tmp_path / "out", "--model", tmp_path / "model")
    assert scored.code == 0 and scored.out.splitlines()[-1].startswith("12 images scored"), scored.err
    truths = rows(f"select uri, truth from '{tmp_path}/out/predictions.parquet'")
    assert {uri.partition("#")[2].removesuffix(".jpg"): truth for uri, truth in truths} == {
        name: path.parent.name for path, name in names.items()
    }
    assert "labels from sidecars" in scored.err, "the table is shown once the tars are read"
    wrong = dict(zip(COLOURS, [*COLOURS][1:] + [*COLOURS][:1], strict=True))
    tar_of(tmp_path / "b.tar", names, {path: wrong[path.parent.name] for path in names})
    scored = warm(
        "evaluate", "--input", tmp_path / "b.tar", "--output", tmp_path / "wrong", "--model", tmp_path / "model"
    )
    assert scored.code == 0 and "top-1 0.00%" in scored.out, scored.out
    page = (tmp_path / "wrong" / "evaluation.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/webp') >= 6 and "not shown:" not in page, "members of the tar are shown"


def test_another_image_column_is_another_cache(tmp_path: Path, tiny_model: Path, warm: Job) -> None:
    paths = sorted(pictures(tmp_path / "data", each=4).rglob("*.jpg"))
    table = {
        "left": [path.read_bytes() for path in paths], "right": [b"no image"] * len(paths),
        "label": pa.array([i // 4 for i in range(len(paths))]), "group": pa.array(range(len(paths)), pa.int32()),
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "images.parquet")
    arguments = [
        "--input",
        tmp_path / "images.parquet",
        "--base",
        tiny_model,
        "--set",
        f"train.cache={tmp_path / 'cache'}",
    ]
    left = warm("train", *arguments, "--output", tmp_path / "left", "--set", "source.image_column=left")
    assert left.code == 0, left.err
    assert json.loads((tmp_path / "left" / "training.json").read_text())["data"]["classes"] == {"0": 4, "1": 4, "2": 4}
    right = warm("train", *arguments, "--output", tmp_path / "right", "--set", "source.image_column=right")
    rejects = tmp_path / "right" / "_training" / "rejects.parquet"
    assert right.code == 4 and f"none of 12 images could be labelled: look at the reasons in {rejects}" in right.err
    assert rows(f"select distinct reason from '{rejects}'") == [("not_an_image",)]


def test_too_many_workers_are_refused_with_the_reason(tmp_path: Path, tiny_model: Path, job: Job, warm: Job) -> None:
    data = pictures(tmp_path / "data", each=3)
    arguments = [
        "train",
        "--input",
        data,
        "--base",
        tiny_model,
        *settings([*FAST, "cluster.startup_timeout_s=1"]),
        "--set",
    ]
    ended = job(*arguments, "train.workers=6", "--output", tmp_path / "a")
    assert ended.code == 3 and "train.workers=6 asks for 1 CPU each" in ended.err, ended.err
    ended = warm(*arguments, "train.workers=7", "--output", tmp_path / "b")
    assert ended.code == 2 and "train.workers=7 for 6 images to learn from: each needs at least one" in ended.err, (
        ended.err
    )


def _timm_agrees(model: Path, labels: Path, data: Path) -> None:
    """Compare the softmax of timm, with its own transform, with the score of the main job."""
    import timm
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    net = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    names = net.pretrained_cfg["label_names"]
    transform = create_transform(**resolve_model_data_config(net), is_training=False)
    for uri, label, score in rows(f"select uri, label, score from '{labels}/labels/*.parquet' order by uri limit 5"):
        with torch.inference_mode(), Image.open(uri) as image:
            scores = net(transform(image.convert("RGB"))[None]).softmax(1)[0]
        assert names[int(scores.argmax())] == label
        assert float(scores.max()) == pytest.approx(score, abs=0.03)


@pytest.mark.long
def test_finetuning_on_ray_train_from_a_tar_into_a_store(
    tmp_path: Path, s3: S3Server, tiny_model: Path, warm: Job
) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, path in enumerate(sorted(pictures(tmp_path / "data", each=5).rglob("*.jpg"))):
            for suffix, content in (("jpg", path.read_bytes()), ("cls", path.parent.name.encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    output, base = "s3://out/trained", ["--base", tiny_model]
    more = settings([*FAST, "train.epochs=1", "train.dtype=float32"])
    data, env = tmp_path / "shard.tar", s3.environment
    ended = warm("train", "--input", data, "--output", output, *base, *more, env=env)
    assert ended.code == 0, ended.err
    assert re.search(r"learn epoch 1/1: loss [\d.]+, accuracy [\d.]+ %, [\d.,]+ images/s; held out: loss", ended.err)
    place = Folder(s3.stores(), output)
    assert "config.json" in place.names() and not [name for name in place.names() if name.startswith("_training")]
    assert json.loads(place.read("training.json"))["data"]["classes"] == dict.fromkeys(COLOURS, 5)
    known = TrainingImages.read(place.read("training_images.parquet"))
    assert len(known.hashes) == 15 and known.trained.all(), "those that were held out before the refit as well"

    trained, labels, same = tmp_path / "trained", tmp_path / "labels", settings(["classify.dtype=float32"])
    trained.mkdir()
    (trained / "predictions.parquet").write_bytes(place.read("predictions.parquet"))
    ended = warm("classify", "--input", data, "--output", labels, "--model", output, *same, env=env)
    assert ended.code == 0, ended.err
    assert _all_three_agree(warm, output, trained, data, labels, tmp_path / "evaluation", *same, env=env) == 3


@pytest.mark.parametrize(
    ("make", "more", "code", "message"),
    [
        (lambda data: pictures(data, ["Red", "red"], 2), [], 2, "'Red' (2 images) and 'red'"),
        (lambda data: [pictures(data / "a", ["red"], 1), pictures(data / "b", ["red"], 1)], [], 2, "is in two places"),
        (lambda data: pictures(data, ["red"], 2), [], 2, "holds 1 class (red): at least two are needed"),
        (lambda data: pictures(data, ["red", "blue"], 1), ["--taxonomy", "TREE"], 2, "green"),
        (lambda data: pictures(data, ["red", "blue"], 1), ["--taxonomy", "gone.csv"], 2, "gone.csv does not exist"),
        (lambda data: None, [], 2, "does not exist"),
        (lambda data: pictures(data, ["red", "blue"], 1), ["--output", "MODEL"], 5, "holds a model already"),
        (lambda data: pictures(data, ["red", "blue"], 1), settings(["train.pretrained=false", "train.method=head"]), 2, "base"),
        (lambda data: pictures(data, ["red", "blue"], 1), ["--set", "train.metod=head"], 2, "did you mean 'train.method'?"),
        (lambda data: pictures(data, ["red", "blue"], 1), ["--output", "INSIDE"], 2, "is inside --input"),
        (lambda data: data.mkdir(), [], 2, "no image in"),
    ],
    ids=[
        *("case", "two places", "one class", "taxonomy", "no taxonomy", "no input", "not empty", "no base", "key", "inside"),
        "empty",
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_clear_error(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], object], more: list[str], code: int, message: str,
) -> None:  # fmt: skip
    data, tree = tmp_path / "data", tmp_path / "tree.csv"
    make(data)
    tree.write_text("label,kind\nred,warm\ngreen,cold\n")
    places = {"TREE": str(tree), "MODEL": str(tiny_model), "INSIDE": str(data / "model")}
    output = [] if "--output" in more else ["--output", str(tmp_path / "model")]
    argv = ["--input", str(data), *output, "--base", str(tiny_model), *(places.get(part, part) for part in more)]
    assert train.main(argv) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.fixture
def finetune(tmp_path: Path, tiny_model: Path) -> list[object]:
    """The arguments of a long fine-tuning."""
    data = pictures(tmp_path / "data")
    more = settings([*FAST, "train.epochs=6", "train.patience=6", "train.dtype=float32"])
    return ["train", "--input", data, "--base", tiny_model, *more]


def logits(model: Path) -> np.ndarray:
    return np.array(rows(f"select unseen_score, score from '{model}/predictions.parquet' order by uri"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_driver_resumes_from_its_checkpoint_with_the_same_result(
    tmp_path: Path, finetune: list, job: Job, started: Callable
) -> None:
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    assert job(*finetune, "--output", complete, timeout=600).code == 0
    process = started(*finetune, "--output", killed)
    deadline = time.monotonic() + 300
    while not list(killed.glob("_training/fit-*/checkpoint.pt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert not (killed / "config.json").exists()
    ended = job(*finetune, "--output", killed, timeout=600)
    assert ended.code == 0, ended.err
    assert "resuming from the checkpoint" in ended.err
    assert np.array_equal(logits(complete), logits(killed))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_lost_worker_is_replaced_and_two_workers_train_as_well_as_one(
    tmp_path: Path, finetune: list, job: Job, started: Callable
) -> None:
    import psutil

    model = tmp_path / "model"
    process = started(*finetune, "--output", model, "--set", "train.workers=2")
    deadline = time.monotonic() + 300
    while not list(model.glob("_training/fit-*/checkpoint.pt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    workers = [p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
    mine = [p for p in workers if os.getpgid(p.pid) == process.pid or process.pid in {q.pid for q in p.parents()}]
    mine[0].kill()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "resuming from the checkpoint" in err
    alone = tmp_path / "alone"
    assert job(*finetune, "--output", alone, timeout=600).code == 0
    first, second = (json.loads((place / "metrics.json").read_text())["top1"] for place in (model, alone))
    assert abs(first - second) <= 0.34 and min(first, second) > 0.5

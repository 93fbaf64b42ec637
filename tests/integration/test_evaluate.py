"""jobs/evaluate.py, end to end: by the main job, from its tables, against another model, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import Job
from tests.integration import tables
from tests.integration.tables import by_hand
from tests.unit.pictures import encode, scene

LABELS = "abcdefg"


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as training leaves it: with a taxonomy and a temperature."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("trained") / "model"))
    (path / "taxonomy.csv").write_text(
        "label,half\n" + "".join(f"{x},{'early' if x < 'd' else 'late'}\n" for x in LABELS)
    )
    (path / "training.json").write_text(json.dumps({"temperature": 1.5}))
    return path


@pytest.fixture(scope="module")
def classes(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class, with the pictures that the model predicts as the class, except for two."""
    place = tmp_path_factory.mktemp("classes")
    pictures = place / "flat"
    pictures.mkdir()
    for number in range(16):
        (pictures / f"{number:02d}.png").write_bytes(encode(scene(160, 160, seed=number), "PNG"))
    predicted = by_hand(trained, sorted(pictures.iterdir()))
    for name, (label, _, _) in predicted.items():
        folder = place / "in" / ("g" if name in ("03.png", "07.png") and label != "g" else label)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(pictures / name, folder / name)
    return place / "in"


def test_class_folders_two_models_and_the_tables_of_an_earlier_run(
    warm: Job, job: Job, trained: Path, tiny_model: Path, classes: Path, tmp_path: Path
) -> None:
    command = ("evaluate", "--input", classes, "--model", trained, "--output", tmp_path / "out")
    ended = warm(*command, "--against", tiny_model)
    assert ended.code == 0, ended.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    truth = {path.name: path.parent.name for path in classes.rglob("*.png")}
    predicted = tables.labels(tmp_path / "out")
    wrong = sorted(name for name in truth if truth[name] != predicted[name])
    assert {"03.png", "07.png"} & set(wrong) and len(wrong) <= 3
    assert metrics["n"] == 16 and metrics["top1"] == pytest.approx(1 - len(wrong) / 16)
    assert list(metrics["levels"]) == ["half", "label"] and metrics["levels"]["half"] >= metrics["levels"]["label"]
    assert metrics["temperature"] == 1.5 and metrics["ece_before_temperature"] not in (None, metrics["ece"])
    assert metrics["against"]["n"] == 16 and metrics["against"]["compared"]["top1"]["difference"] == pytest.approx(
        0, abs=0.07
    )
    predictions = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert {row["uri"].rpartition("/")[2]: row["truth"] for row in predictions} == truth
    assert [row["right"] for row in predictions] == [row["truth"] == row["label"] for row in predictions]
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count("data:image/webp;base64,") >= len(wrong) and "after temperature" in page
    assert ended.out.strip().splitlines()[-1].startswith("16 images scored: top-1 ")

    (tmp_path / "truths.csv").write_text(
        "uri,label\n" + "".join(f"{path},{path.parent.name}\n" for path in classes.rglob("*.png"))
    )
    again = job(
        "evaluate", "--labels", tmp_path / "out", "--input", tmp_path / "truths.csv", "--output", tmp_path / "two"
    )
    assert again.code == 0, again.err
    same = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert same == {key: value for key, value in metrics.items() if key != "against"}


def test_unknown_labels_and_rejects_are_refused_before_any_figure(
    warm: Job, tiny_model: Path, classes: Path, tmp_path: Path
) -> None:
    mixed = Path(shutil.copytree(classes, tmp_path / "mixed"))
    (mixed / "A ").mkdir()
    (mixed / "A " / "x.png").write_bytes(b"")
    command = ("evaluate", "--input", mixed, "--model", tiny_model, "--output", tmp_path / "out")
    unknown = warm(*command)
    assert (
        unknown.code == 2
        and f"1 image with labels that are unknown to {tiny_model}: 'A', did you mean 'a'?" in unknown.err
    )
    assert not (tmp_path / "out" / "labels").exists(), "before anything was classified"
    (mixed / "A ").rename(mixed / "b2").joinpath("x.png").rename(next(mixed.glob("?")) / "x.png")
    rejected = warm(*command)
    assert rejected.code == 4 and "16 of 17 images were scored; 1 has no label" in rejected.err
    assert "x.png (empty)" in rejected.err and not (tmp_path / "out" / "metrics.json").exists()
    assert "Traceback" not in unknown.err + rejected.err


def test_tables_with_custom_labels_are_scored_by_their_record(warm: Job, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"class {x}" for x in LABELS))
    pictures, own = tmp_path / "in" / "class c", ("--set", f"model.labels={tmp_path / 'names.txt'}")
    pictures.mkdir(parents=True)
    (pictures / "1.png").write_bytes(encode(scene(160, 160, seed=1), "PNG"))
    out, inputs = tmp_path / "out", ("--input", tmp_path / "in")
    assert warm("classify", *inputs, "--model", tiny_model, "--output", out, *own).code == 0
    scored = warm("evaluate", *inputs, "--labels", out, "--output", tmp_path / "{date}" / "{model}")
    assert scored.code == 0 and "1 image scored" in scored.out, scored.err
    assert len(list(tmp_path.glob("20*/*/metrics.json"))) == 1
    other = warm("evaluate", *inputs, "--model", tiny_model, "--against", tiny_model, "--output", tmp_path / "b", *own)
    assert other.code == 2 and "1 image with labels that are unknown to" in other.err, "the second model's own names"
    assert not (tmp_path / "b" / "labels").exists(), "before anything was classified"


def test_folders_of_wordnet_ids_and_of_class_numbers_with_the_default_model(warm: Job, tmp_path: Path) -> None:
    for folders, more in (
        (("n02123045", "n01440764"), ()),
        (("281", "0"), ("--set", "source.label_is=index")),
    ):
        place, out = tmp_path / folders[0], tmp_path / f"out-{folders[0]}"
        for number, folder in enumerate(folders):
            (place / folder).mkdir(parents=True)
            (place / folder / f"{number}.png").write_bytes(encode(scene(160, 160, seed=number), "PNG"))
        ended = warm("evaluate", "--input", place, "--output", out, *more)
        assert ended.code == 0 and "2 images scored" in ended.out, ended.err
        truths = pq.read_table(out / "predictions.parquet", columns=["uri", "truth"]).to_pylist()
        assert {Path(row["uri"]).name: row["truth"] for row in truths} == {"0.png": "tabby", "1.png": "tench"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "x", "--against", "y", "--input", "."), "there is none to compare with"),
        (("--labels", "/nothing/here", "--input", "."), "--labels /nothing/here does not exist"),
        (("--labels", "tests", "--input", "."), "is no output of classify.py"),
        (("--labels", ".", "--input", ".", "--model", "efficientnet_lite1"), "did you mean 'efficientnet_lite0'?"),
        ((), "--input"),
    ],
)
def test_wrong_flags_are_refused_with_a_clear_error(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from imgbatch.commands import evaluate

    assert evaluate.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_tables_without_a_scored_column_are_refused(tmp_path: Path) -> None:
    from imgbatch.config.sections import StorageConfig
    from imgbatch.errors import InputError
    from imgbatch.evaluation.label_tables import require_columns
    from imgbatch.storage.stores import Folder, Stores

    output = Folder(Stores(StorageConfig()), str(tmp_path))
    require_columns(output, [])
    with pytest.raises(InputError, match=r"labels lacks the columns .*model.*: it was written with output\.columns"):
        require_columns(output, ["label", "score", "embedding", "content_hash"])

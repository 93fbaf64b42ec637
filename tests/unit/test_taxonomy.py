"""The label tree: reading, refusals, and sums that never decrease from child to parent."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from imgbatch.config.sections import ModelConfig, StorageConfig
from imgbatch.errors import ModelError
from imgbatch.inference.label_columns import answer_columns
from imgbatch.models import builtin, imagenet, loading, taxonomy
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.base import Prediction
from imgbatch.models.runtimes.torch_runtime import TorchRuntime
from imgbatch.storage.stores import Stores

FRUIT = ["Gala", "Fuji", "Banana", "Carrot"]
CSV = b"label,kind,department\nFuji,Apple,Fruit\nGala,Apple,Fruit\nBanana,Banana,Fruit\nCarrot,Root,Vegetable\n"
JSON = {"Fruit": {"Apple": ["Gala", "Fuji"], "Banana": ["Banana"]}, "Vegetable": {"Root": ["Carrot"]}}


def test_csv_gives_paths_in_the_models_order() -> None:
    found = taxonomy.read(CSV, "t.csv", FRUIT)
    assert [level.name for level in found.levels] == ["department", "kind", "label"]
    assert [found.path(number) for number in range(4)] == [
        ["Fruit", "Apple", "Gala"],
        ["Fruit", "Apple", "Fuji"],
        ["Fruit", "Banana", "Banana"],
        ["Vegetable", "Root", "Carrot"],
    ]
    assert found.levels[-1].nodes == tuple(FRUIT) and found.levels[-1].node_of == (0, 1, 2, 3)


def test_pointer_or_web_page_instead_of_a_tree_is_named() -> None:
    with pytest.raises(ModelError, match=r"t\.csv is a Git LFS pointer.*git lfs pull"):
        taxonomy.read(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "t.csv", FRUIT)
    with pytest.raises(ModelError, match=r"t\.json is an HTML page"):
        taxonomy.read(b"<html>Please log in", "t.json", FRUIT)


def test_labels_unknown_to_the_model_are_omitted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    more = CSV + b"Plum,Stone,Fruit\nLime,Citrus,Fruit\n"
    found = taxonomy.read(more, "surplus.csv", FRUIT)
    assert found == taxonomy.read(CSV, "t.csv", FRUIT) and found.digest == taxonomy.read(CSV, "t.csv", FRUIT).digest
    taxonomy.read(more, "surplus.csv", FRUIT)
    (said,) = caplog.messages
    assert said == "surplus.csv: 2 labels unknown to the model ('Lime', 'Plum'): omitted from the tree"


def test_two_spellings_are_refused_for_unknown_labels_only() -> None:
    tree = b"label,kind\nCardigan,dog\ncardigan,cloth\nPlum,fruit\n"
    assert taxonomy.read(tree, "t.csv", ["Cardigan", "cardigan"]).path(0) == ["dog", "Cardigan"]
    with pytest.raises(ModelError, match="'Plum' and 'plum'"):
        taxonomy.read(tree + b"plum,fruit\n", "t.csv", ["Cardigan", "cardigan"])


def test_json_and_csv_give_the_same_tree() -> None:
    from_csv = taxonomy.read(CSV, "t.csv", FRUIT)
    named = {"levels": ["department", "kind", "label"], "tree": JSON}
    assert taxonomy.read(json.dumps(named).encode(), "t.json", FRUIT) == from_csv
    plain = taxonomy.read(json.dumps(JSON).encode(), "T.JSON", FRUIT)
    assert [level.name for level in plain.levels] == ["level_1", "level_2", "label"]
    assert [level.nodes for level in plain.levels] == [level.nodes for level in from_csv.levels]


def test_written_tree_and_row_order_keep_the_digest() -> None:
    found = taxonomy.read(b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n"), "t.csv", FRUIT)
    assert taxonomy.read(found.to_csv(), "t.csv", FRUIT) == found
    head, *rows = CSV.splitlines()
    assert taxonomy.read(b"\n".join([head, *reversed(rows)]), "t.csv", FRUIT).digest == found.digest
    assert taxonomy.read(CSV.replace(b"Root", b"Stem"), "t.csv", FRUIT).digest != found.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CSV.replace(b"Carrot,Root,Vegetable\n", b""), "1 label of the model is missing ('Carrot')"),
        (CSV.replace(b"Carrot", b"carot"), "1 label unknown to the model ('carot', did you mean 'Carrot'?)"),
        (CSV + b"gala,Apple,Fruit\n", "'Gala' and 'gala'"),
        (CSV.replace(b"Gala", b"gala "), "('Gala', did you mean 'gala'?)"),
        (CSV.replace(b"Gala,Apple", b"Gala,Pome").replace(b"Banana,Banana,Fruit", b"Banana,Pome,Vegetable"),
         "kind 'Pome' has two parents, 'Fruit' (line 3) and 'Vegetable' (line 4)"),
        (CSV + b"Gala,Pear,Fruit\n", "label 'Gala' has two parents, 'Apple' (line 3) and 'Pear' (line 6)"),
        (CSV + b"Gala,Apple,Fruit\n", "'Gala' is in two places (line 3 and line 6)"),
        (b"label,kind\nA,B\nB,C\nC,A\n", "a cycle, 'A' > 'B' > 'C' > 'A'"),
        (CSV.replace(b"Banana,Banana,", b"Banana,,"), "line 4: 'Banana,,Fruit' is not as deep as the levels"),
        (CSV.replace(b"Banana,Banana,Fruit", b"Banana,Fruit"), "line 4: 'Banana,Fruit' is not as deep"),
        (b"label\nGala\n", "its first line is 'label'"),
        (b"", "its first line is ''"),
        (b"label,kind,kind\n", "each once"),
        (b"label,kind\n\"Gala,Apple\n", "t.csv, line 2"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)  # fmt: skip
def test_invalid_csv_names_the_fault(content: bytes, message: str) -> None:
    with pytest.raises(ModelError) as refused:
        taxonomy.read(content, "s3://b/m/t.csv", FRUIT)
    assert message in str(refused.value) and "t.csv" in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"Fruit": {"Apple": ["Gala"]}, "Fruit": {}}', "'Fruit' occurs twice"),
        ('{"Fruit": {"Apple": ["Gala", "Fuji"]}, "Carrot": ["Carrot"]}', "Carrot > Carrot is 2 levels deep, not 3"),
        ('{"A": {"B": {"A": {"B": ["Gala"]}}}}', "a cycle, 'A' > 'B' > 'A'"),
        ('{"Fruit": ["Gala", "Fuji"], "Root": ["Gala"]}', "'Gala' has two parents, 'Fruit'"),
        ('{"Fruit": ["Gala", "Gala"]}', "'Gala' is in two places"),
        ('{"Fruit": {}}', "Fruit has {}"),
        ('{"Fruit": 3}', "Fruit has 3"),
        ('["Gala"]', "no levels above the labels"),
        ('{"levels": ["kind", "kind"], "tree": {"Fruit": ["Gala"]}}', "levels is"),
        ('{"levels": 2, "tree": {"Fruit": ["Gala"]}}', "levels is 2"),
        ("{", "is not a tree of labels"),
    ],
)
def test_invalid_json_names_the_fault(content: str, message: str) -> None:
    with pytest.raises(ModelError) as refused:
        taxonomy.read(content.encode(), "t.json", FRUIT)
    assert message in str(refused.value)


SPELLINGS = {
    "a node": b"label,kind\nFuji,Apple\nGala,apple\nBanana,Banana\nCarrot,Root\n",
    "a node with a space": b"label,kind\nFuji,Stone fruit\nGala,Stone_Fruit\nBanana,Banana\nCarrot,Root\n",
    "an invisible character": "label,kind\nFuji,Apple\nGala,Apple\u200b\nBanana,Banana\nCarrot,Root\n".encode(),
    "a level": b"label,kind,Kind\nFuji,A,B\nGala,A,B\nBanana,C,B\nCarrot,D,E\n",
    "labels beside the model's": b"label,kind\nFuji,A\nfuji,A\nGala,A\nBanana,B\nCarrot,C\n",
}


@pytest.mark.parametrize("what", SPELLINGS)
def test_name_in_two_spellings_is_refused(what: str) -> None:
    with pytest.raises(
        ModelError, match=r"t\.csv: .* that differ only in case, spaces or invisible characters: .* and "
    ):
        taxonomy.read(SPELLINGS[what], "t.csv", FRUIT)


def test_name_in_two_spellings_is_refused_in_json() -> None:
    for tree in (
        {"Apple": ["Fuji"], "apple": ["Gala"], "B": ["Banana", "Carrot"]},
        {"levels": ["kind", "Kind ", "label"], "tree": {"A": {"B": FRUIT}}},
    ):
        with pytest.raises(ModelError, match="differ only in case"):
            taxonomy.read(json.dumps(tree).encode(), "t.json", FRUIT)
    with pytest.raises(ModelError, match="'Apple' occurs twice"):
        taxonomy.read(b'{"Apple": ["Fuji"], "Apple ": ["Gala"]}', "t.json", FRUIT)


def test_names_are_normalised() -> None:
    known = taxonomy.read(b"label,kind\nCaf\xc3\xa9,Drink\nTea,Drink\n", "t.csv", ["Caf\u00e9", "Tea"])
    odd = " label, kind \nCafe\u0301 , Drink\nTea,Drink \n"
    assert taxonomy.read(odd.encode(), "t.csv", ["Caf\u00e9", "Tea"]) == known
    tree = {"levels": [" kind", "label"], "tree": {"Drink ": ["Cafe\u0301", " Tea"]}}
    assert taxonomy.read(json.dumps(tree).encode(), "t.json", ["Caf\u00e9", "Tea"]) == known
    with pytest.raises(ModelError, match="'Caf\u00e9' is in two places"):
        taxonomy.read("label,kind\nCafe\u0301,A\nCaf\u00e9,A\n".encode(), "t.csv", ["Caf\u00e9"])


def test_labels_of_a_model_may_differ_only_in_case() -> None:
    found = taxonomy.read(b"label,kind\nCardigan,dog\ncardigan,cloth\n", "t.csv", ["Cardigan", "cardigan"])
    assert found.path(0) == ["dog", "Cardigan"]


def test_parent_is_never_less_likely_than_its_child() -> None:
    tree, generator = builtin.imagenet_taxonomy(), np.random.default_rng(0)
    for sharpness in (0.003, 0.03, 1):
        probabilities = generator.dirichlet(np.full(1000, sharpness), 300).astype(np.float32)
        levels = tree.roll_up(probabilities)
        for depth, (coarse, fine) in enumerate(pairwise(levels)):
            parent = dict(zip(tree.levels[depth + 1].node_of, tree.levels[depth].node_of, strict=True))
            assert (coarse[:, list(parent.values())] >= fine[:, list(parent)]).all()
        assert np.allclose(levels[0].sum(1), 1, atol=1e-5)


class Mean(torch.nn.Module):
    """The logits are the mean of each channel, and of the red one with the others."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        mean = pixels.mean((2, 3))
        return torch.cat([mean, mean[:, :1] * 0.9], 1)


def model(labels: list[str], tree: bytes) -> Model:
    """Return a model of four classes with a taxonomy."""
    preprocess = Preprocess(height=8, width=8, resize=(8,), mean=(0.0,) * 3, std=(0.1,) * 3)
    known = taxonomy.read(tree, "t.csv", labels)
    return Model(name="mean", digest="0", labels=tuple(labels), preprocess=preprocess, network=Mean, taxonomy=known)


def test_network_computes_the_sums_of_the_tree() -> None:
    fruit = model(FRUIT, CSV)
    runtime = TorchRuntime(fruit, k=4, batch_size=4, device="cpu", dtype="float32")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 1, 1, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    found = runtime(pixels)
    every = np.zeros((7, 4), np.float32)
    np.put_along_axis(every, found.ids, found.scores, 1)
    expected = fruit.taxonomy.roll_up(every)  # type: ignore[union-attr]
    assert found.above is not None
    assert found.above.ids.tolist() == np.stack([level.argmax(1) for level in expected[:2]], 1).tolist()
    assert np.allclose(found.above.scores, np.stack([level.max(1) for level in expected[:2]], 1), atol=1e-6)
    assert len(np.unique(found.above.ids[:, 1])) > 1, "the pictures tell nothing"
    assert runtime(pixels[:0]).ids.shape == (0, 4)


@pytest.mark.parametrize(
    ("min_score", "expected"),
    [
        (0.0, ("Gala", "label", 0.4)),
        (0.4, ("Gala", "label", 0.4)),
        (0.5, ("Apple", "kind", 0.7)),
        (0.7, ("Apple", "kind", 0.7)),
        (0.9, ("Fruit", "department", 0.9)),
        (0.91, (None, None, None)),
    ],
)
def test_answer_is_the_finest_label_above_min_score(
    min_score: float, expected: tuple[str | None, str | None, float | None]
) -> None:
    above = Prediction(np.array([[0, 0]], np.int32), np.array([[0.9, 0.7]], np.float32))
    prediction = Prediction(np.array([[0, 1]], np.int32), np.array([[0.4, 0.3]], np.float32), above=above)
    columns = answer_columns(prediction, model(FRUIT, CSV), min_score)
    found = [columns[name][0].as_py() for name in ("answer", "answer_level", "answer_score")]
    assert found == [*expected[:2], pytest.approx(expected[2])]
    assert [tuple(level.values())[:2] for level in columns["levels"][0].as_py()] == [
        ("department", "Fruit"), ("kind", "Apple"), ("label", "Gala"),
    ]  # fmt: skip


def test_taxonomy_of_a_directory_is_part_of_the_fingerprint(tiny_model: Path, tmp_path: Path) -> None:
    directory, stores = shutil.copytree(tiny_model, tmp_path / "tiny"), Stores(StorageConfig(), {})
    plain = loading.load(ModelConfig(name=str(directory)), stores)
    assert plain.taxonomy is None and plain.fingerprint()["taxonomy"] is None
    (directory / "taxonomy.csv").write_text("label,kind\n" + "".join(f"{label},x\n" for label in "abcdefg"))
    known = loading.load(ModelConfig(name=str(directory)), stores)
    assert known.taxonomy is not None and known.taxonomy.path(0) == ["x", "a"]
    assert known.fingerprint() == {**plain.fingerprint(), "taxonomy": known.taxonomy.digest}
    (directory / "taxonomy.csv").rename(directory / "taxonomy.json")
    with pytest.raises(ModelError, match=r"taxonomy\.json is not a tree"):
        loading.load(ModelConfig(name=str(directory)), stores)


def test_levels_of_imagenet_classes() -> None:
    tree, labels = builtin.imagenet_taxonomy(), imagenet.imagenet_labels()
    paths = {label: tree.path(number) for number, label in enumerate(labels)}
    assert [level.name for level in tree.levels] == ["domain", "group", "kind", "label"]
    assert paths["tabby"] == ["animal", "mammal", "cat", "tabby"]
    assert paths["golden retriever"][:3] == ["animal", "mammal", "dog"]
    assert paths["crane (bird)"][1] == "bird" and paths["crane (machine)"][0] == "object"
    assert paths["Granny Smith"] == ["food", "fruit", "apple", "Granny Smith"]
    assert paths["convertible"][:3] == ["vehicle", "land vehicle", "car"]
    assert sum(path[2] == "dog" for path in paths.values()) == 118
    assert sum(path[0] == "animal" for path in paths.values()) == 398, "as in WordNet"


def test_shipped_taxonomy_has_all_classes_in_order() -> None:
    path = Path(builtin.__file__).with_name("imagenet_taxonomy.csv")
    rows = list(csv.reader(path.read_text().splitlines()))[1:]
    assert [row[0] for row in rows] == list(imagenet.imagenet_labels())
    assert "WordNet 3.0 Copyright" in path.with_name("imagenet_taxonomy.LICENSE.txt").read_text()

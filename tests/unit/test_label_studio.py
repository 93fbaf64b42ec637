"""Label Studio: tasks and labelling config that it accepts, and its export as a labelled list."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from imgbatch.errors import InputError, ModelError
from imgbatch.labelling.label_studio import MAX_CHOICES, Classes, image_url, task_of
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.taxonomy import read as read_taxonomy
from imgbatch.sources.label_studio import row_of
from tests.unit.test_labelled_inputs import labels, listed, make

MANY = [f"class {number}" for number in range(MAX_CHOICES + 1)]
Task = dict[str, Any]


def model(names: list[str], tree: str | None = None) -> Model:
    taxonomy = read_taxonomy(tree.encode(), "tree.csv", names) if tree is not None else None
    preprocess = Preprocess(height=8, width=8, resize=(8,))
    return Model(
        name="net", digest="0" * 64, labels=tuple(names), preprocess=preprocess, taxonomy=taxonomy, network=lambda: None
    )


def problems(config: str, task: Task) -> list[str]:
    """Return what Label Studio's SDK (`LabelInterface.validate_prediction`, 2.1.2) would find wrong with a task.

    The SDK takes 500 MB, so its checks are repeated here: variables of the config are in `data`; each result names a control,
    the object that it belongs to, and its type; and has choices of the config, for a taxonomy complete paths of it.
    """
    found = []
    view = ET.fromstring(config)
    objects = {node.get("name"): node for node in view if node.tag == "Image"}
    controls = {node.get("name"): node for node in view if node.get("toName")}
    for node in objects.values():
        if str(node.get("value")).removeprefix("$") not in task["data"]:
            found.append(f"data lacks {node.get('value')}")
    for prediction in task.get("predictions", []):
        if not isinstance(prediction.get("score"), float | None) or not isinstance(prediction["result"], list):
            found.append("the prediction has another form")
        for result in prediction["result"]:
            control = controls.get(result["from_name"])
            if control is None or control.get("toName") != result["to_name"] or result["to_name"] not in objects:
                found.append(f"no control {result['from_name']} of {result['to_name']}")
                continue
            if control.tag.lower() != result["type"] or result["type"] not in result["value"]:
                found.append(f"{result['type']} is not the type of {control.tag}")
                continue
            for choice in result["value"][result["type"]]:
                path, node = choice if isinstance(choice, list) else [choice], control
                for name in path:
                    node = next((child for child in node if child.get("value") == name), None)  # type: ignore[assignment]
                    if node is None:
                        found.append(f"{choice} is no choice")
                        break
                if node is not None and len(node):
                    found.append(f"{choice} is no leaf")
    return found


ROW = {"uri": "s3://b/a.jpg", "label": None, "predicted": "cat", "score": 0.41, "model": "net@01", "run_id": "r"}


@pytest.mark.parametrize(
    ("names", "tree", "kind", "value"),
    [
        (["cat", "dog"], None, "choices", ["cat"]),
        (["cat", "dog"], "label,kind\ncat,pet\ndog,pet\n", "choices", ["cat"]),
        (["cat", *MANY], None, "taxonomy", [["cat"]]),
        (
            ["cat", *MANY],
            "label,kind\ncat,pet\n" + "".join(f"{name},thing\n" for name in MANY),
            "taxonomy",
            [["pet", "cat"]],
        ),
    ],
)
def test_tasks_and_config_fit_together(names: list[str], tree: str | None, kind: str, value: list[Any]) -> None:
    classes = Classes.of(model(names, tree))
    task, config = task_of(ROW, classes), classes.config()
    assert not problems(config, task)
    assert task["predictions"][0]["result"][0]["value"] == {kind: value}
    assert task["data"] == {"image": "s3://b/a.jpg", **{name: ROW[name] for name in ROW if name != "label"}}
    leaves = [node.get("value") for node in ET.fromstring(config).iter("Choice") if not len(node)]
    assert leaves == names, "every class can be chosen"
    other = task_of({**ROW, "predicted": "no class of the model"}, classes)
    assert "predictions" not in other, "Label Studio would refuse it"
    assert problems(config, {**task, "data": {}}) and problems(config.replace('"cat"', '"cot"'), task)


def test_names_are_escaped_and_characters_that_xml_lacks_are_refused() -> None:
    names = ["<script>alert('&')</script>", 'a "quoted" class', "عربي"]
    config = Classes.of(model(names)).config()
    assert [node.get("value") for node in ET.fromstring(config).iter("Choice")] == names
    with pytest.raises(ModelError, match="XML cannot hold"):
        Classes.of(model(["a\x01b", "c"])).config()


@pytest.mark.parametrize("uri", ["s3://b/x.tar#a/1.jpg", "/data/X.TGZ#1.jpg", "s3://b/t.parquet#12", "hdfs://b/1.jpg"])
def test_images_that_it_cannot_open_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match="export a manifest"):
        image_url(uri)


@pytest.mark.parametrize(
    ("uri", "url"),
    [
        ("s3://b/a#1.jpg", "s3://b/a#1.jpg"),
        ("gs://b/ü.jpg", "gs://b/ü.jpg"),
        ("abfss://c@account.dfs.core.windows.net/a.jpg", "azure-blob://c/a.jpg"),
        ("https://host/a.jpg", "https://host/a.jpg"),
        ("/data/ü&.jpg", "/data/local-files/?d=data/%C3%BC%26.jpg"),
    ],
)
def test_urls_of_images(uri: str, url: str) -> None:
    assert image_url(uri) == url


def annotation(*names: str, kind: str = "choices", control: str = "label", **more: Any) -> Task:
    """Return an annotation as Label Studio exports it."""
    chosen = [["pet", name] for name in names] if kind == "taxonomy" else list(names)
    result = {"id": "x", "type": kind, "value": {kind: chosen}, "from_name": control, "to_name": "image"}
    return {"id": 1, "completed_by": 1, "result": [result] if names else [], "was_cancelled": False, **more}


def task(uri: str, *annotations: Task, **data: Any) -> Task:
    """Return a task as Label Studio exports it: with the ids of predictions only."""
    return {"id": 7, "annotations": list(annotations), "data": {"uri": uri, **data}, "predictions": [3], "meta": {}}


CAT, DOG, BLURRY = annotation("cat"), annotation("dog"), annotation("blurry", control="quality")


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ([CAT], {"label": "cat"}),
        ([annotation("cat", kind="taxonomy")], {"label": "cat"}),
        ([CAT, CAT], {"label": "cat"}),
        ([annotation("dog", was_cancelled=True), CAT], {"label": "cat"}),
        ([CAT, annotation("dog", ground_truth=True)], {"label": "dog"}),
        ([annotation("dog", ground_truth=True, was_cancelled=True), CAT], {"label": "cat"}),
        ([annotation()], {}),
        ([], {}),
        ([annotation("cat", was_cancelled=True)], {}),
        ([{"result": [*CAT["result"], *BLURRY["result"]]}], {"label": "cat", "quality": "blurry"}),
        ([{"result": [{"type": "textarea", "from_name": "note", "value": {"text": ["x"]}}]}], {}),
    ],
)  # fmt: skip
def test_the_label_is_what_people_agree_on(annotations: list[Task], expected: dict[str, str]) -> None:
    assert row_of(task("1.jpg", *annotations, label="of the import", predicted="x")) == {
        "uri": "1.jpg", "predicted": "x", **expected,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([CAT, DOG], r"entry 1 \(task 7\): two annotations disagree on 'label': 'cat' and 'dog'"),
        ([annotation("dog", ground_truth=True), annotation("cat", ground_truth=True)], "disagree"),
        ([annotation("cat", "dog")], "2 classes for 'label', such as 'cat' and 'dog'"),
        ([{"result": [*CAT["result"], *DOG["result"]]}], "2 classes for 'label'"),
        ([annotation(None)], "the choice null, which is neither text nor a path"),  # type: ignore[arg-type]
        ([annotation([])], r"the choice \[\]"),  # type: ignore[arg-type]
    ],
)
def test_labels_that_are_not_one_are_refused(tmp_path: Path, annotations: list[Task], message: str) -> None:
    export = tmp_path / "export.json"
    export.write_text(json.dumps([task("1.jpg", *annotations)]))
    with pytest.raises(InputError, match=message):
        labels(export)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_export_is_a_labelled_list_without_the_tasks_that_nobody_labelled(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    tasks = [
        task("4.jpg", split="val"),
        task("1.jpg", CAT, split="train"),
        task("2.jpg", annotation("dog", was_cancelled=True), split="train"),
        task("3.jpg", DOG, split="val"),
    ]
    export = tmp_path / f"export{suffix}"
    export.write_text(json.dumps(tasks) if suffix == ".json" else "\n".join(map(json.dumps, tasks)))
    assert labels(export) == {"1.jpg": "cat", "3.jpg": "dog"}
    assert "2 tasks without a label omitted" in caplog.text
    assert labels(export, split="val") == {"3.jpg": "dog"}
    table, lines = listed(export)
    assert f"{export}: labels from column 'label', splits from" in "\n".join(lines)
    assert set(table["input_split"].to_pylist()) <= {None, "train", "val"}


def test_a_correction_in_an_export_replaces_the_folder_and_a_skipped_task_does_not(tmp_path: Path) -> None:
    make(tmp_path / "in", "cat/1.jpg", "cat/2.jpg")
    export = tmp_path / "export.json"
    export.write_text(
        json.dumps([task("in/cat/1.jpg", DOG), task("in/cat/2.jpg", annotation("dog", was_cancelled=True))])
    )
    assert labels(tmp_path / "in", export) == {"1.jpg": "dog", "2.jpg": "cat"}


@pytest.mark.parametrize(
    ("tasks", "config", "message"),
    [
        ([task("1.jpg"), task("2.jpg", annotation())], {}, "no task has an annotation by the control 'label'.*Label images"),
        ([task("1.jpg", annotation("cat", control="kind"))], {}, "by the control 'label'; its columns are: kind"),
        ([{"data": {"uri": "1.jpg"}, "predictions": [{"result": CAT["result"]}]}], {}, "no task has an annotation"),
        ([task("1.jpg", CAT), task("1.jpg", DOG)], {}, "1.jpg"),
        ([{"data": {"image": "s3://b/1.jpg"}, "annotations": [CAT]}], {}, "source.uri_column=image"),
    ],
)  # fmt: skip
def test_exports_without_labels_are_refused(
    tmp_path: Path, tasks: list[Task], config: dict[str, Any], message: str
) -> None:
    export = tmp_path / "export.json"
    export.write_text(json.dumps(tasks))
    with pytest.raises(InputError, match=re.compile(message, re.S)):
        labels(export, **config)


def test_another_control_is_chosen_by_an_option(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "1.jpg", "2.jpg")
    export = tmp_path / "export.json"
    tasks = [
        task("2.jpg", kind="of the import"),
        task("1.jpg", annotation("cat", control="kind"), kind="of the import"),
    ]
    export.write_text(json.dumps(tasks))
    assert labels(export, label_column="kind") == {"1.jpg": "cat"}
    assert "1 task without a label omitted" in caplog.text


@pytest.mark.parametrize(
    "odd", [None, 3, "x", [None], ["x"], [{}], [{"result": "x"}], [{"result": [None, "x", {"type": "choices"}]}]]
)
def test_annotations_of_another_form_are_no_labels(odd: Any) -> None:
    assert row_of({"data": {"uri": "1.jpg"}, "annotations": odd, "predictions": []}) == {"uri": "1.jpg"}

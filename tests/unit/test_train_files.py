"""Shards that are made once, and the model directory that appears as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.config import StorageConfig
from imgbatch.errors import OutputError
from imgbatch.storage import Folder, Stores
from imgbatch.train import prepared, publish
from imgbatch.train.page import page
from imgbatch.train.prepared import ROWS


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(Stores(StorageConfig()), str(tmp_path / "out"))


def shard(folder: Folder, numbers: list[int], value: int) -> None:
    rows = pa.Table.from_pylist([{"index": number, "uri": f"image {number}"} for number in numbers], schema=ROWS)
    prepared.write(folder, np.full((len(numbers), 2, 2), value, np.uint8) + np.array(numbers)[:, None, None], rows)


def keys(*numbers: int) -> np.ndarray:
    return prepared.keys_of(pa.array([f"image {number}" for number in numbers]))


def test_arrays_come_in_the_order_asked_for_from_whatever_shards_hold_them(folder: Folder) -> None:
    shard(folder, [5, 1, 3], 10)
    shard(folder, [0, 2], 20)
    found = prepared.load(folder, keys(1, 2, 5), np.empty)
    assert found[:, 0, 0].tolist() == [11, 22, 15]


def test_a_shard_whose_writer_was_killed_does_not_count(folder: Folder) -> None:
    shard(folder, [0, 1], 0)
    shard(folder, [2, 3], 0)
    folder.delete("000000002-0-2.parquet")
    assert [each.rows["index"].to_pylist() for each in prepared.shards(folder)] == [[0, 1]]
    with pytest.raises(KeyError, match="1 of 2 images are in no shard"):
        prepared.load(folder, keys(0, 2), np.empty)


def test_the_config_comes_last_and_the_run_goes(folder: Folder) -> None:
    folder.put(f"{publish.RUN}/runs/x/run.json", b"{}")
    publish.require_room(folder)  # what a killed training left is gone on from
    order = []
    real = Folder.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "put", lambda self, name, data: (order.append(name), real(self, name, data)))
        publish.publish(folder, {publish.CONFIG: b"{}", "model.safetensors": b"w", "metrics.json": b"{}"})
    assert order == ["model.safetensors", "metrics.json"]
    assert folder.names() == [publish.CONFIG, "metrics.json", "model.safetensors"]


def test_a_place_with_a_model_or_with_other_things_is_refused(folder: Folder) -> None:
    folder.put("notes.txt", b"")
    with pytest.raises(OutputError, match="is not empty, notes"):
        publish.require_room(folder)
    folder.put(publish.CONFIG, b"{}")
    with pytest.raises(OutputError, match="holds a model already"):
        publish.require_room(folder)
    with pytest.raises(OutputError, match="another run has written"):
        publish.publish(folder, {publish.CONFIG: b"{}"})


def test_the_page_stands_alone_and_escapes_what_labels_hold() -> None:
    labels = ["<b>Gala</b>", "Lime & $x$"]
    facts = {
        "way": "head", "base": {"name": "tiny"}, "images": 4, "temperature": 1.5, "curve": [{"l2": 0.1, "held_out_loss": 1.0,
        "held_out_accuracy": 0.5}], "data": {"rejected": 0, "classes": dict.fromkeys(labels, 2)},
        "config": {"train": {"refit": True}},
        "metrics": {"n": 4, "top1": 0.5, "top1_interval": [0.1, 0.9], "top5": 1.0, "ece": 0.1,
                    "ece_before_temperature": 0.2, "levels": {}},
    }  # fmt: skip
    text = page(facts, labels, np.array([0, 1, 0, 1]), np.array([[1.0, 0], [1.0, 0], [2.0, 0], [0, 1.0]]), 1.5)
    assert "<b>Gala" not in text and "&lt;b&gt;Gala&lt;/b&gt;" in text
    assert text.count("<svg") == 4 and "<script" not in text and "http://www.w3.org" in text
    assert json.dumps(labels[1])[1:-1] not in text and "Lime &amp; $x$" in text

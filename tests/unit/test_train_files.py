"""Shards of prepared images, and the model directory, which is published in one step."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.config.sections import Config, StorageConfig
from imgbatch.config.training import Training
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import ClusterError, OutputError
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.storage.stores import Folder, Stores
from imgbatch.training import cache, cache_build, publish, strategies
from imgbatch.training.cache import ROWS
from tests.browser import pages


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(Stores(StorageConfig()), str(tmp_path / "out"))


def shard(folder: Folder, numbers: list[int], value: int, **columns: Any) -> None:
    rows = pa.Table.from_pylist(
        [{"index": number, "uri": f"image {number}", **columns} for number in numbers], schema=ROWS
    )
    cache.write(folder, np.full((len(numbers), 2, 2), value, np.uint8) + np.array(numbers)[:, None, None], rows)


def keys(*numbers: int) -> np.ndarray:
    uris = [f"image {number}" for number in numbers]
    return cache.keys_of(pa.table({"uri": uris, "offset": pa.nulls(len(uris), pa.int64())}))


def test_arrays_are_returned_in_the_order_of_the_keys(folder: Folder) -> None:
    shard(folder, [5, 1, 3], 10)
    shard(folder, [0, 2], 20)
    arrays = cache.load(folder, keys(1, 2, 5), np.empty)
    assert arrays[:, 0, 0].tolist() == [11, 22, 15]


def test_an_incomplete_shard_does_not_count(folder: Folder) -> None:
    shard(folder, [0, 1], 0)
    shard(folder, [2, 3], 0)
    (second,) = {name for name in folder.names() if name.startswith("000000002") and name.endswith(".parquet")}
    folder.delete(second)
    assert [shard_read.rows["index"].to_pylist() for shard_read in cache.shards(folder)] == [[0, 1]]
    with pytest.raises(ClusterError, match="1 of 2 images are in no shard"):
        cache.load(folder, keys(0, 2), np.empty)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("damage", ["zeroed", "truncated", "empty", "other"])
def test_a_damaged_shard_is_not_used_and_built_again(folder: Folder, suffix: str, damage: str) -> None:
    shard(folder, [0, 1], 0)
    shard(folder, [2, 3], 0)
    names = sorted(name for name in folder.names() if name.endswith(suffix))
    content = folder.read(names[1])
    third = len(content) // 3
    bad = {
        "zeroed": content[: -2 * third] + bytes(third) + content[-third:],
        "truncated": content[:third],
        "empty": b"",
        "other": folder.read(names[0]),
    }
    folder.put(names[1], bad[damage])
    assert cache.load(folder, keys(0, 1), np.empty)[:, 0, 0].tolist() == [0, 1], "the other shards can be used"
    with pytest.raises(ClusterError, match="run the same command again"):
        cache.load(folder, keys(1, 2), np.empty)
    assert [shard_read.rows["index"].to_pylist() for shard_read in cache.shards(folder)] == [[0, 1]]
    shard(folder, [2, 3], 0)
    assert cache.load(folder, keys(1, 2), np.empty)[:, 0, 0].tolist() == [1, 2]


def ready(folder: Folder, uris: list[str], tars: tuple[int, ...] = ()) -> tuple[list[bool], cache_build.Prepared]:
    """Return a mask of the entries of a listing that are done, and the prepared images."""
    work, n = cast(Any, SimpleNamespace(shards=folder, config=WorkerConfig.of(Config()))), len(uris)
    work_plan = WorkPlan(np.ones(n, bool), np.zeros((0, 2), np.int64), dict.fromkeys(tars, cast(Any, None)))
    listed = pa.table({"uri": uris, "container": ["tar" if number in tars else None for number in range(n)]})
    is_done = cache_build._finished(work, work_plan)
    return is_done.tolist(), cache_build._collect(
        work, listed, work_plan.pending, work_plan.restricted(np.zeros(n, bool))
    )


def test_images_with_transient_rejects_are_retried(folder: Folder) -> None:
    shard(folder, [0, 3], 10)
    shard(folder, [1], 0, stage="fetch", reason="unreachable")
    shard(folder, [2], 0, stage="decode", reason="corrupt")
    is_done, prepared = ready(folder, [f"image {number}" for number in range(4)])
    assert is_done == [True, False, True, True] and prepared.read.tolist() == [True, False, False, True]
    shard(folder, [1], 20)
    is_done, prepared = ready(folder, [f"image {number}" for number in range(4)])
    assert is_done == [True, True, True, True] and prepared.rejects["uri"].to_pylist() == ["image 2"]
    assert cache.load(folder, keys(0, 1), np.empty)[:, 0, 0].tolist() == [10, 21]
    with pytest.raises(ClusterError, match="1 of 2 images"):
        cache.load(folder, keys(1, 2), np.empty)


def test_a_tar_that_could_not_be_read_is_a_reject_and_no_image(folder: Folder) -> None:
    rows = [
        {"index": 0, "offset": 0, "uri": "a.tar#1.jpg"},
        {"index": 0, "offset": 1, "uri": "a.tar", "reason": "truncated"},
    ]
    cache.write(folder, np.zeros((2, 2, 2), np.uint8), pa.Table.from_pylist(rows, schema=ROWS))
    is_done, prepared = ready(folder, ["a.tar", "image 1"], tars=(0,))
    assert is_done == [False, False]
    assert prepared.images["uri"].to_pylist() == ["a.tar#1.jpg"] and prepared.rejects["uri"].to_pylist() == ["a.tar"]
    folder.put(f"{0:09d}{cache.READ}", b"")
    assert ready(folder, ["a.tar", "image 1"], tars=(0,))[0] == [True, False]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_tar_with_a_damaged_shard_is_read_again(folder: Folder, suffix: str) -> None:
    rows = [{"index": 0, "offset": offset, "uri": f"a.tar#{offset}.jpg"} for offset in (0, 512)]
    for row in rows:
        cache.write(folder, np.zeros((1, 2, 2), np.uint8), pa.Table.from_pylist([row], schema=ROWS))
    folder.put(f"{0:09d}{cache.READ}", b"")
    is_done, prepared = ready(folder, ["a.tar"], tars=(0,))
    assert is_done == [True] and len(prepared.images) == 2
    damaged = next(name for name in sorted(folder.names()) if name.endswith(suffix))
    folder.put(damaged, b"")
    if suffix == ".npy":
        with pytest.raises(ClusterError, match="run the same command again"):
            cache.load(folder, prepared.keys, np.empty)
    assert ready(folder, ["a.tar"], tars=(0,))[0] == [False]


def test_damaged_sidecars_are_not_used(folder: Folder) -> None:
    work = SimpleNamespace(
        listing=folder, stores=folder.stores, config=WorkerConfig.of(Config()), shards=folder, features=None
    )
    keep = cache.Prepare(cast(Any, work)).sidecar_sink(0)
    keep({"1": {"input_cls": "cat"}})
    folder.put(f"{0:09d}{cache.READ}", b"")
    images = pa.Table.from_pylist([{"index": 0, "offset": 0, "uri": "a.tar#1.jpg"}], schema=ROWS)
    table = cache.with_late_sidecars(images, pa.array(["a.tar"]), folder, WorkerConfig.of(Config()).source)
    assert table[cache.TRUTH].to_pylist() == ["cat"]
    (name,) = (name for name in folder.names() if name.endswith(cache.SIDECARS))
    folder.put(name, folder.read(name).replace(b"cat", b"cow"))
    with pytest.raises(ClusterError, match="run the same command again"):
        cache.with_late_sidecars(images, pa.array(["a.tar"]), folder, WorkerConfig.of(Config()).source)
    assert not [name for name in folder.names() if name.endswith((cache.READ, cache.SIDECARS))]


def test_a_second_member_of_a_name_is_a_reject_and_the_first_keeps_its_pixels(folder: Folder) -> None:
    first, second = (
        {"index": 0, "offset": offset, "uri": "a.tar#1.jpg", "input_label": name}
        for offset, name in ((512, "cat"), (2048, "dog"))
    )
    cache.write(folder, np.full((1, 2, 2), 9, np.uint8), pa.Table.from_pylist([second], schema=ROWS))
    cache.write(folder, np.full((2, 2, 2), 5, np.uint8), pa.Table.from_pylist([first, first], schema=ROWS))
    _, prepared = ready(folder, ["a.tar"], tars=(0,))
    assert prepared.images["uri"].to_pylist() == ["a.tar#1.jpg", "a.tar#1.jpg@2048"] and prepared.read.tolist() == [
        True,
        False,
    ]
    assert prepared.images["input_label"].to_pylist() == ["cat", "dog"]
    assert prepared.rejects.select(["uri", "stage", "reason"]).to_pylist() == [
        {"uri": "a.tar#1.jpg@2048", "stage": "list", "reason": "duplicate"}
    ]
    assert cache.load(folder, prepared.keys[prepared.read], np.empty)[:, 0, 0].tolist() == [5]


def test_shards_without_the_hashes_of_images_are_built_again_under_another_name(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess = Preprocess(height=8, width=8, resize=(8,))
    base, nothing = Model(name="m", digest="0", labels=("a",), preprocess=preprocess, network=list), cast(Any, None)
    task = strategies.Task(Training(), folder.stores, base, folder, nothing, "listing", nothing, folder, nothing)
    now = task.images(preprocess).shards.uri
    assert task.images(preprocess).shards.uri == now and task.images(preprocess).config.content_hash
    at = cache.ROWS.get_field_index("content_hash")
    monkeypatch.setattr(cache, "ROWS", cache.ROWS.remove(at))  # as 0.1 wrote them
    assert task.images(preprocess).shards.uri != now


def test_carried_columns_need_not_be_strings(folder: Folder) -> None:
    rows = [{"index": 0, "uri": "image 0", "input_label": "7", "input_group": "1"}]
    cache.write(folder, np.zeros((1, 2, 2), np.uint8), pa.Table.from_pylist(rows, schema=ROWS))
    work = cast(Any, SimpleNamespace(shards=folder, config=WorkerConfig.of(Config())))
    listed = pa.table({"uri": ["image 0", "image 1"], "container": pa.nulls(2, pa.string()),
                       "input_label": pa.array([7, 8]), "input_group": pa.array([1, 2], pa.int8())})  # fmt: skip
    work_plan = WorkPlan(np.array([False, True]), np.zeros((0, 2), np.int64), {})
    prepared = cache_build._collect(work, listed, np.ones(2, bool), work_plan)
    assert prepared.images["input_label"].to_pylist() == ["7", "8"] and prepared.rejects["reason"].to_pylist() == [
        "crashed"
    ]


def test_a_tar_that_was_read_to_its_end_by_a_retry_has_no_reject(folder: Folder) -> None:
    away = {"index": 0, "offset": 1, "uri": "a.tar", "stage": "fetch", "reason": "unreachable"}
    for rows in (
        [{"index": 0, "offset": 0, "uri": "a.tar#1.jpg"}, away],
        [{"index": 0, "offset": 512, "uri": "a.tar#2.jpg"}],
    ):
        cache.write(folder, np.zeros((len(rows), 2, 2), np.uint8), pa.Table.from_pylist(rows, schema=ROWS))
    assert ready(folder, ["a.tar"], tars=(0,))[1].rejects["uri"].to_pylist() == ["a.tar"]
    folder.put(f"{0:09d}{cache.READ}", b"")
    is_done, prepared = ready(folder, ["a.tar"], tars=(0,))
    assert is_done == [True] and not len(prepared.rejects) and len(prepared.images) == 2


def test_a_model_that_another_run_has_written_is_not_changed(folder: Folder) -> None:
    files = {publish.CONFIG: b"{}", "model.safetensors": b"theirs"}
    publish.publish(folder, files)
    with pytest.raises(OutputError, match="another run has written a model"):
        publish.publish(folder, {publish.CONFIG: b"[]", "model.safetensors": b"ours", "metrics.json": b"{}"})
    assert {name: folder.read(name) for name in folder.names()} == files


def test_files_of_a_run_that_was_killed_while_it_wrote_the_model_are_removed(folder: Folder) -> None:
    for name in ("model.safetensors", "taxonomy.json", "rejects.parquet", f"{publish.RUN}/x"):
        folder.put(name, b"old")
    publish.require_room(folder)
    publish.publish(folder, {publish.CONFIG: b"{}", "model.safetensors": b"new", "taxonomy.csv": b"tree"})
    assert folder.names() == [publish.CONFIG, "model.safetensors", "taxonomy.csv"]
    assert folder.read("model.safetensors") == b"new"


def test_a_run_that_was_killed_after_its_model_is_finished_only_by_the_same_command(folder: Folder) -> None:
    folder.put(f"{publish.RUN}/runs/x/run.json", b"{}")
    assert not publish.finished(folder, {"lr": 1}, {})
    folder.put(publish.CONFIG, b"{}")
    folder.put("training.json", b'{"config": {"lr": 1, "input": ["a"]}}')
    assert not publish.finished(folder, {"lr": 2, "input": ("a",)}, {})
    assert not publish.finished(folder, {"lr": 1, "input": ("a",), "new": 2}, {"new": 1})
    assert publish.finished(folder, {"lr": 1, "input": ("a",), "new": 1}, {"new": 1}), "an option that 0.1 did not have"
    assert folder.names() == [publish.CONFIG, "training.json"] and not publish.finished(
        folder, {"lr": 1, "input": ("a",)}, {}
    )


def test_the_config_is_written_last_and_the_folder_of_the_run_removed(folder: Folder) -> None:
    folder.put(f"{publish.RUN}/runs/x/run.json", b"{}")
    publish.require_room(folder)  # what a killed training left is gone on from
    order = []
    real = Folder.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "create", lambda self, name, data: (order.append(name), real(self, name, data)))
        publish.publish(folder, {publish.CONFIG: b"{}", "model.safetensors": b"w", "metrics.json": b"{}"})
    assert order == ["model.safetensors", "metrics.json", publish.CONFIG]
    assert folder.names() == [publish.CONFIG, "metrics.json", "model.safetensors"]


def test_an_output_with_a_model_or_other_objects_is_refused(folder: Folder) -> None:
    folder.put("notes.txt", b"")
    with pytest.raises(OutputError, match="is not empty, it contains notes"):
        publish.require_room(folder)
    folder.put(publish.CONFIG, b"{}")
    with pytest.raises(OutputError, match="holds a model already"):
        publish.require_room(folder)
    with pytest.raises(OutputError, match="another run has written"):
        publish.publish(folder, {publish.CONFIG: b"{}"})


def test_the_page_has_no_links_and_escapes_labels() -> None:
    text = pages.training(["<b>Gala</b>", "Lime & $x$"], 40)
    assert "<b>Gala" not in text and "&lt;b&gt;Gala&lt;/b&gt;" in text
    assert pages.SCRIPT not in text and "Lime &amp; $x$" in text
    assert not re.findall(r"""(?:href|src)=["'](?!#|data:)""", text)

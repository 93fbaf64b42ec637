"""verify --sample: labels that the model does not give now are found, and what cannot be compared is counted."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import ClassifyConfig, ClusterConfig, Config, StorageConfig
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.part_file import Footer
from imgbatch.storage.stores import Folder, Stores
from imgbatch.verification.relabel import Reservoir
from imgbatch.verification.sample import original_config, other_format, with_recorded_format
from tests.conftest import ROOT, Job, write_model
from tests.unit.offline import classify_here
from tests.unit.pictures import encode, scene

ANSWER = ("label", "label_id", "score", "top_k", "levels", "answer", "answer_level", "answer_score")
EXACT = ("--set", "classify.dtype=float32")
KILLER = b"this picture kills its decoder"
KILLS = f"""
import os, signal
import imgbatch.decode as module
decode = module.decode
def fatal(data, **options):
    if data.endswith({KILLER!r}):
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(data, **options)
module.decode = fatal
"""
Rows = list[dict[str, Any]]


def fill(folder: Path) -> None:
    """Write twelve loose images, a tar of eight, a Parquet file of eight, and a file that is no image."""
    folder.mkdir()
    pictures = [encode(scene(seed=number), "JPEG") for number in range(28)]
    pictures[5] += KILLER  # of decoders that have learnt to die of it
    for number, picture in enumerate(pictures[:12]):
        (folder / f"{number:02d}.jpg").write_bytes(picture)
    with tarfile.open(folder / "t.tar", "w") as tar:
        for number, picture in enumerate(pictures[12:20], 12):
            info = tarfile.TarInfo(f"a/{number}.jpg")
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
    pq.write_table(pa.table({"image": pictures[20:]}), folder / "x.parquet", row_group_size=3)
    (folder / "bad.jpg").write_bytes(b"no image")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with `images` and their labels in `out`, and in `other` those of another model."""
    place = tmp_path_factory.mktemp("finished")
    fill(place / "images")
    other = write_model(place / "other-model", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, model in (("out", tiny_model), ("other", other)):
            arguments = ("--input", place / "images", "--output", place / name, "--model", model, *EXACT)
            assert classify_here(patch, *arguments) == 0
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, in the very place, to be tampered with; times of files are kept."""
    shutil.copytree(finished, tmp_path / "was")
    yield finished
    shutil.rmtree(finished)
    shutil.copytree(tmp_path / "was", finished)


def part_of(place: Path, output: str = "out") -> Path:
    """Return the part that holds the loose images."""
    return max((place / output / "labels").iterdir(), key=lambda path: pq.read_metadata(path).num_rows)


def edit(path: Path, change: Callable[[Rows], Rows]) -> None:
    """Write a part again with other rows, its footer as it was."""
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path)


def swap(rows: Rows) -> Rows:
    """Swap the whole answers of the first row and the first one of another label."""
    at = next(at for at, row in enumerate(rows) if row["label"] != rows[0]["label"])
    for name in ANSWER:
        rows[0][name], rows[at][name] = rows[at][name], rows[0][name]
    return rows


def test_images_of_all_kinds_of_inputs_are_found_and_labelled_again(job: Job, place: Path) -> None:
    before = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    ended = job("verify", place / "out", "--sample", 100)
    assert ended.code == 0, ended.err
    assert "28 of 28 labels drawn" in ended.out and "28 compared, none wrong: these are all labels" in ended.out
    ended = job("verify", place / "out", "--sample", 12, "--seed", 3)
    assert ended.code == 0, ended.err
    assert "12 of 28 labels drawn (--seed 3), 12 compared, none wrong: if more than 22.09% of the labels" in ended.out
    assert {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()} == before


def test_swapped_labels_are_found(job: Job, place: Path) -> None:
    edit(part_of(place), swap)
    assert job("verify", place / "out").code == 0, "its files are in order"
    ended = job("verify", place / "out", "--sample", 100)
    assert ended.code == 6
    assert (
        "28 compared, 2 differ from" in ended.err
        and "95 % probability" in ended.err
        and str(part_of(place)) in ended.err
    )
    assert ended.err.count(" in the table, ") == 2 and "Traceback" not in ended.err
    assert f"{pq.read_table(part_of(place))['uri'][0].as_py()}: label " in ended.err


def test_an_edited_label_is_found(job: Job, place: Path) -> None:
    def change(rows: Rows) -> Rows:
        other = next(row for row in rows if row["label"] != rows[3]["label"])
        told = {"label": other["label"], "label_id": other["label_id"]}
        rows[3] |= {**told, "answer": told["label"]}
        rows[3]["top_k"][0] |= told
        return rows

    edit(part_of(place), change)
    ended = job("verify", place / "out", "--sample", 100)
    assert ended.code == 6 and "1 differ from" in ended.err and "in the table" in ended.err


def test_a_part_that_a_broken_model_made_is_found(job: Job, place: Path) -> None:
    theirs = {row["uri"]: row for row in pq.read_table(part_of(place, "other")).to_pylist()}
    edit(part_of(place), lambda rows: [row | {name: theirs[row["uri"]][name] for name in ANSWER} for row in rows])
    ended = job("verify", place / "out", "--sample", 6, "--seed", 0)
    assert ended.code == 6 and " differ from " in ended.err and "… and" not in ended.err.partition("They are in")[2]


def test_a_label_of_what_cannot_be_decoded_is_found(job: Job, place: Path) -> None:
    """As when two rows, of an image and of a reject, have swapped their URIs."""
    bad = place / "images" / "bad.jpg"
    status = bad.stat()
    (reject,) = [path for path in (place / "out" / "rejects").iterdir() if pq.read_metadata(path).num_rows]
    good = pq.read_table(part_of(place))["uri"][0].as_py()
    last_modified = pq.read_table(reject)["last_modified"][0].as_py()
    told = {"uri": str(bad), "size": status.st_size, "last_modified": last_modified}
    edit(part_of(place), lambda rows: [rows[0] | told, *rows[1:]])
    edit(reject, lambda rows: [rows[0] | {"uri": good}])
    assert job("verify", place / "out").code == 0, "each image is in one row"
    ended = job("verify", place / "out", "--sample", 100)
    assert ended.code == 6 and "bad.jpg: has a label, but is not_an_image" in ended.err


def test_changed_and_vanished_images_are_skipped_and_counted(job: Job, place: Path) -> None:
    images = place / "images"
    (images / "00.jpg").write_bytes(encode(scene(seed=50), "JPEG"))
    (images / "01.jpg").unlink()
    os.utime(images / "t.tar", (1, 1))
    ended = job("verify", place / "out", "--sample", 100)
    assert ended.code == 0, ended.err
    assert "18 compared, 10 skipped (9 changed, 1 vanished), none wrong" in ended.out
    os.utime(images / "x.parquet", (1, 1))
    for number in range(2, 12):
        (images / f"{number:02d}.jpg").unlink()
    ended = job("verify", place / "out", "--sample", 100)
    assert ended.code == 2 and "0 compared, 28 skipped" in ended.err and "could not be checked" in ended.err


def test_the_model_of_the_output_may_have_moved(job: Job, place: Path, tmp_path: Path) -> None:
    (record,) = (place / "out").glob("runs/*/run.json")
    said = json.loads(record.read_text())
    was = said["model"]["name"]
    said["model"]["name"] = said["config"]["model"]["name"] = str(tmp_path / "gone")
    record.write_text(json.dumps(said))
    ended = job("verify", place / "out", "--sample", 3)
    assert ended.code == 2 and "--model" in ended.err and "gone" in ended.err
    ended = job("verify", place / "out", "--sample", 3, "--model", place / "other-model")
    assert ended.code == 2 and "is not the model that wrote the labels" in ended.err and "weights: " in ended.err
    ended = job("verify", place / "out", "--sample", 3, "--model", was)
    assert ended.code == 0, ended.err


def test_an_image_that_ends_the_process_is_skipped_and_its_neighbours_are_compared(
    job: Job, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLS)
    ended = job("verify", place / "out", "--sample", 100, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert ended.code == 0, ended.err
    assert (
        "27 compared, 1 skipped (1 crashed), none wrong" in ended.out
        and "each decoded in a process of its own" in ended.err
    )


@pytest.mark.parametrize(
    "flags",
    [("--model", "x"), ("--seed", "1"), ("--sample", "0"), ("--sample", "-3"), ("--sample", "3", "--seed", "-1")],
)
def test_invalid_flags_are_refused(job: Job, tmp_path: Path, flags: tuple[str, ...]) -> None:
    ended = job("verify", tmp_path, *flags)
    assert ended.code == 2 and flags[-2] in ended.err and "_SUCCESS" not in ended.err


def test_rows_that_another_machine_computed_in_16_bits_are_right(job: Job, place: Path, tiny_model: Path) -> None:
    """Their record says that a GPU made them; here the images are labelled in 32 bits, and doubtful ones once more in 16."""
    output = place / "half"
    inputs = ("--input", place / "images", "--output", output, "--model", tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        half = ("--set", "classify.dtype=bfloat16", "--set", "classify.runtime=torch")
        assert classify_here(patch, *inputs, *half) == 0
    (record,) = output.glob("runs/*/run.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"device": "cuda"}))
    ended = job("verify", output, "--sample", 100)
    assert ended.code == 0, ended.err
    edit(max(output.glob("labels/*"), key=lambda path: pq.read_metadata(path).num_rows), swap)
    ended = job("verify", output, "--sample", 100)
    assert ended.code == 6 and "2 differ from" in ended.err, ended.err


def reservoir(sizes: list[int], size: int, seed: int, folder: Folder) -> list[str]:
    drawn = Reservoir(size, seed)
    number = 0
    for count in sizes:
        sink = io.BytesIO()
        uris = [str(each) for each in range(number, number + count)]
        pq.write_table(pa.table({"uri": uris, "label": uris}), sink)
        drawn.add_part(Log(folder), 1, pq.ParquetFile(sink), Footer("run", {}))
        number += count
    rows = drawn.rows()
    assert drawn.row_count == number and rows["label"].to_pylist() == rows["uri"].to_pylist()
    found: list[str] = rows["uri"].to_pylist()
    assert len(set(found)) == len(found) == min(size, number)
    return found


def test_each_row_is_drawn_with_the_same_probability(tmp_path: Path) -> None:
    folder = Folder(Stores(StorageConfig(), {}), str(tmp_path / "out" / "labels"))
    sizes, draws = [1, 7, 3, 20, 9], 400
    times = np.zeros(40)
    for seed in range(draws):
        times[np.array(reservoir(sizes, 5, seed, folder), int)] += 1
    # 400 draws of 5 of 40: 50 each, with a standard deviation of 6.6
    assert times.sum() == 5 * draws and times.min() > 20 and times.max() < 80
    assert reservoir(sizes, 5, 3, folder) == reservoir(sizes, 5, 3, folder)
    assert sorted(map(int, reservoir(sizes, 100, 0, folder))) == list(range(40))


def test_the_sample_uses_the_recorded_number_format_if_a_cpu_computed_its_rows() -> None:
    ov = {"device": "cpu", "dtype": "bfloat16", "runtime": "openvino 2026.4.1"}
    exact = {"device": "cpu", "dtype": "float32", "runtime": "torch 2.14.1+cu130"}
    gpu = {"device": "cuda", "dtype": "float16", "runtime": "torch 2.14.1+cu130"}
    chosen = Config(cluster=ClusterConfig(device="cpu"))
    for records, dtype, runtime, equal in (
        ([ov], "bfloat16", "openvino", False), ([exact], "float32", "torch", True), ([ov, exact], "float32", "torch", False),
        ([gpu], "float32", "auto", False), ([{}], "float32", "auto", False), ([exact, {}], "float32", "torch", False),
    ):  # fmt: skip
        found, is_exact = with_recorded_format(chosen, records)
        assert (found.classify.dtype, found.classify.runtime, is_exact) == (dtype, runtime, equal)
        assert other_format(found.classify) == ClassifyConfig(dtype="bfloat16", runtime="torch")
    asked = replace(chosen, classify=ClassifyConfig(dtype="bfloat16", runtime="torch"))
    assert with_recorded_format(asked, [exact]) == (asked, False)
    assert other_format(asked.classify).dtype == "float32"


def test_the_config_of_the_output_is_restored() -> None:
    model = {"name": "ignored", "weights": None, "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3], "of_the_future": 1}
    record = {"model": {"name": "s3://m/x"}, "config": {"model": model, "decode": {"max_pixels": 1 << 30}, "fetch": {}}}
    fingerprint = {"top_k": 1, "answer.min_score": 0.7, "source.image_column": "photo"}
    found = original_config(Config(), None, fingerprint, record)
    assert (found.model.name, found.model.crop_pct, found.model.mean) == ("s3://m/x", 0.9, (0.1, 0.2, 0.3))
    assert (found.top_k, found.answer.min_score, found.source.image_column) == (2, 0.7, "photo")
    assert found.decode.max_pixels == 1 << 30 and found.fetch == Config().fetch
    assert original_config(Config(), "./moved", fingerprint, record).model.name == "./moved"
    assert original_config(Config(), "./moved", {}, {}).top_k == 5

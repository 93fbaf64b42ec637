"""Carried columns, end to end: files with different columns, a manifest next to a folder, a corrected manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Job
from tests.integration import tables
from tests.unit.pictures import encode, scene


@pytest.fixture
def without_ray(tmp_path: Path) -> dict[str, str]:
    """An environment in which imports of Ray and torch fail."""
    poison = tmp_path / "poison"
    poison.mkdir()
    for name in ("ray", "torch"):
        (poison / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    return {"PYTHONPATH": str(poison)}


def carried(output: Path) -> dict[str, dict[str, Any]]:
    """Return the carried columns of labels/, by the image's base name."""
    return {
        row["uri"].rpartition("/")[2]: {name: row[name] for name in row if name.startswith("input_")}
        for row in tables.rows(output)
    }


def test_a_corrected_manifest_reaches_the_rows_without_a_get_and_without_inference(
    warm: Job, job: Job, folder: Path, tiny_model: Path, tmp_path: Path, without_ray: dict[str, str]
) -> None:
    (folder / "02.jpg").write_text("no image")
    names = [f"{number:02d}.jpg" for number in range(12)]
    rows = [f"images/{name},espresso,S{name[:2]},9.99" for name in names]
    manifest, output = tmp_path / "list.csv", tmp_path / "out"
    manifest.write_text("\n".join(["uri,label,sku,price", *rows]))
    command = ("classify", "--input", manifest, "--output", output, "--model", tiny_model)
    first = warm(*command)
    assert first.code == 0, first.err
    labels, before = tables.labels(output), tables.parts(output)
    rows[0] = "images/00.jpg,tiger cat,S00,9.99"
    rows[1:3] = [row.replace("9.99", "4.99") for row in rows[1:3]]
    manifest.write_text("\n".join(["uri,label,sku,price,new", *(f"{row},1" for row in rows)]))
    for name in names:  # who reads an image now finds none
        (folder / name).unlink()

    promised = job(*command, "--dry-run", env=without_ray)
    assert "would classify 0 of 12 images" in promised.out
    assert "12 already done" in promised.out and "3 of these to get other carried values" in promised.out
    assert tables.parts(output) == before
    ended = job(*command, env=without_ray)

    assert ended.code == 0, ended.err
    assert "12 images listed, 11 labelled, 1 rejected (12 already done, 3 of them updated" in ended.out
    assert "12 of the images already done have neither size nor ETag in the input" in ended.err
    counts = tables.success(output)["counts"]
    assert (counts["already_done"], counts["updated"], counts["labelled"]) == (12, 3, 11)
    assert tables.runs(output)[-1]["counts"] == counts and "images_per_second" not in tables.runs(output)[-1]
    result = carried(output)
    assert result["00.jpg"] == {"input_label": "tiger cat", "input_sku": "S00", "input_price": "9.99"}
    assert result["01.jpg"] == {"input_label": "espresso", "input_sku": "S01", "input_price": "4.99"}
    assert result["03.jpg"] == {"input_label": "espresso", "input_sku": "S03", "input_price": "9.99"}
    (reject,) = tables.rows(output, "rejects")
    assert (reject["input_price"], reject["reason"]) == ("4.99", "not_an_image")
    assert tables.labels(output) == labels
    assert job("verify", output).code == 0
    after = tables.parts(output)
    assert "0 of them" not in (again := job(*command, env=without_ray)).out and again.code == 0
    assert "updated" not in again.out and tables.parts(output) == after


def test_a_folder_of_parquet_files_whose_columns_differ(warm: Job, tiny_model: Path, tmp_path: Path) -> None:
    images = [{"bytes": encode(scene(seed=number), "JPEG"), "path": f"{number}.jpg"} for number in range(4)]
    (tmp_path / "in").mkdir()
    files = [
        {"image": images[:2], "note": pa.nulls(2), "price": pa.array([1, 2]), "code": pa.array([7, 8])},
        {
            "image": images[2:], "note": pa.array(["x", None]), "price": pa.array([2.5, 3]), "code": pa.array(["a", "b"]),
            "label": pa.array(["cat", "dog"]),
        },
    ]  # fmt: skip
    for number, columns in enumerate(files):
        pq.write_table(pa.table(columns), tmp_path / "in" / f"{number}.parquet")
    output = tmp_path / "out"

    ended = warm("classify", "--input", tmp_path / "in", "--output", output, "--model", tiny_model)

    assert ended.code == 0, ended.err
    assert f"column 'code' is int64 in {tmp_path}/in/0.parquet and string in {tmp_path}/in/1.parquet" in ended.err
    with duckdb.connect() as connection:
        result = connection.sql(
            "select input_note, input_price, input_code, input_label, typeof(input_price) "
            f"from '{output}/labels/*.parquet' order by uri"
        ).fetchall()
    assert result == [
        (None, 1.0, "7", None, "DOUBLE"), (None, 2.0, "8", None, "DOUBLE"), ("x", 2.5, "a", "cat", "DOUBLE"),
        (None, 3.0, "b", "dog", "DOUBLE"),
    ]  # fmt: skip


def test_lists_that_have_no_type_in_common_are_refused_by_column_and_file(
    warm: Job, tiny_model: Path, tmp_path: Path
) -> None:
    for name, values in (("a", [[1]]), ("b", ["one"])):
        (tmp_path / f"{name}.jpg").write_bytes(encode(scene(seed=1), "JPEG"))
        pq.write_table(pa.table({"uri": [f"{name}.jpg"], "tags": values}), tmp_path / f"{name}.parquet")
    inputs = ("--input", tmp_path / "a.parquet", "--input", tmp_path / "b.parquet")
    ended = warm("classify", *inputs, "--output", tmp_path / "out", "--model", tiny_model)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert (
        f"column 'tags' is list<element: int64> in {tmp_path}/a.parquet and string in {tmp_path}/b.parquet" in ended.err
    )


@pytest.mark.parametrize("folder_first", [True, False])
def test_a_manifest_gives_its_values_to_the_images_of_a_folder_in_either_order(
    warm: Job, job: Job, folder: Path, tiny_model: Path, tmp_path: Path, without_ray: dict[str, str], folder_first: bool
) -> None:
    manifest, output = tmp_path / "list.csv", tmp_path / "out"
    manifest.write_text("uri,label,price\n" + "".join(f"images/{number:02d}.jpg,cat,{number}\n" for number in range(5)))
    inputs = [("--input", folder), ("--input", manifest)][:: 1 if folder_first else -1]
    command = ("classify", *inputs[0], *inputs[1], "--output", output, "--model", tiny_model)
    ended = warm(*command)
    assert ended.code == 0, ended.err
    assert tables.success(output)["counts"]["duplicates"] == 5
    expected = {f"{number:02d}.jpg": {"input_label": "cat", "input_price": str(number)} for number in range(5)}
    none = {f"{number:02d}.jpg": {"input_label": None, "input_price": None} for number in range(5, 12)}
    assert carried(output) == expected | none
    assert all(row["size"] == (folder / Path(row["uri"]).name).stat().st_size for row in tables.rows(output))

    other = ("classify", *inputs[1], *inputs[0], "--output", output, "--model", tiny_model)
    again = job(*other, env=without_ray)
    assert again.code == 0 and "12 already done, 0 kept" in again.out and "neither size" not in again.err
    # The manifest says nothing of it, but the folder does: this image has changed.
    (folder / "03.jpg").write_bytes(encode(scene(seed=99), "PNG"))
    assert "would classify 1 of 12 images" in job(*other, "--dry-run", env=without_ray).out


def test_two_labels_of_an_image_are_refused(warm: Job, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    for name, label in (("a", "cat"), ("b", " cat "), ("c", "dog")):
        (tmp_path / f"{name}.csv").write_text(f"uri,label\nimages/00.jpg,{label}\n")

    def classified(*names: str) -> Any:
        inputs = [part for name in names for part in ("--input", tmp_path / f"{name}.csv")]
        return warm("classify", *inputs, "--output", tmp_path / "out", "--model", tiny_model, "--dry-run")

    assert classified("a", "b").code == 0
    refused = classified("a", "c")
    assert refused.code == 2
    assert f"{folder}/00.jpg is listed more than once, with two values of 'label': 'cat' and 'dog'" in refused.err

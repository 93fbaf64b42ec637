"""jobs/verify.py: what it counts, and which tampering it sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Job
from tests.integration import tables
from tests.unit.pictures import encode, scene


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, warm: Job) -> Path:
    """A finished output of eleven labels and one reject."""
    place = tmp_path_factory.mktemp("finished")
    (place / "images").mkdir()
    for number in range(11):
        (place / "images" / f"{number:02d}.jpg").write_bytes(encode(scene(seed=number), "JPEG"))
    (place / "images" / "bad.jpg").write_bytes(b"")
    ended = warm("classify", "--input", place / "images", "--output", place / "out", "--model", tiny_model)
    assert ended.code == 0, ended.err
    return place / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be tampered with."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def edit(path: Path, change: object) -> None:
    """Write a part again with other rows, its footer as it was."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)  # type: ignore[operator]


def first_part(output: Path) -> Path:
    """Return the part that holds the labels."""
    return next(path for path in sorted(output.glob("labels/*")) if pq.read_metadata(path).num_rows)


def test_a_whole_output_balances(job: Job, output: Path) -> None:
    ended = job("verify", output)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("12 images listed, 11 labelled, 1 rejected, 0 kept; 12 rows, no image twice")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert job("verify", f"{output}/").code == 0
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before, "verify writes nothing"


def test_a_lost_row_is_seen(job: Job, output: Path) -> None:
    edit(first_part(output), lambda table: table.slice(1))
    ended = job("verify", output)
    assert ended.code == 6
    assert "in no row: " in ended.err and "00.jpg" in ended.err and "Traceback" not in ended.err


def test_a_doubled_row_is_seen(job: Job, output: Path) -> None:
    edit(first_part(output), lambda table: pa.concat_tables([table, table.slice(2, 1)]))
    ended = job("verify", output)
    assert ended.code == 6
    assert "in two rows: " in ended.err and "02.jpg" in ended.err


def test_a_copied_part_is_seen(job: Job, output: Path) -> None:
    shutil.copy(first_part(output), output / "labels" / "part-00000077.parquet")
    assert job("verify", output).code == 6


def test_a_row_in_both_tables_is_seen(job: Job, output: Path) -> None:
    uri = tables.rows(output)[3]["uri"]
    reject = next(path for path in sorted(output.glob("rejects/*")) if pq.read_metadata(path).num_rows)
    edit(reject, lambda table: table.set_column(0, table.schema.field("uri"), pa.array([uri])))
    ended = job("verify", output)
    assert ended.code == 6
    assert f"in two rows: {uri}" in ended.err and "in no row: " in ended.err


def test_a_row_put_for_another_is_seen(job: Job, output: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        uris = ["/somewhere/else.jpg", *table["uri"].to_pylist()[1:]]
        return table.set_column(0, table.schema.field("uri"), pa.array(uris))

    edit(first_part(output), change)
    ended = job("verify", output)
    assert ended.code == 6 and "in no row: " in ended.err


@pytest.mark.parametrize("name", ["listed", "labelled", "rejected", "kept"])
def test_an_edited_sum_is_seen(job: Job, output: Path, name: str) -> None:
    said = tables.success(output)
    said["counts"][name] += 1
    (output / "_SUCCESS").write_text(json.dumps(said))
    ended = job("verify", output)
    assert ended.code == 6
    assert f"{name}: " in ended.err and "disagrees" in ended.err


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"run_id": 3}', '{"run_id": "x", "counts": 1}'])
def test_a_damaged_success_is_no_success(job: Job, output: Path, content: str) -> None:
    (output / "_SUCCESS").write_text(content)
    ended = job("verify", output)
    assert ended.code == 6, ended.err
    assert "_SUCCESS" in ended.err and "Traceback" not in ended.err


def test_a_lost_listing_is_seen(job: Job, output: Path) -> None:
    shutil.rmtree(output / "runs" / tables.success(output)["run_id"] / "listing")
    assert job("verify", output).code == 6


def test_what_is_no_output_is_the_users_fault(job: Job, tmp_path: Path, output: Path) -> None:
    ended = job("verify", tmp_path / "nothing")
    assert ended.code == 2 and "no _SUCCESS" in ended.err
    shutil.copy(tmp_path / "out" / "_SUCCESS", output / "labels" / "note.txt")
    ended = job("verify", output)
    assert ended.code == 5 and "note.txt" in ended.err


def test_a_run_that_finds_two_rows_of_an_image_takes_the_old_success_away(
    job: Job, output: Path, finished: Path, tiny_model: Path
) -> None:
    edit(first_part(output), lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    ended = job("classify", "--input", finished.parent / "images", "--output", output, "--model", tiny_model)
    assert ended.code == 6 and "two rows" in ended.err and "Traceback" not in ended.err
    assert not (output / "_SUCCESS").exists()

"""jobs/verify.py: what it counts, and which tampering it sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, Ended, Job
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


def test_the_counts_of_a_correct_output_reconcile(job: Job, output: Path) -> None:
    ended = job("verify", output)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("12 images listed, 11 labelled, 1 rejected, 0 kept; 12 rows, no image twice")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert job("verify", f"{output}/").code == 0
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before, "verify writes nothing"


def test_a_lost_row_is_found(job: Job, output: Path) -> None:
    edit(first_part(output), lambda table: table.slice(1))
    ended = job("verify", output)
    assert ended.code == 6
    assert "in no row: " in ended.err and "00.jpg" in ended.err and "Traceback" not in ended.err


def test_a_duplicated_row_is_found(job: Job, output: Path) -> None:
    edit(first_part(output), lambda table: pa.concat_tables([table, table.slice(2, 1)]))
    ended = job("verify", output)
    assert ended.code == 6
    assert "in two rows: " in ended.err and "02.jpg" in ended.err


def test_a_copied_part_is_found(job: Job, output: Path) -> None:
    shutil.copy(first_part(output), output / "labels" / "part-00000077.parquet")
    assert job("verify", output).code == 6


def test_a_row_in_both_tables_is_found(job: Job, output: Path) -> None:
    uri = tables.rows(output)[3]["uri"]
    reject = next(path for path in sorted(output.glob("rejects/*")) if pq.read_metadata(path).num_rows)
    edit(reject, lambda table: table.set_column(0, table.schema.field("uri"), pa.array([uri])))
    ended = job("verify", output)
    assert ended.code == 6
    assert f"in two rows: {uri}" in ended.err and "in no row: " in ended.err


def test_a_row_in_place_of_another_is_found(job: Job, output: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        uris = ["/somewhere/else.jpg", *table["uri"].to_pylist()[1:]]
        return table.set_column(0, table.schema.field("uri"), pa.array(uris))

    edit(first_part(output), change)
    ended = job("verify", output)
    assert ended.code == 6 and "in no row: " in ended.err


@pytest.mark.parametrize("name", ["listed", "labelled", "rejected", "kept"])
def test_an_edited_count_is_found(job: Job, output: Path, name: str) -> None:
    said = tables.success(output)
    said["counts"][name] += 1
    (output / "_SUCCESS").write_text(json.dumps(said))
    ended = job("verify", output)
    assert ended.code == 6
    assert f"{name}: " in ended.err and "disagrees" in ended.err


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"run_id": 3}', '{"run_id": "x", "counts": 1}'])
def test_a_damaged_success_file_is_an_error(job: Job, output: Path, content: str) -> None:
    (output / "_SUCCESS").write_text(content)
    ended = job("verify", output)
    assert ended.code == 6, ended.err
    assert "_SUCCESS" in ended.err and "Traceback" not in ended.err


def test_a_lost_listing_is_found(job: Job, output: Path) -> None:
    shutil.rmtree(output / "runs" / tables.success(output)["run_id"] / "listing")
    assert job("verify", output).code == 6


def test_a_place_that_is_no_output_is_a_usage_error(job: Job, tmp_path: Path, output: Path) -> None:
    ended = job("verify", tmp_path / "nothing")
    assert ended.code == 2 and "no _SUCCESS" in ended.err
    shutil.copy(tmp_path / "out" / "_SUCCESS", output / "labels" / "note.txt")
    ended = job("verify", output)
    assert ended.code == 5 and "note.txt" in ended.err


def test_a_run_that_finds_two_rows_of_an_image_removes_the_old_success(
    job: Job, output: Path, finished: Path, tiny_model: Path
) -> None:
    edit(first_part(output), lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    ended = job("classify", "--input", finished.parent / "images", "--output", output, "--model", tiny_model)
    assert ended.code == 6 and "two rows" in ended.err and "Traceback" not in ended.err
    assert not (output / "_SUCCESS").exists()


def again(job: Job, output: Path, finished: Path, tiny_model: Path) -> Ended:
    """Give the command of the output again."""
    return job("classify", "--input", finished.parent / "images", "--output", output, "--model", tiny_model)


@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_a_missing_seal_is_found_and_written_by_the_same_command(
    job: Job, output: Path, finished: Path, tiny_model: Path, table: str
) -> None:
    max((output / table).iterdir()).unlink()
    ended = job("verify", output)
    assert (
        ended.code == 6 and f"{output / table} is not sealed" in ended.err and "same classify.py command" in ended.err
    )
    ended = again(job, output, finished, tiny_model)
    assert ended.code == 0 and "12 already done" in ended.out, ended.err
    assert job("verify", output).code == 0


@pytest.mark.parametrize("name", ["_copy.parquet", "part-00000001 (1).parquet"])
def test_a_foreign_file_is_found_and_the_output_is_correct_without_it(job: Job, output: Path, name: str) -> None:
    shutil.copy(first_part(output), output / "labels" / name)
    assert len(tables.rows(output)) == 22, "a reader of *.parquet has each row twice"
    ended = job("verify", output)
    assert ended.code == 5 and f"{output / 'labels' / name}: not written by imgbatch" in ended.err
    (output / "labels" / name).unlink()
    assert job("verify", output).code == 0


def test_a_part_of_another_fingerprint_is_refused_by_both_and_written_again_once_it_is_moved_away(
    warm: Job, output: Path, finished: Path, tiny_model: Path
) -> None:
    part = first_part(output)
    table = pq.read_table(part)
    fingerprint = json.loads(table.schema.metadata[b"fingerprint"]) | {"weights": "0" * 64}
    pq.write_table(
        table.replace_schema_metadata({**table.schema.metadata, b"fingerprint": json.dumps(fingerprint)}), part
    )
    ended = warm("verify", output)
    assert (
        ended.code == 5
        and f"{part}: 1 of the parts have another fingerprint" in ended.err
        and "weights: 0000" in ended.err
    )
    assert again(warm, output, finished, tiny_model).code == 5, "the same in both"
    part.unlink()
    ended = again(warm, output, finished, tiny_model)
    assert ended.code == 0, ended.err
    assert warm("verify", output).code == 0 and len(tables.rows(output)) == 11


def test_labels_that_are_all_null_are_found_and_written_again_once_their_part_is_moved_away(
    warm: Job, output: Path, finished: Path, tiny_model: Path
) -> None:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(1, table.schema.field("label"), pa.nulls(len(table), pa.string()))

    part = first_part(output)
    edit(part, change)
    ended = warm("verify", output)
    assert ended.code == 6 and f"11 rows without a value of label, in {part}; move" in ended.err
    part.unlink()
    assert again(warm, output, finished, tiny_model).code == 0
    assert warm("verify", output).code == 0 and None not in tables.labels(output).values()


def test_a_sample_of_a_real_run_is_labelled_again(job: Job, output: Path) -> None:
    ended = job("verify", output, "--sample", 300)
    assert ended.code == 0 and "11 of 11 labels drawn" in ended.out and "11 compared, none wrong" in ended.out, (
        ended.err
    )

    def swap(table: pa.Table) -> pa.Table:
        labels = table["label"].to_pylist()
        other = next(at for at, label in enumerate(labels) if label != labels[0])
        order = [other, *range(1, other), 0, *range(other + 1, len(table))]
        columns = [name for name in table.column_names if name not in ("uri", "size", "etag", "last_modified")]
        for name in columns:
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), table[name].take(pa.array(order)))
        return table

    edit(first_part(output), swap)
    assert job("verify", output).code == 0
    ended = job("verify", output, "--sample", 300)
    assert ended.code == 6 and "2 differ from" in ended.err and " in the table, " in ended.err


def test_an_output_of_version_0_1_passes(job: Job) -> None:
    ended = job("verify", ROOT / "tests" / "data" / "v0.1.0" / "output")
    assert ended.code == 0 and "23 images listed, 22 labelled, 1 rejected" in ended.out, ended.err

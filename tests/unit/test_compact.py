"""`compact`: a merged copy of the tables, and when it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.errors import AuditError, InputError, OutputChangedError, OutputError, UsageError
from imgbatch.ledger import compact as module
from imgbatch.ledger.compact import compact
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.part_reader import common_columns, parquet_files, read_each
from imgbatch.storage.stores import Folder
from tests.conftest import S3Server
from tests.unit.outputs import FINGERPRINT, RUN, STORES, Row, label, reject, write


def commits(parts: int, rows: int) -> list[list[Row]]:
    return [[label(f"s3://p/{part:03d}/{row:03d}.jpg") for row in range(rows)] for part in range(parts)]


def tables(folder: Path, table: str) -> list[Path]:
    return sorted((folder / table).glob("*.parquet"))


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_the_copy_has_the_same_rows_in_few_files(tmp_path: Path, s3: S3Server, where: str) -> None:
    place = Folder(STORES, str(tmp_path / "out"))
    copy = Folder(STORES, str(tmp_path / "copy"))
    if where == "s3":
        place = Folder(s3.stores(), f"s3://out/compact/{tmp_path.name}/out")
        copy = Folder(s3.stores(), f"s3://out/compact/{tmp_path.name}/copy")
    write(place, *commits(30, 5), [reject("s3://p/bad.jpg")])
    before = {name: place.read(name) for name in place.names()}
    summary = compact(place.uri, copy.uri, place.stores)
    assert str(summary).startswith(f"150 labels and 1 reject of {place.uri} copied from 33 parts into 2 files")
    assert copy.names() == ["_SUCCESS", "labels/000001.parquet", "rejects/000001.parquet"]
    original = pa.concat_tables(
        pq.read_table(pa.BufferReader(before[name])).replace_schema_metadata(None)
        for name in sorted(before)
        if name.startswith("labels/")
    )
    file = pq.ParquetFile(pa.BufferReader(copy.read("labels/000001.parquet")))
    assert file.read().replace_schema_metadata(None).equals(original) and file.num_row_groups == 1
    metadata = file.metadata.metadata
    assert json.loads(metadata[b"fingerprint"]) == FINGERPRINT and metadata[b"compacted_from"].decode() == place.uri
    assert file.metadata.row_group(0).column(0).statistics.has_min_max
    assert json.loads(copy.read("_SUCCESS"))["run_id"] == RUN
    assert {name: place.read(name) for name in place.names()} == before, "the output stays as it is"


def test_row_groups_and_files_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write(tmp_path / "out", *commits(10, 7))
    monkeypatch.setattr(module, "GROUP_ROWS", 20)
    monkeypatch.setattr(module, "FILE_BYTES", 1)
    compact(output.uri, str(tmp_path / "copy"), STORES)
    files = [pq.read_metadata(path) for path in tables(tmp_path / "copy", "labels")]
    assert [(file.num_row_groups, file.num_rows) for file in files] == [(1, 20), (1, 20), (1, 20), (1, 10)]
    monkeypatch.setattr(module, "FILE_BYTES", 1 << 30)
    monkeypatch.setattr(module, "GROUP_BYTES", 2_000)
    compact(output.uri, str(tmp_path / "narrow"), STORES)
    (file,) = [pq.read_metadata(path) for path in tables(tmp_path / "narrow", "labels")]
    assert file.num_rows == 70 and 5 < file.num_row_groups <= 70


def test_columns_of_all_nights_are_in_all_files(tmp_path: Path) -> None:
    first = pa.field("input_a", pa.int64())
    write(tmp_path / "out", [label("s3://p/1.jpg", input_a=1)], carried=[first], success=False)
    second = [pa.field("input_a", pa.string()), pa.field("input_b", pa.string())]
    write(tmp_path / "out", [label("s3://p/2.jpg", input_a="x", input_b="y")], carried=second, success=False)
    (tmp_path / "out" / "_SUCCESS").write_text(json.dumps({"run_id": RUN, "counts": {"listed": 2, "kept": 0}}))
    compact(str(tmp_path / "out"), str(tmp_path / "copy"), STORES)
    with duckdb.connect() as connection:
        query = f"select input_a, input_b from '{tmp_path}/copy/labels/*.parquet' order by uri"
        assert connection.sql(query).fetchall() == [("1", None), ("x", "y")]


def test_a_table_without_rows_keeps_its_columns(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://p/1.jpg")])
    compact(output.uri, str(tmp_path / "copy"), STORES)
    (path,) = tables(tmp_path / "copy", "rejects")
    assert pq.read_metadata(path).num_rows == 0 and "reason" in pq.read_schema(path).names


def test_an_output_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://p/1.jpg")], success=False)
    with pytest.raises(InputError, match="has no _SUCCESS"):
        compact(output.uri, str(tmp_path / "copy"), STORES)


def test_a_folder_that_is_not_free_is_refused(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://p/1.jpg")])
    for to in (output.uri, output.at("copy"), output.at("labels")):
        with pytest.raises(UsageError, match="is in the output"):
            compact(output.uri, to, STORES)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").write_text("x")
    with pytest.raises(UsageError, match=r"is not empty, it has .*mine"):
        compact(output.uri, str(tmp_path / "copy"), STORES)


def test_rows_that_success_does_not_count_are_an_error(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://p/1.jpg"), label("s3://p/2.jpg")])
    success = json.loads(output.read("_SUCCESS"))
    for counts in ({"listed": 3, "kept": 0}, {}):
        output.put("_SUCCESS", json.dumps({**success, "counts": counts}).encode())
        with pytest.raises(AuditError, match=r"2 rows in .* but its _SUCCESS counts"):
            compact(output.uri, str(tmp_path / f"copy{len(counts)}"), STORES)
        assert not (tmp_path / f"copy{len(counts)}" / "_SUCCESS").exists()


def test_a_run_that_writes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write(tmp_path / "out", [label("s3://p/1.jpg")])

    def change_first(*arguments: object) -> None:
        output.delete("_SUCCESS")
        real(*arguments)  # type: ignore[arg-type]

    real = module._require_free
    monkeypatch.setattr(module, "_require_free", change_first)
    with pytest.raises(OutputChangedError, match="a run has changed"):
        compact(output.uri, str(tmp_path / "copy"), STORES)


def test_no_run_can_continue_a_copy(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://p/1.jpg")])
    compact(output.uri, str(tmp_path / "copy"), STORES)
    with pytest.raises(OutputError, match="was not written by imgbatch"):
        Ledger(Folder(STORES, str(tmp_path / "copy")), FINGERPRINT).open()


def test_a_part_of_another_fingerprint_is_refused(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://p/1.jpg")])
    other = write(tmp_path / "other", [label("s3://p/2.jpg")])
    part = pq.read_table(f"{other.uri}/labels/part-00000001.parquet")
    metadata = {**part.schema.metadata, b"fingerprint": b'{"weights": "1"}'}
    pq.write_table(part.replace_schema_metadata(metadata), f"{output.uri}/labels/part-00000003.parquet")
    with pytest.raises(OutputError, match="another fingerprint"):
        compact(output.uri, str(tmp_path / "copy"), STORES)


def test_columns_are_read_from_the_footers_alone(tmp_path: Path, s3: S3Server) -> None:
    folder = Folder(s3.stores(), f"s3://out/columns/{tmp_path.name}")
    write(folder, *commits(20, 3))
    before = s3.requests()
    columns, fingerprint = common_columns(folder.folder("labels"))
    assert fingerprint == FINGERPRINT and "top_k" in columns.schema.names
    assert (s3.requests() - before)["GET"] <= 22, "one request for each part"
    entries = parquet_files(folder.folder("labels"))
    rows = list(
        read_each(
            folder.folder("labels"), [*entries, ("gone.parquet", entries[0][1])], lambda _, file: len(file.read())
        )
    )
    assert rows == [3] * 20 + [0], "in order, and a file that is gone is omitted"

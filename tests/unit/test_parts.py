"""Parts as bytes, and the numbers of a log. Several writers are tested in test_ledger.py."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import Config, StorageConfig
from imgbatch.errors import Conflict, Exists, OutputError
from imgbatch.ledger import commit_log
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.fingerprint import DEFAULTS, require_same
from imgbatch.ledger.part_file import Footer, decode, encode
from imgbatch.schema import FORMAT_VERSION, LABELS, REJECTS, labels_with
from imgbatch.storage.stores import Folder, Stores

OURS = Footer("run", {"digest": "abc", "n": 1}, nonce="0123", seal=False)


@pytest.fixture
def log(tmp_path: Any) -> Log:
    return Log(Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path / "labels")))


def table(*uris: str) -> pa.Table:
    return pa.table({"uri": pa.array(uris, pa.string()), "n": pa.array(range(len(uris)), pa.int64())})


def keep_all(rows: pa.Table, theirs: pa.Table) -> pa.Table:
    return rows


@pytest.mark.parametrize("schema", [LABELS, REJECTS])
@pytest.mark.parametrize("footer", [OURS, Footer("r", {}, seal=True), Footer("ü", {"labels": ["ü", None, 0.5, {}]})])
def test_a_part_is_read_as_it_was_written(schema: pa.Schema, footer: Footer) -> None:
    rows, found = decode(encode(schema.empty_table(), footer.metadata()), "u")
    assert found == footer
    assert rows.schema.remove_metadata() == schema


@pytest.mark.parametrize("schema", [LABELS, REJECTS, labels_with((), features=4)])
def test_a_part_without_rows_has_no_row_group(schema: pa.Schema) -> None:
    """Some clients fail on a row group of 0 rows; see tests/clients."""
    written = pq.ParquetFile(pa.BufferReader(encode(schema.empty_table(), OURS.metadata())))
    assert written.num_row_groups == 0 and written.schema_arrow.remove_metadata() == schema
    assert pq.ParquetFile(pa.BufferReader(encode(table("a"), OURS.metadata()))).num_row_groups == 1


def test_a_part_that_loses_its_last_row_has_no_row_group(log: Log) -> None:
    log.append(table("a"), OURS, keep_all)
    assert log.rewrite(1, lambda rows: rows.slice(0, 0)) == 1
    written = pq.ParquetFile(pa.BufferReader(log.folder.read("part-00000001.parquet")))
    assert written.num_row_groups == 0 and written.schema_arrow.names == ["uri", "n"]


def test_an_empty_part_of_0_1_is_read_and_rewritten_without_its_row_group(log: Log) -> None:
    """As 0.1.0 wrote seals."""
    sink = pa.BufferOutputStream()
    pq.write_table(table().replace_schema_metadata(OURS.metadata()), sink)
    assert pq.ParquetFile(sink.getvalue()).num_row_groups == 1
    log.folder.create("part-00000001.parquet", sink.getvalue().to_pybytes())
    log.scan()
    log.append(table("a"), OURS, keep_all)
    untouched = log.folder.read("part-00000002.parquet")
    for _ in range(2):
        assert [rows["uri"].to_pylist() for _, rows, _ in log.read(["uri"])] == [[], ["a"]]
        log.drop_empty_groups()
        written = pq.ParquetFile(pa.BufferReader(log.folder.read("part-00000001.parquet")))
        assert written.num_row_groups == 0 and log.footer(1) == OURS
    assert log.folder.read("part-00000002.parquet") == untouched


def test_carried_columns_of_every_type_are_kept() -> None:
    carried = pa.table({
        "uri": ["a", "b"],
        "input_none": pa.nulls(2),
        "input_list": pa.array([[1], None], pa.list_(pa.int8())),
        "input_large_list": pa.array([["x"], []], pa.large_list(pa.string())),
        "input_fixed": pa.array([[1, 2], None], pa.list_(pa.float32(), 2)),
        "input_large": pa.array(["x", None], pa.large_string()),
        "input_time": pa.array([1, 2], pa.timestamp("ns", "Europe/Berlin")),
        "input_day": pa.array([1, 2], pa.date32()),
        "input_bool": [True, None],
        "input_a.b": ["dot", "ted"],
        "input_": [1, 2],
    })  # fmt: skip
    rows, _ = decode(encode(carried, OURS.metadata()), "u")
    assert rows.remove_column(1).to_pylist() == carried.remove_column(1).to_pylist()
    assert rows["input_none"].null_count == 2


def test_selected_columns_are_read() -> None:
    data = encode(table("a", "b"), OURS.metadata())
    assert decode(data, "u", ["n"])[0].to_pydict() == {"n": [0, 1]}
    assert decode(data, "u", [])[1] == OURS


@pytest.mark.parametrize("cut", [0, 1, 4, 8, 40])
def test_a_truncated_part_is_refused(cut: int) -> None:
    data = encode(table("a"), OURS.metadata())
    with pytest.raises(OutputError, match=r"s3://b/part.*not a complete Parquet file.*move it away"):
        decode(data[: len(data) - cut - 1], "s3://b/part")


def test_a_part_of_a_newer_version_is_refused() -> None:
    data = encode(table("a"), {"format_version": str(FORMAT_VERSION + 1), "new": "word"})
    with pytest.raises(OutputError, match="format version 2, this imgbatch supports 1: use a newer"):
        decode(data, "u")


@pytest.mark.parametrize("missing", sorted(OURS.metadata()))
def test_a_part_with_an_incomplete_footer_is_foreign(missing: str) -> None:
    metadata = OURS.metadata()
    del metadata[missing]
    with pytest.raises(OutputError, match="was not written by imgbatch"):
        decode(encode(table("a"), metadata), "u")


def test_numbers_are_consecutive(log: Log) -> None:
    assert log.next == 1
    assert [log.append(table(name), OURS, keep_all) for name in "abc"] == [1, 1, 1]
    again = Log(log.folder)
    again.scan()
    assert again.numbers == log.numbers == [1, 2, 3]
    assert [rows["uri"].to_pylist() for _, rows, _ in again.read(["uri"])] == [["a"], ["b"], ["c"]]
    assert log.uri(3).endswith("/labels/part-00000003.parquet")


def test_each_part_has_its_own_nonce(log: Log) -> None:
    for name in "ab":
        log.append(table(name), OURS, keep_all)
    first, second = (log.footer(number).nonce for number in log.numbers)
    assert first != second != OURS.nonce


def test_rows_of_another_writer_are_passed_on_before_the_next_number_is_tried(log: Log) -> None:
    other = Log(log.folder)
    for name in "ab":
        other.append(table(name), OURS, keep_all)
    seen: list[list[str]] = []

    def absorb(rows: pa.Table, theirs: pa.Table) -> pa.Table:
        seen.append(theirs["uri"].to_pylist())
        return rows.filter(pa.array([uri not in seen[-1] for uri in rows["uri"].to_pylist()]))

    assert log.append(table("x", "b"), OURS, absorb) == 1
    assert seen == [["a"], ["b"]]
    assert log.numbers == [1, 2, 3]
    assert pq.read_table(pa.BufferReader(log.folder.read("part-00000003.parquet")))["uri"].to_pylist() == ["x"]


def test_no_part_is_written_without_remaining_rows_but_a_seal_always_is(log: Log) -> None:
    Log(log.folder).append(table("a"), OURS, keep_all)
    assert log.append(table("a"), OURS, lambda rows, theirs: rows.slice(0, 0)) == 0
    log.scan()
    assert log.numbers == [1]
    late = Log(log.folder)
    assert late.append(table(), Footer("run", OURS.fingerprint, seal=True), keep_all) == 0
    assert late.numbers == [1, 2]
    assert late.footer(2).seal


def test_append_fails_if_all_numbers_are_taken(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_log, "_MAX_CONFLICTS", 3)
    other = Log(log.folder)
    for name in "abcd":
        other.append(table(name), OURS, keep_all)
    with pytest.raises(OutputError, match="3 numbers in a row"):
        log.append(table("x"), OURS, keep_all)


def test_append_fails_if_a_number_stays_blocked_without_a_part(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_log, "_VANISHED_WAIT_S", 0)

    def refuse(name: str, data: bytes) -> None:
        raise Exists(name)

    monkeypatch.setattr(Folder, "create", lambda self, name, data: refuse(name, data))
    with pytest.raises(Exception, match="part-00000001"):
        log.append(table("x"), OURS, keep_all)


def test_rewrite_removes_rows_and_returns_how_many(log: Log) -> None:
    log.append(table("a", "b", "c"), OURS, keep_all)
    before = log.folder.read("part-00000001.parquet")
    assert log.rewrite(1, lambda rows: rows) == 0
    assert log.folder.read("part-00000001.parquet") == before
    assert log.rewrite(1, lambda rows: rows.slice(1)) == 1
    rows, footer = decode(log.folder.read("part-00000001.parquet"), "u")
    assert rows["uri"].to_pylist() == ["b", "c"]
    assert footer.run_id == "run"
    assert log.rewrite(1, lambda rows: rows.slice(0, 0)) == 2
    log.scan()
    assert log.numbers == [1]


def test_a_part_with_restored_values_has_a_new_etag(log: Log) -> None:
    """Otherwise a pending rewrite of a dead run would be accepted: an ETag is a hash of the bytes."""
    log.append(table("a"), Footer("run", {}), keep_all)
    name = "part-00000001.parquet"
    before = log.folder.read(name)

    original = log.part(1)[0]
    corrected = original.append_column("input_x", pa.array(["new"]))
    for rows in (corrected, original):
        log.rewrite(1, lambda _, rows=rows: rows)
        assert log.part(1)[0].equals(rows)
    assert log.folder.read(name) != before


def test_rewrite_fails_if_the_part_keeps_changing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.append(table("a"), OURS, keep_all)
    monkeypatch.setattr(commit_log, "_MAX_CONFLICTS", 3)

    def replace(self: Folder, name: str, data: bytes, tag: str | None) -> None:
        raise Conflict(name)

    monkeypatch.setattr(Folder, "replace", replace)
    with pytest.raises(OutputError, match="keeps changing"):
        log.rewrite(1, lambda rows: rows.slice(1))


def test_a_scan_of_an_empty_output_finds_no_parts(log: Log) -> None:
    log.scan()
    assert log.numbers == []
    assert list(log.read(["uri"])) == []
    assert log.carried() == pa.schema([])


def test_carried_columns_are_those_of_the_last_part(log: Log) -> None:
    log.append(table("a"), OURS, keep_all)
    log.append(table("a").append_column("input_x", pa.array([1], pa.int16())), OURS, keep_all)
    assert log.carried() == pa.schema([("input_x", pa.int16())])


@pytest.mark.parametrize(
    "theirs, ours, named, unnamed",
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ["b: 2 there, 3 here"], ["a:"]),
        ({"a": 1}, {}, ["a: 1 there, default here"], []),
        ({}, {"a": [1]}, ["a: default there, [1] here"], []),
        ({"a": "x" * 500}, {"a": "y"}, ["xxx...", "y here"], ["x" * 100]),
    ],
)
def test_differing_keys_of_fingerprints_are_named(
    theirs: dict[str, Any], ours: dict[str, Any], named: list[str], unnamed: list[str]
) -> None:
    require_same(theirs, dict(theirs), "u")
    with pytest.raises(OutputError) as caught:
        require_same(theirs, ours, "s3://b/part")
    message = str(caught.value)
    assert all(text in message for text in ["s3://b/part", "--output", *named])
    assert not any(text in message for text in unnamed)


MODEL = {"weights": "w", "labels": "l", "preprocess": "p", "taxonomy": None}
ALL_KEYS = {**MODEL, "top_k": 5, "answer.min_score": 0.5, "output.embeddings": False, "output.columns": []}
"""As 0.1.0 wrote it, with all options at their defaults."""


@pytest.mark.parametrize("lacking", [["top_k"], ["answer.min_score", "taxonomy"], ["output.columns"], list(DEFAULTS)])
def test_a_key_at_its_default_may_be_absent_on_either_side(lacking: list[str]) -> None:
    fewer = {key: value for key, value in ALL_KEYS.items() if key not in lacking}
    require_same(ALL_KEYS, fewer, "u")
    require_same(fewer, ALL_KEYS, "u")
    require_same(ALL_KEYS, {**fewer, "an.option.of.later": None}, "u")


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({**MODEL}, {**ALL_KEYS, "top_k": 3}, "(top_k: default (5) there, 3 here)"),
        ({**ALL_KEYS, "top_k": 3}, {**MODEL}, "(top_k: 3 there, default (5) here)"),
        ({**ALL_KEYS}, {**ALL_KEYS, "an.option": "x"}, "(an.option: default there, x here)"),
        ({**MODEL, "output.embeddings": True}, {**ALL_KEYS}, "(output.embeddings: true there, false here)"),
        ({**MODEL, "output.columns": ["label"]}, {**MODEL}, '(output.columns: ["label"] there, default ([]) here)'),
    ],
)
def test_an_absent_key_is_named_as_the_default(theirs: dict[str, Any], ours: dict[str, Any], said: str) -> None:
    with pytest.raises(OutputError) as caught:
        require_same(theirs, ours, "u")
    assert said in str(caught.value)


def test_defaults_of_absent_keys_are_those_of_the_config() -> None:
    """If a default changes, `DEFAULTS` keeps the old value, `prepare` still writes the key, and this test lists it."""
    today = Config()
    assert {
        "top_k": today.top_k,
        "answer.min_score": today.answer.min_score,
        "output.embeddings": today.output.embeddings,
        "output.columns": list(today.output.columns),
    } == DEFAULTS

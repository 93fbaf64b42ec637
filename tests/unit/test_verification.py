"""What verify finds in the files of an output: each fault is named with its file, and takes the code that it should."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import AuditError, OutputError
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing
from imgbatch.ledger.part_file import encode
from imgbatch.ledger.success_marker import SuccessMarker, read_success
from imgbatch.schema import LISTING, RESULTS
from imgbatch.sources.base import ListingBatch
from imgbatch.storage.stores import Folder, Stores
from imgbatch.verification.file_checks import OutputCheck, null_count, record_of

WEIGHTS = "0123456789abcdef"
FINGERPRINT = {"weights": WEIGHTS, "top_k": 5}
MODEL = f"m@{WEIGHTS[:12]}"
LABELS = ("cat", "dog", "cow")
Change = Callable[[pa.Table], pa.Table]


def row(number: int) -> dict[str, Any]:
    best = {"label": LABELS[number % 3], "label_id": number % 3, "score": 0.5}
    return {
        "uri": f"s3://in/{number}",
        **best,
        "top_k": [best],
        "answer": best["label"],
        "width": 4,
        "height": 4,
        "size": 9,
    }


def refusal(number: int) -> dict[str, Any]:
    said = {"stage": "decode", "reason": "corrupt", "message": "m", "passing": False, "attempts": 1}
    return {"uri": f"s3://in/{number}", **said}


@pytest.fixture
def output(tmp_path: Any) -> Folder:
    """A finished output of two parts with three labels each, a part with two rejects, and the seals."""
    output = Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path / "out"))
    schema = pa.schema(
        [entry for entry in RESULTS if entry.name not in ("index", "offset", "previous_offset", "resume_offset")]
    )
    for rows in ([row(0), row(1), row(2), refusal(6)], [row(3), row(4), row(5), refusal(7)]):
        Ledger(output, FINGERPRINT).open().commit(pa.Table.from_pylist(rows, schema=schema), "run", MODEL)
    batch = pa.RecordBatch.from_pylist([{"uri": f"s3://in/{number}"} for number in range(8)], schema=LISTING)
    Listing(Ledger(output.folder("none"), {}).open(), output.folder("runs/run/listing")).take([ListingBatch(batch)])
    Ledger(output, FINGERPRINT).open().seal("run")
    output.put("runs/run/run.json", json.dumps({"run_id": "run", "fingerprint": FINGERPRINT}).encode())
    SuccessMarker(output).write("run", {"listed": 8, "labelled": 6, "rejected": 2, "kept": 0}, None, "run")
    return output


def check(output: Folder) -> OutputCheck:
    success = read_success(output)
    assert success is not None
    checked = OutputCheck(output, success, record_of(output, "run"))
    checked.run()
    return checked


def edit(output: Folder, name: str, change: Change, **footer: Any) -> None:
    """Write a part again with other rows, and its footer with other entries."""
    table = pq.read_table(io.BytesIO(output.read(name)))
    told = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    told |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in footer.items()}
    output.put(name, encode(change(table).replace_schema_metadata(None), told))


def same(table: pa.Table) -> pa.Table:
    return table


def with_column(name: str, *values: Any) -> Change:
    def change(table: pa.Table) -> pa.Table:
        field = table.schema.field(name).with_nullable(True)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return change


def test_a_correct_output_passes(output: Folder) -> None:
    assert check(output).fingerprint == FINGERPRINT


@pytest.mark.parametrize(
    "part", ["labels/part-00000002.parquet", "rejects/part-00000001.parquet", "labels/part-00000003.parquet"]
)
def test_a_part_of_another_fingerprint_is_named_with_the_keys_that_differ(output: Folder, part: str) -> None:
    edit(output, part, same, fingerprint={**FINGERPRINT, "top_k": 3})
    with pytest.raises(OutputError, match=rf"{part}.*1 of the parts.*top_k: 3 there, 5 elsewhere.*move") as caught:
        check(output)
    assert "weights" not in str(caught.value)


def test_without_a_record_the_fingerprint_of_most_parts_counts(output: Folder) -> None:
    output.delete("runs/run/run.json")
    check(output)
    edit(output, "labels/part-00000001.parquet", same, fingerprint={**FINGERPRINT, "weights": "f" * 16})
    with pytest.raises(OutputError, match=r"labels/part-00000001.parquet: 1 of the parts"):
        check(output)


def test_an_output_with_another_fingerprint_than_its_record_is_found(output: Folder) -> None:
    for name in output.names("labels"):
        edit(output, f"labels/{name}", same, fingerprint={**FINGERPRINT, "top_k": 3})
    with pytest.raises(OutputError, match="top_k: 3 there, 5 elsewhere"):
        check(output)


def test_an_option_at_its_default_does_not_change_the_fingerprint(output: Folder) -> None:
    edit(output, "labels/part-00000002.parquet", same, fingerprint={"weights": WEIGHTS, "output.embeddings": False})
    check(output)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("label", (None, None, None)), ("label", ("cat", None, "cow")), ("label_id", (0, 1, None)), ("score", (None, 0.5, 0.5)),
        ("width", (None, 4, 4)), ("run_id", (None, "run", "run")), ("model", (MODEL, None, MODEL)),
    ],
)  # fmt: skip
def test_missing_values_are_found_with_and_without_statistics(
    output: Folder, name: str, values: tuple[Any, ...], tmp_path: Any
) -> None:
    part = "labels/part-00000001.parquet"
    edit(output, part, with_column(name, *values))
    lost = values.count(None)
    said = rf"{'1 row' if lost == 1 else f'{lost} rows'} without a value of {name}, in .*{part}; move these parts away"
    with pytest.raises(AuditError, match=said):
        check(output)
    table = pq.read_table(io.BytesIO(output.read(part)))
    sink = io.BytesIO()
    pq.write_table(table, sink, write_statistics=False)
    output.put(part, sink.getvalue())
    with pytest.raises(AuditError, match=said):
        check(output)


def test_a_column_with_statistics_is_not_read(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pq.ParquetFile(io.BytesIO(output.read("labels/part-00000001.parquet")))
    monkeypatch.setattr(file, "read", None)
    assert [null_count(file, name) for name in ("uri", "label", "label_id", "score", "width", "run_id")] == [0] * 6


def test_rejects_without_a_reason_are_found(output: Folder) -> None:
    edit(output, "rejects/part-00000002.parquet", with_column("reason", None))
    with pytest.raises(AuditError, match=r"1 row without a value of reason, in .*rejects/part-00000002.parquet"):
        check(output)


def test_a_missing_column_is_found_unless_it_was_not_requested(output: Folder) -> None:
    edit(output, "labels/part-00000001.parquet", lambda table: table.drop_columns(["label"]))
    with pytest.raises(AuditError, match=r"3 rows without the column label, in .*labels/part-00000001.parquet"):
        check(output)
    for name in [f"labels/{name}" for name in output.names("labels")]:
        edit(
            output,
            name,
            lambda table: table.select(["uri", "score", "size"]),
            fingerprint={"output.columns": ["score"]},
        )
    for name in [f"rejects/{name}" for name in output.names("rejects")]:
        edit(output, name, same, fingerprint={"output.columns": ["score"]})
    output.delete("runs/run/run.json")
    check(output)


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan"), float("inf")])
def test_scores_that_are_not_probabilities_are_found(output: Folder, score: float) -> None:
    edit(output, "labels/part-00000002.parquet", with_column("score", 0.5, score, 0.5))
    with pytest.raises(
        AuditError, match=r"1 row with a score that is no probability, in .*labels/part-00000002.parquet"
    ):
        check(output)


def test_labels_that_do_not_belong_to_their_ids_are_found(output: Folder) -> None:
    edit(output, "labels/part-00000002.parquet", with_column("label", "cow", "dog", "cat"))
    with pytest.raises(AuditError, match=r"2 rows with a label that does not belong to its label_id.*elsewhere"):
        check(output)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ((0, -1, 2), "label_id that no model has"),
        ((0, 2**31 - 1, 2), "label_id that no model has"),
        ((0, 2, 2), "not the first of top_k"),
    ],
)
def test_impossible_ids_are_found(output: Folder, ids: tuple[int, ...], said: str) -> None:
    edit(output, "labels/part-00000002.parquet", with_column("label_id", *ids))
    with pytest.raises(AuditError, match=rf"1 row with a .*{said}"):
        check(output)


def test_rows_without_top_k_are_found(output: Folder) -> None:
    edit(output, "labels/part-00000001.parquet", with_column("top_k", [], None, row(2)["top_k"]))
    with pytest.raises(AuditError, match="2 rows without top_k"):
        check(output)


def test_rows_that_name_another_model_than_their_footer_are_found(output: Folder) -> None:
    edit(output, "labels/part-00000001.parquet", with_column("model", MODEL, MODEL, "m@ffffffffffff"))
    with pytest.raises(AuditError, match=r"1 row with another model .*\(m@ffffffffffff\)"):
        check(output)


@pytest.mark.parametrize(
    "name",
    [
        "_copy.parquet", ".copy.parquet", "part-00000001 (1).parquet", "part-00000001.parquet.tmp", "note.txt",
        "sub/part-00000001.parquet", "_old/part-00000001.parquet", "_metadata", "part-1.parquet", "_COPY.PARQUET",
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_foreign_files_that_readers_would_read_are_named(output: Folder, name: str, table: str) -> None:
    output.put(f"{table}/{name}", output.read(f"{table}/part-00000001.parquet"))
    with pytest.raises(OutputError) as caught:
        check(output)
    assert output.at(f"{table}/{name}") in str(caught.value) and "move it away" in str(caught.value)
    assert "two rows" not in str(caught.value), "it is no part, so that its rows are not counted"


@pytest.mark.parametrize(
    "name", ["_SUCCESS", ".DS_Store", ".part-00000001.parquet.0a.tmp", ".part-00000001.parquet.crc"]
)
def test_foreign_files_that_no_reader_reads_are_ignored(output: Folder, name: str) -> None:
    output.put(f"labels/{name}", b"")
    check(output)


def test_of_many_foreign_files_the_first_few_are_named(output: Folder) -> None:
    for number in range(9):
        output.put(f"labels/copy-{number}.parquet", b"")
    with pytest.raises(OutputError, match=r"\(9 in all\)") as caught:
        check(output)
    assert str(caught.value).count("copy-") == 3


@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_a_missing_seal_is_named_with_its_table(output: Folder, table: str) -> None:
    output.delete(f"{table}/part-00000003.parquet")
    with pytest.raises(
        AuditError, match=rf"out/{table} is not sealed.*run.*part-00000002.parquet.*same classify\.py command"
    ) as caught:
        check(output)
    assert str(caught.value).count("is not sealed") == 1


def test_a_seal_of_another_run_does_not_count(output: Folder) -> None:
    edit(output, "labels/part-00000003.parquet", same, run_id="other")
    with pytest.raises(AuditError, match=r"labels is not sealed"):
        check(output)


def test_a_later_seal_after_that_of_the_run_is_accepted(output: Folder) -> None:
    """As after a run that found nothing to do, and was killed, before the _SUCCESS of the run before it arrived."""
    Ledger(output, FINGERPRINT).open().seal("later")
    check(output)


def test_all_problems_are_reported_at_once_and_foreign_ones_decide_the_exit_code(output: Folder) -> None:
    output.put("labels/_copy.parquet", b"")
    output.delete("rejects/part-00000003.parquet")
    edit(output, "labels/part-00000001.parquet", with_column("label", None, None, None))
    with pytest.raises(OutputError, match="3 problems in") as caught:
        check(output)
    assert all(
        said in str(caught.value) for said in ("_copy.parquet", "rejects is not sealed", "without a value of label")
    )


def test_a_damaged_part_does_not_hide_earlier_problems(output: Folder) -> None:
    output.put("labels/_copy.parquet", b"")
    output.put("rejects/part-00000002.parquet", b"PAR1")
    with pytest.raises(OutputError) as caught:
        check(output)
    assert "_copy.parquet" in str(caught.value) and "rejects/part-00000002.parquet is not a complete" in str(
        caught.value
    )
    assert "not sealed" not in str(caught.value)


def test_a_label_with_two_ids_is_found(output: Folder) -> None:
    for part in ("labels/part-00000001.parquet", "labels/part-00000002.parquet"):
        edit(output, part, with_column("label", "cat", "dog", "dog"))
    with pytest.raises(
        AuditError, match=r"2 rows with a label that does not belong to its label_id.*'dog \(of 1\)' elsewhere"
    ):
        check(output)

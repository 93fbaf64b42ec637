"""Carried values that have changed in the input are found in the listing and written into the rows of done images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import Conflict, InputError
from imgbatch.ledger.audit import audit
from imgbatch.ledger.corrections import corrections, count_rows
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing
from imgbatch.schema import LISTING, RESULTS, carried_fields
from imgbatch.sources.base import ListingBatch
from imgbatch.storage.stores import Folder, Stores

Row = dict[str, Any]


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def output(tmp_path: Any) -> Folder:
    return Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path / "out"))


def table(columns: dict[str, Any], **version: Any) -> pa.RecordBatch:
    """Return listed images: the column `uri` is the image, the others are carried."""
    known = {"size": 5, "etag": "e", "last_modified": None, "container": None} | version
    uris = columns["uri"]
    found = {
        name: pa.array(uris if name == "uri" else [known[name]] * len(uris), kind)
        for name, kind in zip(LISTING.names, LISTING.types, strict=True)
    }
    found |= {f"input_{name}": pa.array(values) for name, values in columns.items() if name != "uri"}
    return pa.RecordBatch.from_pydict(found)


def run(
    output: Folder,
    *batches: pa.RecordBatch,
    rejected: frozenset[str] = frozenset(),
    limit: int | None = None,
    apply: Callable[[Ledger, Any], None] = Ledger.correct,
    **options: Any,
) -> tuple[int, int]:
    """List, correct, and commit what is pending; return the numbers of corrected and of new rows."""
    ledger = Ledger(output, {}, **options).open()
    listing = Listing(ledger, output.folder("listing"), limit)
    for name in output.folder("listing").names():
        output.folder("listing").delete(name)
    listing.take(map(ListingBatch, batches))
    pending = listing.work_plan().pending
    corrected = 0
    for some in corrections(ledger, listing.pages, listing.carried, pending, limited=listing.full):
        apply(ledger, some)
        corrected += count_rows(some)
    listed = pa.concat_tables(
        pq.ParquetFile(pa.BufferReader(output.folder("listing").read(name))).read()
        for name in output.folder("listing").names()
    )
    todo = listed.filter(pa.array(pending)).drop_columns(["container"])
    refusal = {"stage": "fetch", "reason": "corrupt", "message": "m", "passing": False, "attempts": 1}
    answers = [{**row, **(refusal if row["uri"] in rejected else {"label": "cat"})} for row in todo.to_pylist()]
    schema = pa.schema([*(entry for entry in RESULTS if entry.name != "index"), *carried_fields(listed.schema)])
    ledger.commit(pa.Table.from_pylist(answers, schema=schema), "run", "model")
    ledger.seal("run")
    audit(output, output.folder("listing"), limited=limit is not None).require_reconciled()
    return corrected, len(todo)


def rows(output: Folder, name: str = "labels") -> dict[str, Row]:
    """Return the carried columns of each row that its part has."""
    parts = [output.read(f"{name}/{part}") for part in output.names(name)]
    return {
        row["uri"]: {column.removeprefix("input_"): row[column] for column in row if column.startswith("input_")}
        for data in parts
        for row in pq.read_table(pa.BufferReader(data)).to_pylist()
    }


def parts(output: Folder) -> dict[str, bytes]:
    return {name: output.read(name) for name in output.names() if name.startswith(("labels", "rejects"))}


FIRST = {"uri": ["a", "b", "c"], "label": ["espresso", "cat", "cat"], "price": ["9.99", "9.99", "1"]}
SECOND = {"uri": ["a", "b", "c"], "label": ["tiger", "cat", "dog"], "price": ["4.99", "9.99", "1"]}


def test_changed_values_reach_both_tables_without_new_inference(output: Folder) -> None:
    assert run(output, table(FIRST), rejected=frozenset("c")) == (0, 3)
    before = parts(output)
    assert run(output, table(SECOND)) == (2, 0)
    assert rows(output) == {"a": {"label": "tiger", "price": "4.99"}, "b": {"label": "cat", "price": "9.99"}}
    assert rows(output, "rejects") == {"c": {"label": "dog", "price": "1"}}
    changed = {name for name, data in parts(output).items() if before.get(name, data) != data}
    assert changed == {"labels/part-00000001.parquet", "rejects/part-00000001.parquet"}
    assert run(output, table(SECOND)) == (0, 0)


def test_only_parts_with_changed_rows_are_rewritten(output: Folder) -> None:
    for number in range(4):
        run(output, table({"uri": [f"i{n}" for n in range(number + 1)], "label": ["x"] * (number + 1)}))
    before = parts(output)
    assert run(output, table({"uri": ["i0", "i1", "i2", "i3"], "label": ["x", "y", "x", None]})) == (2, 0)
    after = parts(output)
    assert [name for name in before if before[name] != after[name]] == [
        "labels/part-00000003.parquet",
        "labels/part-00000007.parquet",
    ]
    assert {uri: row["label"] for uri, row in rows(output).items()} == {"i0": "x", "i1": "y", "i2": "x", "i3": None}


@pytest.mark.parametrize(
    ("second", "corrected", "then"),
    [
        ({"uri": ["a"], "x": [1], "new": [2]}, 0, {"x": 1}),
        ({"uri": ["a"]}, 0, {"x": 1}),
        ({"uri": ["a"], "new": [2]}, 0, {"x": 1}),
        ({"uri": ["a"], "x": [3], "new": [2]}, 1, {"x": 3}),
        ({"uri": ["a"], "x": pa.nulls(1)}, 1, {"x": None}),
    ],
)
def test_an_added_or_removed_column_makes_no_row_stale(output: Folder, second: Row, corrected: int, then: Row) -> None:
    run(output, table({"uri": ["a"], "x": [1]}))
    assert run(output, table(second)) == (corrected, 0)
    assert rows(output) == {"a": then}


def test_parts_are_compared_by_the_columns_they_have(output: Folder) -> None:
    run(output, table({"uri": ["a"], "x": [1]}))
    run(output, table({"uri": ["a", "b"], "x": [1, 2], "y": ["p", "q"]}))
    run(output, table({"uri": ["a", "b", "c"], "z": [True, True, True]}))
    assert run(output, table({"uri": ["a", "b", "c"], "x": [1, 2, 3], "y": ["1", "2", "3"], "z": [False] * 3})) == (
        2,
        0,
    )
    assert rows(output) == {"a": {"x": 1}, "b": {"x": 2, "y": "2"}, "c": {"z": False}}


def test_columns_not_selected_for_labels_are_corrected_in_rejects_only(output: Folder) -> None:
    chosen = {"carried": ["input_price"]}
    run(output, table(FIRST), rejected=frozenset("c"), **chosen)
    assert run(output, table(SECOND), **chosen) == (2, 0)  # of the labels the price of a, of the rejects the label of c
    assert rows(output) == {"a": {"price": "4.99"}, "b": {"price": "9.99"}}
    assert rows(output, "rejects") == {"c": {"label": "dog", "price": "1"}}


TYPES = [
    ("the same number as float", pa.array([5]), pa.array([5.0]), 0, 5),
    ("the same number as text", pa.array([5]), pa.array(["5"]), 0, 5),
    ("the same float in more bits", pa.array([0.1], pa.float32()), pa.array([0.1]), 0, 0.10000000149011612),
    ("the same time in other units", pa.array([1], pa.timestamp("s")), pa.array([1000], pa.timestamp("ms")), 0, None),
    ("another float", pa.array([5]), pa.array([5.5]), 1, 5.5),
    ("text where numbers were", pa.array([5]), pa.array(["five"]), 1, "five"),
    ("a great number where floats were", pa.array([0.5]), pa.array([2**53 + 1]), 1, str(2**53 + 1)),
    ("a value where none was", pa.nulls(1, pa.string()), pa.array([7]), 1, "7"),
    ("lists", pa.array([[1, 2]]), pa.array([[1, 3]]), 1, [1, 3]),
    ("the same list", pa.array([[1, 2]]), pa.array([[1, 2]], pa.list_(pa.int8())), 0, [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "corrected", "then"), [case[1:] for case in TYPES], ids=[each[0] for each in TYPES]
)
def test_values_are_compared_across_types_and_corrected_once(
    output: Folder, old: pa.Array, new: pa.Array, corrected: int, then: Any
) -> None:
    run(output, table({"uri": ["a"], "x": old}))
    assert run(output, table({"uri": ["a"], "x": new})) == (corrected, 0)
    assert then is None or rows(output) == {"a": {"x": then}}
    assert run(output, table({"uri": ["a"], "x": new})) == (0, 0)


def test_a_list_in_a_text_column_is_refused_by_name(output: Folder) -> None:
    run(output, table({"uri": ["a"], "tags": ["p"]}))
    with pytest.raises(InputError, match=r"column 'tags' is string in the output and list.* in the input"):
        run(output, table({"uri": ["a"], "tags": [["p"]]}))


def test_pending_and_unlisted_images_are_not_corrected(output: Folder) -> None:
    run(output, table({"uri": ["a", "b", "c"], "x": [1, 1, 1]}))
    changed = table({"uri": ["a"], "x": [2]}, etag="changed")
    assert run(output, changed, table({"uri": ["b"], "x": [2]})) == (1, 1)
    assert {uri: row["x"] for uri, row in rows(output).items()} == {"a": 2, "b": 2, "c": 1}


def test_values_of_later_rows_are_used_for_corrections(output: Folder) -> None:
    folder = table({"uri": ["a", "b"]})
    manifest = table({"uri": ["a"], "x": [1]}, size=None, etag=None)
    run(output, folder, manifest)
    assert run(output, manifest, folder) == (0, 0)
    assert run(output, folder, table({"uri": ["a"], "x": [2]}, size=None, etag=None)) == (1, 0)
    assert run(output, folder) == (0, 0)
    assert {uri: row["x"] for uri, row in rows(output).items()} == {"a": 2, "b": None}


def test_a_limited_run_removes_no_value_beyond_its_limit(output: Folder) -> None:
    first = table({"uri": ["a"], "x": [None]}), table({"uri": ["b"], "x": [2]})
    later = table({"uri": ["a"], "x": [1]})
    assert run(output, *first, later) == (0, 2)
    assert run(output, *first, later, limit=2) == (0, 0)
    assert rows(output)["a"] == {"x": 1}
    assert run(output, table({"uri": ["a"], "x": [3]}), table({"uri": ["b"], "x": [2]}), limit=1) == (1, 0)
    assert rows(output) == {"a": {"x": 3}, "b": {"x": 2}}


def test_many_rows_are_corrected_in_batches(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.ledger.listing_pages.PAGE_ROWS", 10)
    monkeypatch.setattr("imgbatch.ledger.corrections.MAX_BUFFERED_BYTES", 1_000)
    names = [f"i{number:03d}" for number in range(200)]
    for start in range(0, 200, 50):
        run(output, table({"uri": names[: start + 50], "x": [""] * (start + 50)}))
    batches: list[int] = []

    def counted(ledger: Ledger, some: Any) -> None:
        batches.append(count_rows(some))
        ledger.correct(some)

    new = [f"value of {name}" for name in names]
    assert run(output, table({"uri": names[::-1], "x": new[::-1]}), apply=counted) == (200, 0)
    assert len(batches) > 3
    assert {uri: row["x"] for uri, row in rows(output).items()} == dict(zip(names, new, strict=True))


def test_the_next_run_completes_corrections_after_a_kill(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    run(output, table({"uri": ["a"], "x": [1]}))
    run(output, table({"uri": ["a", "b"], "x": [1, 1]}))
    new, replace = table({"uri": ["a", "b"], "x": [2, 2]}), Folder.replace

    def dying(folder: Folder, name: str, data: bytes, tag: str | None) -> None:
        replace(folder, name, data, tag)
        if name.startswith("part"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "replace", dying)
        with pytest.raises(Killed):
            run(output, new)
    assert [row["x"] for row in rows(output).values()] == [2, 1]
    assert run(output, new) == (1, 0)
    assert [row["x"] for row in rows(output).values()] == [2, 2]


def test_a_late_rewrite_of_a_dead_run_restores_no_old_value(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    run(output, table({"uri": ["a"], "x": [1]}))
    late: list[Callable[[], None]] = []
    replace = Folder.replace

    def in_flight(folder: Folder, name: str, data: bytes, tag: str | None) -> None:
        if name.startswith("part"):
            late.append(lambda: replace(folder, name, data, tag))
            raise Killed
        replace(folder, name, data, tag)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "replace", in_flight)
        with pytest.raises(Killed):
            run(output, table({"uri": ["a"], "x": [2]}))
    assert run(output, table({"uri": ["a"], "x": [1]})) == (0, 0)  # the manifest is as it was before
    with pytest.raises(Conflict):
        late[0]()
    assert rows(output) == {"a": {"x": 1}}


def test_rows_of_other_logs_and_parts_are_not_corrected(output: Folder) -> None:
    """Both logs have a part 1, and both rows the same image's key in turn."""
    run(output, table({"uri": ["a", "b"], "x": [1, 1]}), rejected=frozenset("a"))
    assert run(output, table({"uri": ["a", "b"], "x": [2, 1]})) == (1, 0)
    assert rows(output) == {"b": {"x": 1}} and rows(output, "rejects") == {"a": {"x": 2}}
    assert run(output, table({"uri": ["a", "b"], "x": [2, 3]})) == (1, 0)
    assert rows(output) == {"b": {"x": 3}} and rows(output, "rejects") == {"a": {"x": 2}}


def test_without_carried_columns_no_part_is_read_again(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    run(output, table({"uri": ["a"], "x": [1]}))
    ledger = Ledger(output, {}).open()
    monkeypatch.setattr("imgbatch.ledger.commit_log.Log.read", lambda *arguments: pytest.fail("a part was read"))
    assert list(corrections(ledger, output.folder("listing"), pa.schema([]), None)) == []  # type: ignore[arg-type]

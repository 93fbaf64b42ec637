"""The listing: each image once, numbered by pages, compared with the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.concurrency.monitor import on_tick
from imgbatch.config.sections import StorageConfig
from imgbatch.errors import InputError
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing
from imgbatch.ledger.listing_pages import PAGE_ROWS, page_name, pages, read_page
from imgbatch.schema import LISTING, RESULTS, with_carried
from imgbatch.sources.base import ListingBatch
from imgbatch.storage.stores import Folder, Stores


@pytest.fixture
def output(tmp_path: Any) -> Folder:
    return Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path / "out"))


def batch(*uris: str, size: int | None = 5, etag: str = "e") -> pa.RecordBatch:
    rows = [{"uri": uri, "size": size, "etag": etag, "last_modified": None} for uri in uris]
    return pa.RecordBatch.from_pylist(rows, schema=LISTING)


def labelled(output: Folder, *uris: str, reason: str | None = None, passing: bool = False) -> None:
    refusal = {"stage": "fetch", "reason": reason, "message": "m", "passing": passing, "attempts": 1}
    rows = [{**row, **(refusal if reason else {"label": "cat"})} for row in batch(*uris).to_pylist()]
    schema = pa.schema([entry for entry in RESULTS if entry.name != "index"])
    Ledger(output, {}).open().commit(pa.Table.from_pylist(rows, schema=schema), "r", "m")


def listing(output: Folder, limit: int | None = None, **options: Any) -> Listing:
    return Listing(Ledger(output, {}).open(), output.folder("listing"), limit, **options)


def uris(output: Folder) -> list[str]:
    return [uri for page in pages(output.folder("listing")) for uri in page["uri"].to_pylist()]


def names(count: int, start: int = 0) -> list[str]:
    return [f"i{number:06d}" for number in range(start, start + count)]


def test_the_number_of_an_image_is_its_position_in_the_pages(output: Folder) -> None:
    taken = listing(output)
    everything = names(2 * PAGE_ROWS + 7)
    taken.take(ListingBatch(batch(*everything[at : at + 9_999])) for at in range(0, len(everything), 9_999))
    folder = output.folder("listing")
    assert [len(read_page(folder, number)) for number in range(3)] == [PAGE_ROWS, PAGE_ROWS, 7]
    assert folder.names() == [page_name(number) for number in range(3)]
    assert uris(output) == everything
    assert len(taken.work_plan().pending) == taken.counts.listed == len(everything)
    assert taken.counts.bytes == 5 * len(everything)


def test_full_pages_are_not_followed_by_an_empty_one(output: Folder) -> None:
    listing(output).take([ListingBatch(batch(*names(PAGE_ROWS)))])
    assert len(output.names("listing")) == 1


def test_duplicates_are_listed_once_and_counted(output: Folder) -> None:
    labelled(output, "done")
    labelled(output, "again", reason="timeout", passing=True)
    taken = listing(output)
    taken.take(
        [
            ListingBatch(batch("a", "a", "done", "again")),
            ListingBatch(batch("b", "a", "done", "done", "again")),
            ListingBatch(batch("b")),
        ]
    )
    assert uris(output) == ["a", "done", "again", "b"]
    assert taken.work_plan().pending.tolist() == [True, False, True, True]
    counts = taken.counts
    assert (counts.listed, counts.duplicates, counts.already_done, counts.stale) == (4, 6, 1, 1)


def test_new_changed_and_transiently_rejected_images_are_pending(output: Folder) -> None:
    labelled(output, "done", "changed", "gone")
    labelled(output, "permanent", reason="corrupt")
    labelled(output, "passing", reason="timeout", passing=True)
    taken = listing(output)
    taken.take([ListingBatch(batch("done", "permanent", "passing", "new")), ListingBatch(batch("changed", size=6))])
    assert dict(zip(uris(output), taken.work_plan().pending.tolist(), strict=True)) == {
        "done": False, "permanent": False, "passing": True, "new": True, "changed": True,
    }  # fmt: skip
    assert taken.ledger.unlisted_rows() == 1
    assert taken.counts.bytes == 16


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 100])
def test_a_limit_takes_the_first_images_including_done_ones(output: Folder, limit: int) -> None:
    labelled(output, "b")
    taken = listing(output, limit)
    taken.take([ListingBatch(batch("a", "a", "b", "a")), ListingBatch(batch("b", "c", "d")), ListingBatch(batch("e"))])
    assert uris(output) == ["a", "b", "c", "d", "e"][:limit]
    assert taken.full == (limit <= 5)
    assert taken.counts.already_done == (limit > 1)


def test_a_source_is_not_read_beyond_the_limit(output: Folder) -> None:
    drawn = []

    def found() -> Iterator[ListingBatch]:
        for number in range(100):
            drawn.append(number)
            yield ListingBatch(batch(f"i{number}"))

    listing(output, 3).take(found())
    assert len(drawn) == 3


def test_ignored_objects_are_counted(output: Folder) -> None:
    taken = listing(output)
    taken.take([ListingBatch(batch("a"), ignored=3), ListingBatch(batch(), ignored=4)])
    assert (taken.counts.listed, taken.counts.ignored) == (1, 7)


def test_an_empty_listing_has_no_page_and_nothing_pending(output: Folder) -> None:
    taken = listing(output)
    taken.take([])
    assert (taken.counts.listed, taken.work_plan().pending.tolist(), uris(output)) == (0, [], [])
    assert taken.work_plan().pending.dtype == np.bool_


def test_a_dry_listing_writes_nothing(output: Folder) -> None:
    taken = Listing(Ledger(output, {}).open(), None)
    taken.take([ListingBatch(batch("a", "b"))])
    assert taken.counts.listed == 2
    assert output.names() == []


def test_unknown_sizes_count_as_zero(output: Folder) -> None:
    taken = listing(output)
    taken.take([ListingBatch(batch("a", size=None)), ListingBatch(batch("b", size=7))])
    assert taken.counts.bytes == 7
    assert [row["size"] for page in pages(output.folder("listing")) for row in page.to_pylist()] == [None, 7]


def test_a_missing_page_is_an_error(output: Folder) -> None:
    listing(output).take([ListingBatch(batch(*names(PAGE_ROWS + 1)))])
    output.delete(f"listing/{page_name(0)}")
    with pytest.raises(Exception, match="page-000000"):
        list(pages(output.folder("listing")))


# Carried columns: one schema for all batches


def rows(output: Folder) -> list[dict[str, Any]]:
    return [row for page in pages(output.folder("listing")) for row in page.to_pylist()]


def carrying(first: int, **columns: pa.Array) -> ListingBatch:
    """Return images, of that number and the next ones, with carried columns of these names."""
    found = batch(*names(len(next(iter(columns.values()))), first))
    for name, values in columns.items():
        found = found.append_column(f"input_{name}", values)
    return ListingBatch(found, origin=f"file-{first}")


TYPES = [
    ("null then text", [pa.nulls(1), pa.array(["a"])], pa.string(), [None, "a"]),
    ("text then null", [pa.array(["a"]), pa.nulls(1)], pa.string(), ["a", None]),
    ("int then float", [pa.array([1]), pa.array([2.5])], pa.float64(), [1.0, 2.5]),
    ("float then int", [pa.array([2.5]), pa.array([1])], pa.float64(), [2.5, 1.0]),
    ("narrow then wide", [pa.array([1], pa.int8()), pa.array([300])], pa.int64(), [1, 300]),
    ("int then text", [pa.array([1]), pa.array(["a"])], pa.string(), ["1", "a"]),
    ("text then int then float", [pa.array(["a"]), pa.array([1]), pa.array([0.5])], pa.string(), ["a", "1", "0.5"]),
    ("int then float then text", [pa.array([1]), pa.array([2.5]), pa.array(["a"])], pa.string(), ["1", "2.5", "a"]),
    ("bool then int", [pa.array([True]), pa.array([3])], pa.string(), ["true", "3"]),
    ("no value at all", [pa.nulls(1), pa.nulls(1)], pa.string(), [None, None]),
    ("dictionary then text", [pa.array(["a"]).dictionary_encode(), pa.array(["b"])], pa.string(), ["a", "b"]),
    ("lists", [pa.array([[1]]), pa.nulls(1)], pa.list_(pa.field("element", pa.int64())), [[1], None]),
    # Doubles hold integers up to 2^53, int64 up to 2^63.
    ("great int then float", [pa.array([2**53 + 1]), pa.array([0.5])], pa.string(), [str(2**53 + 1), "0.5"]),
    ("float then great int", [pa.array([0.5]), pa.array([2**53 + 1])], pa.string(), ["0.5", str(2**53 + 1)]),
    ("uint64 then int64", [pa.array([2**63], pa.uint64()), pa.array([-1])], pa.string(), [str(2**63), "-1"]),
]  # fmt: skip


@pytest.mark.parametrize("page_rows", [1, 2, 100])
@pytest.mark.parametrize(("batches", "kind", "values"), [case[1:] for case in TYPES], ids=[case[0] for case in TYPES])
def test_a_column_has_one_type_that_holds_the_values_of_all_batches(
    output: Folder, batches: list[pa.Array], kind: pa.DataType, values: list[Any], page_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("imgbatch.ledger.listing_pages.PAGE_ROWS", page_rows)
    taken = listing(output)
    taken.take(carrying(number, x=column) for number, column in enumerate(batches))
    schemas = {page.schema for page in pages(output.folder("listing"))}
    assert schemas == {with_carried(LISTING, pa.schema([("input_x", kind)]))}
    assert taken.carried == pa.schema([("input_x", kind)])
    assert [row["input_x"] for row in rows(output)] == values


@pytest.mark.parametrize("page_rows", [1, 100])
def test_a_column_that_the_first_batches_lack_is_not_lost(
    output: Folder, page_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgbatch.ledger.listing_pages.PAGE_ROWS", page_rows)
    taken = listing(output)
    taken.take([ListingBatch(batch("plain")), carrying(1, a=pa.array([1])), carrying(2, b=pa.array(["x"]))])
    values = [(row["uri"], row["input_a"], row["input_b"]) for row in rows(output)]
    assert values == [("plain", None, None), ("i000001", 1, None), ("i000002", None, "x")]
    assert len({page.schema for page in pages(output.folder("listing"))}) == 1


def test_only_pages_that_differ_are_rewritten(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.ledger.listing_pages.PAGE_ROWS", 1)
    written, put = [], Folder.put
    monkeypatch.setattr(Folder, "put", lambda self, name, data: (written.append(name), put(self, name, data)))
    listing(output).take(carrying(at, x=pa.array([value])) for at, value in enumerate([1, 2, 0.5, 3]))
    assert written == [page_name(number) for number in (0, 1, 2, 3, 0, 1)]


def test_a_column_that_becomes_text_is_logged_once_with_its_files(
    output: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = [pa.array([1]), pa.array(["a"]), pa.array([2]), pa.array([0.5])]
    listing(output).take(carrying(number, price=column) for number, column in enumerate(mixed))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["column 'price' is int64 in file-0 and string in file-1: it is carried as text"]


def test_rows_of_a_parquet_file_name_it(output: Folder, caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for name, values in (("a", pa.array([1])), ("b", pa.array(["x"]))):
        row = {
            "uri": f"s3://b/{name}.parquet#0",
            "size": None,
            "etag": "e",
            "last_modified": None,
            "container": "parquet",
        }
        images = pa.RecordBatch.from_pylist([row], schema=LISTING)
        found.append(ListingBatch(images.append_column("input_x", values), origin="s3://b"))
    listing(output).take(found)
    assert "int64 in s3://b/a.parquet and string in s3://b/b.parquet" in caplog.text


@pytest.mark.parametrize(
    "other",
    [pa.array(["a"]), pa.array([["a"]]), pa.array([{"a": 1}]), pa.array([[[1]]])],
    ids=lambda each: str(each.type),
)
def test_lists_and_structs_without_a_common_type_are_refused(output: Folder, other: pa.Array) -> None:
    with pytest.raises(InputError, match=r"column 'tags' is list<item: int64> in file-0 and .* in file-1"):
        listing(output).take([carrying(0, tags=pa.array([[1]])), carrying(1, tags=other)])


def test_list_values_that_do_not_fit_are_refused(output: Folder) -> None:
    with pytest.raises(InputError, match="column 'tags'"):
        listing(output).take([carrying(0, tags=pa.array([[2**53 + 1]])), carrying(1, tags=pa.array([[0.5]]))])


def test_bytes_that_are_not_text_are_refused_in_a_text_column(output: Folder) -> None:
    with pytest.raises(InputError, match="column 'x'"):
        listing(output).take([carrying(0, x=pa.array([b"\xff"])), carrying(1, x=pa.array([1]))])


def test_a_dry_listing_has_the_columns_and_leaves_no_files(tmp_path: Path, output: Folder, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    taken = Listing(Ledger(output, {}).open(), None, agree=("input_label",))
    taken.take([carrying(0, x=pa.array([1])), carrying(1, x=pa.array(["a"]))])
    assert [row["input_x"] for page in pages(taken.pages) for row in page.to_pylist()] == ["1", "a"]
    del taken
    assert list(tmp_path.iterdir()) == []
    taken = Listing(Ledger(output, {}).open(), None, agree=("input_label",))
    with pytest.raises(InputError, match="two values of 'label'"):
        taken.take([labels_of(i="cat"), labels_of(i="dog")])


# Rows that name an image again


def labels_of(size: int | None = None, etag: str | None = None, /, **labels: Any) -> ListingBatch:
    """Return a row for each image, as from a manifest with a column `label`."""
    found = batch(*labels, size=size, etag=etag)
    return ListingBatch(found.append_column("input_label", pa.array([*labels.values()])))


def summary(output: Folder) -> list[tuple[Any, ...]]:
    return [(row["uri"], row["size"], row["etag"], row.get("input_label")) for row in rows(output)]


FOLDER, MANIFEST = ListingBatch(batch("a", "b", "c")), labels_of(b="cat", c=None)


@pytest.mark.parametrize("page_rows", [1, 2, 100])
@pytest.mark.parametrize("buffered", [0, 1 << 20])
@pytest.mark.parametrize("order", [[FOLDER, MANIFEST], [MANIFEST, FOLDER], [MANIFEST, FOLDER, MANIFEST, FOLDER]])
def test_a_row_with_a_value_takes_precedence_in_any_order(
    output: Folder, order: list[ListingBatch], page_rows: int, buffered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgbatch.ledger.listing_pages.PAGE_ROWS", page_rows)
    monkeypatch.setattr("imgbatch.ledger.repeats.MAX_BUFFERED_BYTES", buffered)
    taken = listing(output)
    taken.take(order)
    assert sorted(summary(output)) == [("a", 5, "e", None), ("b", 5, "e", "cat"), ("c", 5, "e", None)]
    assert (taken.counts.listed, taken.counts.duplicates) == (3, 3 * len(order) - len(order) // 2 - 3)
    assert taken.counts.bytes == 15


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_each_column_is_filled_by_the_first_row_that_has_a_value(output: Folder, blank: str | None) -> None:
    first = batch("a").append_column("input_x", pa.array([blank], pa.string()))
    second = batch("a").append_column("input_y", pa.array([7]))
    third = batch("a").append_column("input_x", pa.array(["third"])).append_column("input_y", pa.array([8]))
    listing(output).take([ListingBatch(first), ListingBatch(second), ListingBatch(third), ListingBatch(third)])
    assert [(row["input_x"], row["input_y"]) for row in rows(output)] == [("third", 7)]


def test_rows_within_one_batch_fill_each_other(output: Folder) -> None:
    found = batch("a", "b", "a", "b").append_column("input_x", pa.array([None, "b1", "a2", "b2"]))
    listing(output).take([ListingBatch(found)])
    assert [(row["uri"], row["input_x"]) for row in rows(output)] == [("a", "a2"), ("b", "b1")]


def test_differing_values_are_counted_and_the_first_is_kept(output: Folder, caplog: pytest.LogCaptureFixture) -> None:
    listing(output).take([
        carrying(0, price=pa.array(["1", "2", "3"])), carrying(0, price=pa.array([1, 5, 3])),
        carrying(0, price=pa.array([None, 9, None])),
    ])  # fmt: skip
    assert [row["input_price"] for row in rows(output)] == ["1", "2", "3"]
    (said,) = [record.getMessage() for record in caplog.records if "again" in record.getMessage()]
    assert said == (
        "2 rows name an image again with another value of 'price', such as i000001 has '2' and '5': the first is kept"
    )


@pytest.mark.parametrize("buffered", [0, 1 << 20])
@pytest.mark.parametrize(("first", "second", "refused"), [
    ("cat", "dog", True), ("cat", " cat ", False), ("Caf\u00e9", "Cafe\u0301", False), ("cat", "Cat", True), ("cat", "", False),
    (None, "dog", False),
])  # fmt: skip
def test_two_values_are_refused_in_a_column_where_rows_must_agree(
    output: Folder, first: str | None, second: str, refused: bool, buffered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgbatch.ledger.repeats.MAX_BUFFERED_BYTES", buffered)
    said = "^a is listed more than once, with two values of 'label': 'cat' and '[Cd]"
    taken = listing(output, agree=("input_label",))
    with pytest.raises(InputError, match=said) if refused else nullcontext():
        taken.take([ListingBatch(batch("a")), labels_of(a=first), labels_of(a=second)])


@pytest.mark.parametrize("lacking", [(), ("etag",), ("size", "etag", "last_modified")])
def test_duplicates_without_new_values_are_not_kept_in_memory(output: Folder, lacking: tuple[str, ...]) -> None:
    found = batch(*names(100))
    for name in lacking:  # local files have no ETag
        found = found.set_column(
            LISTING.names.index(name), LISTING.field(name), pa.nulls(100, LISTING.field(name).type)
        )
    taken = listing(output)
    taken.take([ListingBatch(found)])
    taken._take(found, "")
    assert (len(taken._repeats), taken.counts.duplicates) == (0, 100)


def test_pages_are_filled_in_one_pass_each_time_the_buffer_is_full(output: Folder, monkeypatch: Any) -> None:
    monkeypatch.setattr("imgbatch.ledger.listing_pages.PAGE_ROWS", 10)
    monkeypatch.setattr("imgbatch.ledger.repeats.MAX_BUFFERED_BYTES", 4_000)
    everything, count = names(500), 0
    beats: list[int] = []

    def found() -> Iterator[ListingBatch]:
        yield ListingBatch(batch(*everything))
        for at in range(0, 500, 50):
            yield labels_of(**{name: f"label of {name}" for name in reversed(everything[at : at + 50])})

    taken = listing(output)
    with on_tick(lambda: beats.append(1)):
        taken.take(found())
    assert [row["input_label"] for row in rows(output)] == [f"label of {name}" for name in everything]
    count = len(beats)
    assert 50 < count < 500  # several passes over 50 pages, not one a batch


@pytest.mark.parametrize("order", [1, -1])
def test_a_version_in_a_later_row_shows_that_an_image_has_changed(output: Folder, order: int) -> None:
    labelled(output, "same", "other size", "other etag", "unknown")
    taken = listing(output)
    manifest = labels_of(**dict.fromkeys(("same", "other size", "other etag", "unknown", "new"), "cat"))
    folder = [
        ListingBatch(batch("same", "new")),
        ListingBatch(batch("other size", size=6)),
        ListingBatch(batch("other etag", etag="f")),
    ]
    taken.take([manifest, *folder][::order])
    pending = dict(zip(uris(output), taken.work_plan().pending.tolist(), strict=True))
    assert pending == {"same": False, "other size": True, "other etag": True, "unknown": False, "new": True}
    counts = taken.counts
    assert (counts.listed, counts.already_done, counts.stale, counts.bytes) == (5, 2, 2, 6 + 5 + 5)
    assert taken.ledger.index.stale == 2


@pytest.mark.parametrize("order", [1, -1])
def test_images_without_a_version_are_counted(output: Folder, order: int) -> None:
    labelled(output, "a", "b", "c")
    manifest = [labels_of(**dict.fromkeys(("a", "b", "new"), "cat")), labels_of(5, c="cat")]
    taken = listing(output)
    taken.take(manifest)
    assert taken.counts.unversioned == 2
    taken = listing(output)
    taken.take([*manifest, ListingBatch(batch("a"))][::order])
    assert taken.counts.unversioned == 1


def test_the_version_of_a_tar_is_not_filled_by_later_rows(output: Folder) -> None:
    """How far a tar is read is recorded by version: the listed version must be the one that was looked up."""
    rows_of_tar = [
        {"uri": "t.tar", "size": None, "etag": etag, "last_modified": None, "container": "tar"} for etag in (None, "e")
    ]
    listing(output).take(ListingBatch(pa.RecordBatch.from_pylist([row], schema=LISTING)) for row in rows_of_tar)
    assert [row["etag"] for row in rows(output)] == [None]

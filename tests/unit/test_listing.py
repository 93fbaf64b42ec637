"""The listing: each image once, numbered by pages, against what the ledger holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.config import StorageConfig
from imgbatch.ledger import Ledger
from imgbatch.listing import PAGE_ROWS, Found, Listing, conform, page_name, pages, read_page
from imgbatch.schema import LISTING, RESULTS, with_carried
from imgbatch.storage import Folder, Stores

NONE = pa.schema([])


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


def listing(output: Folder, limit: int | None = None, carried: pa.Schema = NONE) -> Listing:
    return Listing(Ledger(output, {}).open(), output.folder("listing"), carried, limit)


def uris(output: Folder) -> list[str]:
    return [uri for page in pages(output.folder("listing")) for uri in page["uri"].to_pylist()]


def names(count: int, start: int = 0) -> list[str]:
    return [f"i{number:06d}" for number in range(start, start + count)]


def test_an_images_number_is_its_place_in_the_pages(output: Folder) -> None:
    taken = listing(output)
    everything = names(2 * PAGE_ROWS + 7)
    taken.take(Found(batch(*everything[at : at + 9_999])) for at in range(0, len(everything), 9_999))
    folder = output.folder("listing")
    assert [len(read_page(folder, number)) for number in range(3)] == [PAGE_ROWS, PAGE_ROWS, 7]
    assert folder.names() == [page_name(number) for number in range(3)]
    assert uris(output) == everything
    assert len(taken.todo().pending) == taken.counts.listed == len(everything)
    assert taken.counts.bytes == 5 * len(everything)


def test_pages_that_are_exactly_full_leave_no_empty_one(output: Folder) -> None:
    listing(output).take([Found(batch(*names(PAGE_ROWS)))])
    assert len(output.names("listing")) == 1


def test_what_is_listed_twice_is_listed_once_and_counted(output: Folder) -> None:
    labelled(output, "done")
    labelled(output, "again", reason="timeout", passing=True)
    taken = listing(output)
    taken.take(
        [Found(batch("a", "a", "done", "again")), Found(batch("b", "a", "done", "done", "again")), Found(batch("b"))]
    )
    assert uris(output) == ["a", "done", "again", "b"]
    assert taken.todo().pending.tolist() == [True, False, True, True]
    counts = taken.counts
    assert (counts.listed, counts.duplicates, counts.already_done, counts.stale) == (4, 6, 1, 1)


def test_only_what_has_no_row_or_changed_or_may_pass_is_pending(output: Folder) -> None:
    labelled(output, "done", "changed", "gone")
    labelled(output, "permanent", reason="corrupt")
    labelled(output, "passing", reason="timeout", passing=True)
    taken = listing(output)
    taken.take([Found(batch("done", "permanent", "passing", "new")), Found(batch("changed", size=6))])
    assert dict(zip(uris(output), taken.todo().pending.tolist(), strict=True)) == {
        "done": False, "permanent": False, "passing": True, "new": True, "changed": True,
    }  # fmt: skip
    assert taken.ledger.kept() == 1
    assert taken.counts.bytes == 16


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 100])
def test_a_limit_takes_the_first_ones_done_ones_included(output: Folder, limit: int) -> None:
    labelled(output, "b")
    taken = listing(output, limit)
    taken.take([Found(batch("a", "a", "b", "a")), Found(batch("b", "c", "d")), Found(batch("e"))])
    assert uris(output) == ["a", "b", "c", "d", "e"][:limit]
    assert taken.full == (limit <= 5)
    assert taken.counts.already_done == (limit > 1)


def test_nothing_is_drawn_from_a_source_beyond_the_limit(output: Folder) -> None:
    drawn = []

    def found() -> Iterator[Found]:
        for number in range(100):
            drawn.append(number)
            yield Found(batch(f"i{number}"))

    listing(output, 3).take(found())
    assert len(drawn) == 3


def test_what_is_ignored_is_counted(output: Folder) -> None:
    taken = listing(output)
    taken.take([Found(batch("a"), ignored=3), Found(batch(), ignored=4)])
    assert (taken.counts.listed, taken.counts.ignored) == (1, 7)


def test_an_empty_listing_has_no_page_and_nothing_pending(output: Folder) -> None:
    taken = listing(output)
    taken.take([])
    assert (taken.counts.listed, taken.todo().pending.tolist(), uris(output)) == (0, [], [])
    assert taken.todo().pending.dtype == np.bool_


def test_a_dry_listing_writes_nothing(output: Folder) -> None:
    taken = Listing(Ledger(output, {}).open(), None, NONE)
    taken.take([Found(batch("a", "b"))])
    assert taken.counts.listed == 2
    assert output.names() == []


def test_sizes_that_are_not_known_count_as_nothing(output: Folder) -> None:
    taken = listing(output)
    taken.take([Found(batch("a", size=None)), Found(batch("b", size=7))])
    assert taken.counts.bytes == 7
    assert [row["size"] for page in pages(output.folder("listing")) for row in page.to_pylist()] == [None, 7]


def test_a_page_that_is_missing_is_an_error_not_a_shorter_listing(output: Folder) -> None:
    listing(output).take([Found(batch(*names(PAGE_ROWS + 1)))])
    output.delete(f"listing/{page_name(0)}")
    with pytest.raises(Exception, match="page-000000"):
        list(pages(output.folder("listing")))


def test_batches_are_brought_to_the_columns_of_the_run() -> None:
    carried = pa.schema([("input_a", pa.int64()), ("input_b", pa.string())])
    found = batch("x").append_column("input_a", pa.array([3], pa.int16()))
    out = conform(found, carried)
    assert out.schema == with_carried(LISTING, carried)
    assert out.to_pylist()[0]["input_a"] == 3
    assert out.to_pylist()[0]["input_b"] is None


def test_carried_columns_stand_in_the_pages(output: Folder) -> None:
    carried = pa.schema([("input_a", pa.list_(pa.int8()))])
    found = conform(batch("x", "y").append_column("input_a", pa.array([[1], None], pa.list_(pa.int8()))), carried)
    listing(output, carried=carried).take([Found(found)])
    assert read_page(output.folder("listing"), 0)["input_a"].to_pylist() == [[1], None]

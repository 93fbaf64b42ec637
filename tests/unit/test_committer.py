"""What the driver makes of blocks that come late, twice or never."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import StoreError, Unreachable
from imgbatch.inference import messages
from imgbatch.ledger.listing_pages import page_name
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.pipeline.arrivals import Arrivals
from imgbatch.pipeline.committer import Committer
from imgbatch.pipeline.run_statistics import RunStatistics
from imgbatch.pipeline.store_health import MAX_FAILED_READS, StoreHealth
from imgbatch.schema import LISTING, RESULTS
from imgbatch.storage.stores import Folder, Stores


class Memory:
    """A ledger that keeps what is committed, and fails if told to."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []
        self.tables: list[pa.Table] = []
        self.fails = False

    def commit(self, rows: pa.Table, run_id: str, model: str, shards: Any = None) -> int:
        if self.fails:
            raise StoreError("the disk is full")
        self.commits.append(rows["uri"].to_pylist())
        self.tables.append(rows)
        return len(rows)


def committer(
    count: int = 100,
    ledger: Memory | None = None,
    *,
    commit_s: float = 10.0,
    clock: Callable[[], float] = lambda: 0.0,
    reachable: bool = True,
) -> Committer:
    """Return a committer for that many pending images, with a clock that stands still."""
    work_plan = WorkPlan(np.ones(count, bool), np.zeros((0, 2), np.int64), {})
    memory = cast(Any, ledger or Memory())
    parts = Arrivals(work_plan), RunStatistics(clock), StoreHealth(lambda: reachable)
    return Committer(memory, "run", "model", *parts, commit_s, clock)


def block(*numbers: int, **columns: Any) -> pa.Table:
    """Return result rows of these images, with the same values in all."""
    rows = [{"index": number, "uri": f"u{number}", **columns} for number in numbers]
    return pa.Table.from_pylist(rows, schema=RESULTS)


def failing(reason: str = "unreachable", stage: str = "fetch") -> dict[str, Any]:
    """Return the columns of a reject."""
    return {"stage": stage, "reason": reason, "message": f"{reason}!", "passing": True, "attempts": 1}


def test_a_second_arrival_is_dropped() -> None:
    ledger = Memory()
    with committer(10, ledger) as taken:
        taken.take(block(1, 2, 3, label="cat"))
        taken.take(block(3, 4, label="dog"))
        taken.take(block(3, label="dog"))
        taken.commit()
        taken.take(block(2, 5))
        assert (taken.statistics.labelled, taken.statistics.rejected, taken.arrived) == (5, 0, 5)
    assert ledger.commits == [["u1", "u2", "u3", "u4"], ["u5"]]
    assert np.flatnonzero(taken.work_plan.pending).tolist() == [0, 6, 7, 8, 9]


def test_what_is_not_pending_is_not_taken() -> None:
    ledger = Memory()
    taken = committer(3, ledger)
    taken.work_plan.mark_arrived([1])
    with taken:
        taken.take(block(0, 1, 2))
    assert ledger.commits == [["u0", "u2"]]


def test_commits_come_when_it_is_time_and_never_empty() -> None:
    now, ledger = 0.0, Memory()
    taken = committer(ledger=ledger, clock=lambda: now)
    now = 50.0
    assert not taken.due
    taken.take(block(1))
    assert taken.due
    taken.commit()
    taken.take(block(2))
    now = 59.0
    assert not taken.due
    now = 60.0
    assert taken.due
    taken.commit()
    taken.commit()
    assert ledger.commits == [["u1"], ["u2"]]


def test_on_the_way_out_what_waits_is_committed() -> None:
    ledger = Memory()
    with pytest.raises(ZeroDivisionError), committer(ledger=ledger) as taken:
        taken.take(block(7))
        raise ZeroDivisionError
    assert ledger.commits == [["u7"]]


def test_the_first_error_is_the_one_to_tell() -> None:
    ledger = Memory()
    ledger.fails = True
    with pytest.raises(ZeroDivisionError), committer(ledger=ledger) as taken:
        taken.take(block(7))
        raise ZeroDivisionError
    with pytest.raises(StoreError, match="disk is full"), committer(ledger=ledger) as taken:
        taken.take(block(7))


def test_rejects_are_counted_by_reason() -> None:
    taken = committer()
    taken.take(pa.concat_tables([block(0), block(1, 2, **failing("empty", "decode")), block(3, **failing("vanished"))]))
    found = taken.statistics
    assert (found.labelled, found.rejected, dict(found.reasons)) == (1, 3, {"empty": 2, "vanished": 1})
    assert {reason: uri for reason, (uri, _) in found.examples.items()} == {"empty": "u1", "vanished": "u3"}


def chunks(numbers: range, size: int) -> Iterator[tuple[int, ...]]:
    """Yield the numbers in tuples of a size."""
    for start in range(numbers.start, numbers.stop, size):
        yield tuple(range(start, min(start + size, numbers.stop)))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_store_that_is_away_is_told_from_bad_objects(size: int) -> None:
    taken = committer(200)
    for numbers in chunks(range(MAX_FAILED_READS - 1), size):
        taken.take(block(*numbers, **failing()))
    taken.take(block(100))
    for numbers in chunks(range(MAX_FAILED_READS, 2 * MAX_FAILED_READS - 1), size):
        taken.take(block(*numbers, **failing()))
    with pytest.raises(Unreachable, match=r"20 objects in a row .* unreachable!"):
        taken.take(block(101, **failing()))


@pytest.mark.parametrize(("reason", "stage"), [("vanished", "fetch"), ("corrupt", "decode"), ("timeout", "decode")])
def test_what_is_the_objects_own_fault_never_ends_a_run(reason: str, stage: str) -> None:
    committer().take(block(*range(50), **failing(reason, stage)))


def test_a_forbidden_folder_is_not_a_store_that_is_away() -> None:
    committer(reachable=True).take(block(*range(50), **failing("forbidden")))
    with pytest.raises(Unreachable):
        committer(reachable=False).take(block(*range(50), **failing("forbidden")))
    mixed = pa.concat_tables([block(*range(15), **failing("forbidden")), block(*range(15, 30), **failing("timeout"))])
    with pytest.raises(Unreachable):
        committer(reachable=True).take(mixed)


@pytest.mark.parametrize("carried", [{}, {"input_split": "train"}])
def test_what_never_came_is_a_reject_beside_rows_that_did(tmp_path: Path, carried: dict[str, str]) -> None:
    rows = [{"uri": f"u{number}", "size": number, "etag": None, "last_modified": None} for number in range(4)]
    listed = pa.Table.from_pylist(rows, schema=LISTING)
    for name, value in carried.items():
        listed = listed.append_column(name, pa.repeat(value, 4))
    sink = io.BytesIO()
    pq.write_table(listed, sink)
    listing = Folder(Stores(StorageConfig(), {}), str(tmp_path))
    listing.put(page_name(0), sink.getvalue())
    ledger = Memory()
    with committer(4, ledger) as taken:
        arrived = block(0, 2)
        for name, value in carried.items():
            arrived = arrived.append_column(name, pa.repeat(value, 2))
        taken.take(arrived)
        taken.reject_lost(listing, tries=2)
    (table,) = ledger.tables
    found = {row["uri"]: row for row in table.to_pylist()}
    assert found.keys() == {"u0", "u1", "u2", "u3"} and found["u0"]["reason"] is None
    assert (found["u3"]["stage"], found["u3"]["reason"], found["u3"]["attempts"]) == ("decode", "crashed", 2)
    assert found["u3"]["size"] == 3 and found["u3"]["passing"] is True
    assert found["u3"].items() >= carried.items()
    assert (taken.statistics.labelled, taken.statistics.rejected) == (2, 2) and not taken.work_plan.pending.any()
    taken.reject_lost(Folder(listing.stores, str(tmp_path / "not-read-when-nothing-is-left")), tries=2)


def test_what_workers_say_of_their_nodes_is_kept_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with committer(10) as taken:
        told = {"host": "b", "why": "its logits differ"}
        for note in (
            {"node_faults": {"a": "made again"}},
            {"node_faults": {"a": "made again"}},
            {"left_out": {"id": told}},
        ):
            taken.take(messages.events_alone(messages.note({"device": "cpu", **note})))
        assert taken.left_out == {"id": told}
        assert taken.statistics.report()["node_faults"] == {
            "a": "made again",
            "b": "its logits differ: the node is left out",
        }
    assert [record.getMessage() for record in caplog.records] == [
        "node a: made again",
        "node b: its logits differ: the node is left out",
    ]

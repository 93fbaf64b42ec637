"""The record of a run, and who owns an output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from imgbatch import runs
from imgbatch.config import StorageConfig
from imgbatch.errors import Exists, OutputError
from imgbatch.storage import Folder, Stores


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    """An empty output."""
    return Folder(Stores(StorageConfig(), {}), str(tmp_path))


def read(record: runs.Record) -> dict[str, Any]:
    """Return what the store has of a record."""
    found: dict[str, Any] = json.loads(record.folder.read("run.json"))
    return found


def owned_by(output: Folder, name: str, **owner: Any) -> runs.Record:
    """Write the record of a running run with another owner than this process."""
    record = runs.Record(output, {}, id=name)
    record.start()
    record.facts["owner"] |= owner
    record.beat()
    record.finish("running", 0)
    return record


def test_a_record_from_start_to_end(output: Folder) -> None:
    record = runs.Record(output, {"config": {"top_k": 5}})
    record.start()
    said = read(record)
    assert (said["status"], said["exit_code"], said["config"]) == ("running", None, {"top_k": 5})
    assert said["owner"]["pid"] == os.getpid() and said["versions"]["python"] and said["hardware"]["host"]
    record.beat(counts={"listed": 1})
    assert read(record) == said, "it is not time yet"
    record._beaten -= runs.HEARTBEAT_S
    record.beat(counts={"listed": 1})
    assert read(record)["counts"] == {"listed": 1} and read(record)["heartbeat"] == said["heartbeat"] + 1
    record.finish("failed", 3, error="away")
    assert (read(record)["status"], read(record)["exit_code"], read(record)["error"]) == ("failed", 3, "away")


def test_a_record_of_a_run_that_is_given_up(output: Folder) -> None:
    record = runs.Record(output, {})
    record.start()
    record.facts["counts"] = {"listed": 1}
    record.give_up(15)
    said = read(record)
    assert (said["status"], said["exit_code"], said["counts"]) == ("interrupted", 143, {"listed": 1})
    record.finish("failed", 3)
    record.give_up(15)
    assert read(record)["status"] == "failed", "its last word was said"


def test_an_output_is_free_when_nobody_runs(output: Folder) -> None:
    runs.require_free(output, sleep=pytest.fail)
    record = runs.Record(output, {})
    record.start()
    record.finish("succeeded", 0)
    runs.require_free(output, sleep=pytest.fail)


def test_a_live_owner_here_is_refused_at_once(output: Folder) -> None:
    record = runs.Record(output, {})
    record.start()
    with pytest.raises(OutputError, match=f"{record.id} .*process {os.getpid()}"):
        runs.require_free(output, sleep=pytest.fail)


def test_a_dead_owner_here_is_known_at_once(output: Folder) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    owned_by(output, "20260101T000000Z-aaaaaa", pid=child.pid, born=1)
    owned_by(output, "20260101T000001Z-bbbbbb", pid=os.getpid(), born=1)  # the number was used again
    runs.require_free(output, sleep=pytest.fail)


@pytest.mark.parametrize("owner", [{"host": "elsewhere"}, {"boot": "another"}, {"processes": "of another container"}])
def test_an_owner_elsewhere_is_dead_when_its_heart_stands_still(output: Folder, owner: dict[str, str]) -> None:
    record = owned_by(output, "20260101T000000Z-aaaaaa", **owner)
    slept: list[float] = []
    runs.require_free(output, sleep=slept.append)
    assert sum(slept) >= runs.OWNER_IS_DEAD_S > 2 * runs.HEARTBEAT_S

    def beat(_: float) -> None:
        record._write()

    with pytest.raises(OutputError, match="host"):
        runs.require_free(output, sleep=beat)


def test_an_owner_elsewhere_that_ends_in_the_meantime_is_gone(output: Folder) -> None:
    record = owned_by(output, "20260101T000000Z-aaaaaa", host="elsewhere")
    runs.require_free(output, sleep=lambda _: record.finish("succeeded", 0))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_damaged_records_stop_nobody(output: Folder, content: bytes) -> None:
    output.put("runs/20260101T000000Z-aaaaaa/run.json", content)
    runs.require_free(output, sleep=pytest.fail)
    output.put("_SUCCESS", content)
    assert runs.read_success(output) == {}


def test_the_late_success_of_a_dead_run_does_not_take_the_place_of_a_newer_one(output: Folder) -> None:
    class Late(Stores):
        def call(self, operation: str, uri: str, action: Any) -> Any:
            if operation == "read":
                return super().call(operation, uri, action)
            late.append(lambda: super(Late, self).call(operation, uri, action))
            raise KeyboardInterrupt

    late: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        runs.write_success(Folder(Late(StorageConfig(), {}), output.uri), "dead", {}, None, "dead")
    runs.write_success(output, "alive", {"listed": 1}, None, "alive")
    with pytest.raises(Exists):
        late[0]()
    assert runs.read_success(output)["run_id"] == "alive"  # type: ignore[index]
    runs.write_success(output, "next", {"listed": 2}, None, "alive")
    assert runs.read_success(output)["run_id"] == "next"  # type: ignore[index]


def test_success_comes_back_as_it_was_written(output: Folder) -> None:
    assert runs.read_success(output) is None
    runs.write_success(output, "r1", {"listed": 3}, None, "r0")
    assert runs.read_success(output) == {"run_id": "r1", "counts": {"listed": 3}, "limit": None, "seal": "r0"}


def test_run_ids_sort_in_the_order_of_the_runs_whatever_the_clocks_say(output: Folder) -> None:
    output.put("runs/29990101T000000Z-ffffff/run.json", b"{}")  # by a machine whose clock is ahead
    ids = []
    for _ in range(3):
        record = runs.Record(output, {})
        record.start()
        ids.append(record.id)
    assert [name[:16] for name in ids] == ["29990101T000001Z", "29990101T000002Z", "29990101T000003Z"]
    with pytest.raises(OutputError, match="is being written"):  # looked for among the newest names
        runs.require_free(output, sleep=pytest.fail)
    assert runs.new_run_id("not-a-time")[:2] == "20" and runs.new_run_id("99991231T235959Z-000000")


class Clock:
    """A clock that jumps: `datetime.now` of this machine."""

    def __init__(self, *moments: datetime) -> None:
        self._moments = list(moments)

    def now(self, zone: Any) -> datetime:
        return self._moments.pop(0) if len(self._moments) > 1 else self._moments[0]

    strptime = staticmethod(datetime.strptime)


def test_nothing_but_names_depends_on_the_clock(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    past, future = datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(runs, "datetime", Clock(future, future, past))
    first = owned_by(output, "", host="elsewhere")
    assert first.id.startswith("2100")
    second = runs.Record(output, {})
    second.start()
    assert second.id > first.id, "the clock was put back by 130 years in between"
    second.finish("succeeded", 0)

    def beat(_: float) -> None:
        first._write()

    with pytest.raises(OutputError, match="elsewhere"):
        runs.require_free(output, sleep=beat)
    runs.require_free(output, sleep=lambda _: None)  # its heart stands still: dead, by the counter alone


def test_run_ids_sort_by_time_and_differ() -> None:
    made = [runs.new_run_id() for _ in range(100)]
    assert len(set(made)) == 100
    assert [name[:16] for name in made] == sorted(name[:16] for name in made)

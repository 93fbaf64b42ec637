"""The record of a run, and who owns an output."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import Conflict, Exists, OutputChangedError
from imgbatch.ledger import run_record
from imgbatch.ledger.success_marker import SuccessMarker, read_success
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal import console


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    """An empty output."""
    return Folder(Stores(StorageConfig(), {}), str(tmp_path))


def read(record: run_record.Record) -> dict[str, Any]:
    """Return a record from the store."""
    found: dict[str, Any] = json.loads(record.folder.read("run.json"))
    return found


def test_a_record_from_start_to_end(output: Folder) -> None:
    record = run_record.Record(output, {"config": {"top_k": 5}})
    record.start()
    said = read(record)
    assert (said["status"], said["exit_code"], said["config"]) == ("running", None, {"top_k": 5})
    assert said["owner"]["pid"] == os.getpid() and said["versions"]["python"] and said["hardware"]["host"]
    record.live_facts = lambda: {"counts": {"listed": 1}}
    record.beat()
    assert read(record) == said, "it is not time yet"
    record._written -= run_record.HEARTBEAT_S
    record.beat()
    assert read(record)["counts"] == {"listed": 1} and read(record)["heartbeat"] == said["heartbeat"] + 1
    record.finish("failed", 3, error="away")
    assert (read(record)["status"], read(record)["exit_code"], read(record)["error"]) == ("failed", 3, "away")


def test_stages_have_their_seconds(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(run_record.time, "monotonic", lambda: now)
    record = run_record.Record(output, {})
    record.start()
    assert "stages" not in read(record)
    for stage, seconds in (("listing", 2.0), ("labelling", 3.0), ("labelling", 4.0)):
        record.enter(stage)
        now += seconds
    record.beat()
    assert (read(record)["stage"], read(record)["stages"]) == ("labelling", {"listing": 2.0, "labelling": 7.0})
    now += 1.0
    record.enter("auditing")
    record.finish("succeeded", 0)
    assert read(record)["stages"] == {"listing": 2.0, "labelling": 8.0, "auditing": 0.0}


def test_each_version_is_passed_on_and_a_failing_call_does_not_end_the_run(
    output: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[int, str]] = []
    with (
        run_record.on_write(lambda facts: 1 / 0),
        run_record.on_write(lambda facts: seen.append((facts["heartbeat"], facts["status"]))),
    ):
        record = run_record.Record(output, {})
        record.start()
        record.finish("failed", 3)
    assert seen == [(1, "running"), (2, "failed")]
    assert [each.getMessage() for each in caplog.records] == ["the state of the run could not be reported"] * 2
    run_record.Record(output, {}).start()
    assert len(seen) == 2, "the block has ended"


def test_the_record_has_the_step_that_the_terminal_shows(output: Folder) -> None:
    console.step("labelling")
    console.show("5/10 images", 5, 10)
    record = run_record.Record(output, {})
    record.start()
    step = read(record)["step"]
    assert (step["name"], step["text"], step["done"], step["total"]) == ("labelling", "5/10 images", 5, 10)
    record.finish("succeeded", 0)
    assert read(record)["step"] is None
    console.close()
    assert console.current_step() is None


def test_the_record_of_an_interrupted_run(output: Folder) -> None:
    record = run_record.Record(output, {})
    record.start()
    record.facts["counts"] = {"listed": 1}
    record.record_interrupt(15)
    said = read(record)
    assert (said["status"], said["exit_code"], said["counts"]) == ("interrupted", 143, {"listed": 1})
    record.finish("failed", 3)
    record.record_interrupt(15)
    assert read(record)["status"] == "failed", "its last word was said"


def success_of(output: Folder) -> SuccessMarker:
    """Return the current `_SUCCESS`."""
    success = SuccessMarker(output)
    success.refresh()
    return success


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_damaged_success_exists_with_empty_content(output: Folder, content: bytes) -> None:
    output.put("_SUCCESS", content)
    assert read_success(output) == {} == success_of(output).content


class Late(Stores):
    """Stores whose writes are sent only by `arrive`; their process is killed before that."""

    def __init__(self) -> None:
        super().__init__(StorageConfig(), {})
        self.late: list[Any] = []

    def call(self, operation: str, uri: str, action: Any) -> Any:
        if operation == "read":
            return super().call(operation, uri, action)
        self.late.append(lambda: super(Late, self).call(operation, uri, action))
        raise KeyboardInterrupt


def test_a_late_success_of_a_dead_run_replaces_no_newer_one(output: Folder) -> None:
    dead = Late()
    with pytest.raises(KeyboardInterrupt):
        success_of(Folder(dead, output.uri)).write("dead", {}, None, "dead")
    success_of(output).write("alive", {"listed": 1}, None, "alive")
    with pytest.raises(Exists):
        dead.late[0]()
    assert read_success(output)["run_id"] == "alive"  # type: ignore[index]
    success_of(output).write("next", {"listed": 2}, None, "alive")
    assert read_success(output)["run_id"] == "next"  # type: ignore[index]


def test_a_late_delete_of_a_dead_run_removes_no_newer_success(output: Folder) -> None:
    success_of(output).write("first", {}, None, "first")
    dead = Late()
    with pytest.raises(KeyboardInterrupt):
        success_of(Folder(dead, output.uri)).withdraw()
    success_of(output).withdraw()
    success_of(output).write("alive", {}, None, "alive")
    with pytest.raises(Conflict):
        dead.late[0]()
    assert read_success(output)["run_id"] == "alive"  # type: ignore[index]


def test_a_success_of_another_run_is_neither_replaced_nor_removed(output: Folder) -> None:
    absent = success_of(output)
    success_of(output).write("first", {}, None, "first")
    seen = success_of(output)
    with pytest.raises(
        OutputChangedError, match="_SUCCESS was changed by another run while this run counted"
    ) as caught:
        absent.write("paused", {}, None, "paused")
    assert caught.value.exit_code == 3
    absent.withdraw()  # it saw none
    success_of(output).write("second", {}, None, "first")
    for act in (lambda: seen.write("paused", {}, None, "paused"), seen.withdraw):
        with pytest.raises(OutputChangedError):
            act()
    assert success_of(output).content == {"run_id": "second", "counts": {}, "limit": None, "seal": "first"}
    success_of(output).withdraw()
    with pytest.raises(OutputChangedError):  # a run with work has taken it away
        seen.write("paused", {}, None, "paused")
    assert read_success(output) is None


@pytest.mark.parametrize("there", [False, True])
def test_our_success_is_recognised_after_a_lost_response(output: Folder, there: bool) -> None:
    class Lossy(Stores):
        def call(self, operation: str, uri: str, action: Any) -> Any:
            if operation in ("create", "replace"):
                super().call(operation, uri, action)
            return super().call(operation, uri, action)

    if there:
        success_of(output).write("first", {}, None, "first")
    success_of(Folder(Lossy(StorageConfig(), {}), output.uri)).write("ours", {}, None, "ours")
    assert read_success(output)["run_id"] == "ours"  # type: ignore[index]


def test_success_is_read_as_it_was_written(output: Folder) -> None:
    assert read_success(output) is None
    success_of(output).write("r1", {"listed": 3}, None, "r0")
    assert read_success(output) == {"run_id": "r1", "counts": {"listed": 3}, "limit": None, "seal": "r0"}


def test_run_ids_sort_in_the_order_of_the_runs_with_wrong_clocks(output: Folder) -> None:
    output.put("runs/29990101T000000Z-ffffff/run.json", b"{}")  # by a machine whose clock is ahead
    ids = []
    for _ in range(3):
        record = run_record.Record(output, {})
        record.start()
        ids.append(record.id)
    assert [name[:16] for name in ids] == ["29990101T000001Z", "29990101T000002Z", "29990101T000003Z"]
    assert run_record.new_run_id("not-a-time")[:2] == "20" and run_record.new_run_id("99991231T235959Z-000000")


def test_run_ids_sort_by_time_and_differ() -> None:
    made = [run_record.new_run_id() for _ in range(100)]
    assert len(set(made)) == 100
    assert [name[:16] for name in made] == sorted(name[:16] for name in made)

"""`imgbatch status`: the state of a run from its record, and its text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from imgbatch.commands import status as command
from imgbatch.config.sections import StorageConfig
from imgbatch.errors import InputError
from imgbatch.ledger import owners, run_record
from imgbatch.orchestration import status
from imgbatch.orchestration.status_text import as_line, as_lines, images
from imgbatch.storage.stores import Folder, Stores
from tests.unit.screen import InTerminal

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"host": "another", "boot": "b", "processes": "p", "pid": 1, "born": 1}
FACTS: dict[str, Any] = {
    "run_id": "20261129T030000Z-aaaaaa", "status": "running", "exit_code": None, "stage": "labelling", "heartbeat": 7,
    "started": "2026-11-29T03:00:00+00:00", "written": "2026-11-29T03:02:30+00:00",
    "counts": {"listed": 3020, "already_done": 20}, "rejects": {"truncated": 1, "empty": 2}, "bottleneck": "classify",
    "progress": {
        "done": 1508, "total": 3000, "rate": 96.2, "seconds_left": 15.5, "committed": 1400,
        "last_commit": "2026-11-29T03:02:26+00:00",
    },
    "seconds": {"fetch": 12.0, "decode": 31.0, "classify": 57.0, "commit": 0.4}, "stages": {"listing": 3.2, "labelling": 120.0},
    "owner": ELSEWHERE, "model": {"reference": "tiny@0123"},
}  # fmt: skip


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    """An empty output."""
    return Folder(Stores(StorageConfig(), {}), str(tmp_path))


def write(output: Folder, run_id: str = FACTS["run_id"], place: str = "", **facts: Any) -> None:
    """Write the record of a run."""
    output.put(f"{place}runs/{run_id}/run.json", json.dumps({**FACTS, "run_id": run_id, **facts}).encode())


def at(seconds: float) -> Callable[[], datetime]:
    """Return a clock that is ahead of that of the store."""
    return lambda: datetime.now(UTC) + timedelta(seconds=seconds)


def forbidden(seconds: float) -> None:
    """Fail: nothing has to be waited for."""
    raise AssertionError(seconds)


def test_the_newest_run_is_found_wherever_it_is(output: Folder) -> None:
    with pytest.raises(InputError, match=r"no run found at .*: it has no runs/ with a run\.json\. Give the --output"):
        status.find(output)
    output.put("training.json", json.dumps({"status": "succeeded", "exit_code": 0, "run_id": "x"}).encode())
    trained = status.find(output)
    assert (trained.name, trained.run_id) == ("training.json", "") and trained.read().ended
    for run_id, place in (
        ("20260101T000000Z-a", ""),
        ("20260102T000000Z-b", "_training/"),
        ("20260103T000000Z-c", "against/"),
    ):
        write(output, run_id, place)
        found = status.find(output)
        assert (found.run_id, found.name) == (run_id, f"{place}runs/{run_id}/run.json")
    write(output, "20260104T000000Z-d")
    assert status.find(output).run_id == "20260104T000000Z-d"


def test_a_recent_record_is_that_of_a_running_run(output: Folder) -> None:
    write(output)
    state = status.look(status.find(output), sleep=forbidden)
    assert (state.state, state.exit_code) == ("running", 0)
    assert state.age_s is not None and 0 <= state.age_s < 25


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_an_old_record_is_watched_before_its_run_counts_as_lost(output: Folder, ahead: float) -> None:
    write(output)
    waited: list[float] = []
    state = status.look(status.find(output), sleep=waited.append, now=at(ahead))
    assert (state.state, state.exit_code) == ("lost", 3) and sum(waited) >= run_record.OWNER_IS_DEAD_S
    assert state.age_s == sum(waited), "no clock of another machine is in it"

    def beat(seconds: float) -> None:
        write(output, heartbeat=8)

    state = status.look(status.find(output), sleep=beat, now=at(ahead))
    assert (state.state, state.exit_code) == ("running", 0), "only the clocks differ"
    state = status.look(status.find(output), sleep=lambda _: write(output, status="failed", exit_code=4), now=at(ahead))
    assert (state.state, state.exit_code) == ("failed", 4)


def test_a_process_on_this_machine_is_asked_itself(output: Folder) -> None:
    write(output, owner=owners.this_process())
    assert status.look(status.find(output), sleep=forbidden, now=at(3600)).state == "running"
    write(output, owner={**owners.this_process(), "born": 1})
    state = status.look(status.find(output), sleep=forbidden)
    assert (state.state, state.exit_code, state.age_of) == ("lost", 3, "its process has ended")


@pytest.mark.parametrize(("name", "code"), [("succeeded", 0), ("failed", 6), ("interrupted", 143)])
def test_the_exit_code_is_that_of_a_run_that_has_ended(output: Folder, name: str, code: int) -> None:
    write(output, status=name, exit_code=code)
    state = status.look(status.find(output), sleep=forbidden, now=at(1e6))
    assert (state.state, state.exit_code, state.age_s) == (name, code, None)


class Time:
    """A clock that sleeping advances, and what happens meanwhile."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.now, self.events = 0.0, list(events)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.events:
            self.events.pop(0)()


def test_watching_compares_no_clocks_and_ends_with_the_run(output: Folder) -> None:
    write(output)
    time = Time(
        lambda: None, lambda: write(output, heartbeat=8), lambda: write(output, status="succeeded", exit_code=0, heartbeat=9)
    )  # fmt: skip
    states = list(status.watch(status.find(output), 2.0, sleep=time.sleep, now=lambda: time.now))
    assert [(state.state, state.age_s) for state in states] == [
        ("running", 0.0), ("running", 2.0), ("running", 0.0), ("succeeded", None),
    ]  # fmt: skip


def test_watching_a_run_that_is_lost_ends_unless_another_one_follows(output: Folder) -> None:
    write(output)
    time = Time()
    states = list(status.watch(status.find(output), 2.0, sleep=time.sleep, now=lambda: time.now))
    assert states[-1].state == "lost" and states[-1].exit_code == 3 and time.now >= run_record.OWNER_IS_DEAD_S
    assert all(state.state == "running" for state in states[:-1])

    time = Time(lambda: write(output, "20261130T000000Z-b", status="failed", exit_code=2))
    states = list(status.watch(status.find(output), 2.0, sleep=time.sleep, now=lambda: time.now))
    assert (states[-1].facts["run_id"], states[-1].exit_code) == ("20261130T000000Z-b", 2)


def test_a_deleted_record_is_reported(output: Folder) -> None:
    write(output)
    found = status.find(output)
    output.delete(found.name)
    with pytest.raises(InputError, match="is gone: the run, or its output, was deleted"):
        status.look(found)


def test_the_text_of_a_running_run() -> None:
    assert list(as_lines(FACTS, "running", 0, "s3://out/labels", 2.0, "by a clock")) == [
        "run         20261129T030000Z-aaaaaa is running, labelling, 2:32 since its start",
        "output      s3://out/labels",
        "images      1,508 of 3,000 (50 %), 96/s, about 0:15 left; 20 more were done before",
        "rejects     3: 2 empty, 1 truncated",
        "work        fetch 12 %, decode 31 %, classify 57 % of 1:40 of work; commits 0.4 s; bottleneck: classify",
        "time        listing 0:03, labelling 2:00",
        "commits     1,400 rows of this run in the tables, the last of them 4 s before the last heartbeat",
        "heartbeat   2 s ago (by a clock)",
    ]
    assert (
        as_line(FACTS, 1.0)
        == "labelling: 1,508 of 3,000 (50 %), 96/s, about 0:15 left; 20 more were done before, 3 rejects"
    )
    assert as_line(FACTS, 70.0).endswith("; no heartbeat for 1:10")
    first = {"step": {"name": "checking that no other run writes the output", "text": ""}}
    assert as_line(first, 1.0) == "checking that no other run writes the output"


def test_the_text_of_a_run_that_failed_or_is_lost() -> None:
    ended = {
        **FACTS, "status": "failed", "exit_code": 4, "finished": "2026-11-29T04:00:00+00:00", "error": "too many rejects",
        "counts": {"listed": 3020, "labelled": 2000, "rejected": 1020, "already_done": 20, "kept": 1},
        "images_per_second": 90.0,
    }  # fmt: skip
    lines = list(as_lines(ended, "failed", 4, "out", None, ""))
    assert lines[0] == "run         20261129T030000Z-aaaaaa failed while labelling, exit code 4, 1:00:00"
    assert "images      3,020 listed, 2,000 labelled, 1,020 rejected, 20 already done, 1 kept; 90/s" in lines
    assert lines[-2:] == ["error       too many rejects", "to do       look at the reasons in rejects/"]
    lost = list(as_lines(FACTS, "lost", 3, "out", 26.0, "watched for that long"))
    assert lost[0] == (
        "run         20261129T030000Z-aaaaaa is lost while labelling: its heartbeat stopped, and no end is recorded"
    )
    assert lost[-1].startswith("to do       look for its process")


def test_records_that_lack_facts_have_a_text() -> None:
    """Of version 0.1, of a run that has just started, of a training, or damaged."""
    assert list(as_lines({}, "running", 0, "out", None, "")) == ["run         ? is running", "output      out"]
    assert images({"progress": {"done": 5, "total": None}}) == "5"
    assert images({"progress": {"done": 0, "total": 0}}) == "0 of 0"
    training = {"stage": "training", "step": {"name": "training", "text": "epoch 3/10", "seconds": 9.0}}
    assert list(as_lines(training, "running", 0, "out", 1.0, ""))[2:] == [
        "step        training: epoch 3/10",
        "heartbeat   1 s ago",
    ]
    assert as_line(training, 1.0) == "training: epoch 3/10"
    starting = {"stage": "starting", "step": {"name": "starting Ray on this machine", "text": "", "seconds": 9.0}}
    assert "step        starting Ray on this machine (0:09)" in as_lines(starting, "running", 0, "out", None, "")
    text = "\n".join(
        as_lines({**FACTS, "seconds": 12.5, "rejects": 3}, "succeeded", 0, "https://me:secret@host/out", None, "")
    )
    assert "work " not in text and "secret" not in text


def ended(output: Folder, *flags: str) -> int:
    """Run the command; return its exit code."""
    return command.main([output.uri, *flags])


def test_the_command_prints_one_object(output: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    write(output, owner=owners.this_process())
    assert ended(output, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["exit_code"], found["retry"], found["stage"]) == ("running", None, None, "labelling")
    assert found["progress"]["done"] == 1508 and found["heartbeat"]["count"] == 7 and found["model"] == "tiny@0123"
    write(output, status="failed", exit_code=3, error="away")
    assert ended(output, "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["exit_code"], found["retry"], found["error"]) == ("failed", 3, True, "away")


def test_the_command_without_a_run_ends_with_2(output: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ((), ("--watch",), ("--json",)):
        assert ended(output, *flags) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith(f"error: no run found at {output.uri}: ")


def test_watching_prints_a_line_per_change_into_a_pipe(output: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    write(output)
    found = status.find(output)
    states = [
        status.Status(FACTS, "running", 0.0),
        status.Status(FACTS, "running", 2.0),
        status.Status({**FACTS, "heartbeat": 8}, "running", 0.0),
        status.Status({**FACTS, "heartbeat": 9, "stage": "auditing"}, "running", 0.0),
        status.Status({**FACTS, "heartbeat": 10, "status": "failed", "exit_code": 6}, "failed", None),
    ]
    assert command.show_changes(found, states, json_lines=False) == 6
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[2] for line in lines[:2]] == [
        as_line(state.facts, 0.0) for state in (states[0], states[3])
    ]
    assert lines[2] == "run         20261129T030000Z-aaaaaa failed while labelling, exit code 6"
    assert command.show_changes(found, states, json_lines=True) == 6
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [state["heartbeat"]["count"] for state in shown] == [7, 8, 9, 10]
    assert [state["state"] for state in shown] == ["running"] * 3 + ["failed"]


def test_watching_in_a_terminal_draws_in_place(output: Folder) -> None:
    write(output, owner=owners.this_process())
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    job = InTerminal(["jobs/status.py", output.uri, "--watch"], 120, environment, ROOT)
    assert job.read(lambda: "━" in job.raw) is None, job.raw
    write(output, owner=owners.this_process(), status="failed", exit_code=4, error="too many rejects")
    assert job.read() == 4, job.raw
    assert any("labelling" in line for line in job.screen.seen)
    lines = job.screen.lines
    assert lines[0].startswith("run         20261129T030000Z-aaaaaa failed while labelling, exit code 4")
    assert not any("━" in line for line in lines) and sum("run  " in line for line in lines) == 1
    assert "\x1b[?25l" not in job.raw, "a process that is killed cannot show the cursor again"

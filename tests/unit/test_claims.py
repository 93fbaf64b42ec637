"""The claim of an output: which of several runs may write there, and when an owner is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from imgbatch.concurrency.monitor import on_tick
from imgbatch.config.sections import StorageConfig
from imgbatch.errors import Conflict, OutputBusyError, OutputChangedError
from imgbatch.ledger import claims, owners, run_record
from imgbatch.storage.stores import Folder, Stores
from tests.conftest import S3Server


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty output."""
    if request.param == "disk":
        return Folder(Stores(StorageConfig(), {}), str(tmp_path))
    server: S3Server = request.getfixturevalue("s3")
    return Folder(server.stores(), f"s3://out/claims/{tmp_path.name}")


def said(output: Folder) -> dict[str, Any]:
    """Return the claim from the store."""
    found: dict[str, Any] = json.loads(output.read(claims.NAME))
    return found


def claimed_by(output: Folder, monkeypatch: pytest.MonkeyPatch, **owner: Any) -> run_record.Record:
    """Claim the output, and start a run there, as another process; return its record."""
    with monkeypatch.context() as patch:
        whole = owners.this_process() | owner
        patch.setattr(owners, "this_process", lambda: whole)
        claim = claims.take(output, sleep=pytest.fail)
        record = run_record.Record(output, {}, claim.run_id, claim)
        record.start()
    return record


def without_claim(output: Folder, name: str, **owner: Any) -> run_record.Record:
    """Start a run as version 0.1 did, as another process; return its record."""
    record = run_record.Record(output, {}, name)
    record.start()
    record.facts["owner"] |= owner
    record.finish("running", 0)
    return record


def ended_process() -> int:
    """Return the PID of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def zombie() -> Iterator[subprocess.Popen[bytes]]:
    """A process that was killed and that its parent does not reap."""
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
    assert child.stdout is not None and child.stdout.readline()
    yield child
    child.kill()
    child.communicate()


def test_a_claim_from_start_to_end(output: Folder) -> None:
    with claims.take(output, sleep=pytest.fail) as claim:
        found = said(output)
        assert (found["run_id"], found["state"], found["owner"]["pid"]) == (claim.run_id, "active", os.getpid())
        assert found["owner"]["host"] and datetime.fromisoformat(found["started"]).tzinfo == UTC
        claim.require_ours()
    assert said(output)["state"] == "ended" and said(output)["run_id"] == claim.run_id
    with claims.take(output, sleep=pytest.fail) as second:
        assert second.run_id > claim.run_id
    with pytest.raises(KeyboardInterrupt), claims.take(output, sleep=pytest.fail):
        raise KeyboardInterrupt
    assert said(output)["state"] == "ended", "at every orderly exit"


def test_a_second_run_on_the_machine_of_a_live_owner_is_refused_at_once(output: Folder) -> None:
    with claims.take(output) as claim:
        with pytest.raises(OutputBusyError, match=f"{claim.run_id} .*process {os.getpid()}") as caught:
            claims.take(output, sleep=pytest.fail)
        assert caught.value.exit_code == 7
        assert said(output)["run_id"] == claim.run_id


@pytest.mark.parametrize("with_claim", [True, False])
def test_a_zombie_is_dead(
    output: Folder, monkeypatch: pytest.MonkeyPatch, zombie: subprocess.Popen[bytes], with_claim: bool
) -> None:
    owner = {"pid": zombie.pid, "born": owners._born(zombie.pid)}
    if with_claim:
        claimed_by(output, monkeypatch, **owner)
    else:
        without_claim(output, "20260101T000000Z-aaaaaa", **owner)
    with pytest.raises(OutputBusyError):
        claims.take(output, sleep=pytest.fail)
    zombie.kill()
    while "\nState:\tZ" not in Path(f"/proc/{zombie.pid}/status").read_text():
        time.sleep(0.01)
    claims.take(output, sleep=pytest.fail).require_ours()


@pytest.mark.parametrize("with_claim", [True, False])
def test_a_dead_owner_on_this_machine_is_detected_at_once(
    output: Folder, monkeypatch: pytest.MonkeyPatch, with_claim: bool
) -> None:
    for owner in ({"pid": ended_process()}, {"pid": os.getpid(), "born": 1}):  # the second PID was used again
        if with_claim:
            claimed_by(output, monkeypatch, **owner)
        else:
            without_claim(output, "20260101T000000Z-aaaaaa", **owner)
        claims.take(output, sleep=pytest.fail).release()


@pytest.mark.parametrize("with_claim", [True, False])
@pytest.mark.parametrize("owner", [{"host": "elsewhere"}, {"boot": "another"}, {"processes": "of another container"}])
def test_an_owner_on_another_machine_is_dead_without_a_heartbeat(
    output: Folder, monkeypatch: pytest.MonkeyPatch, owner: dict[str, str], with_claim: bool
) -> None:
    if with_claim:
        record = claimed_by(output, monkeypatch, **owner)
    else:
        record = without_claim(output, "20260101T000000Z-aaaaaa", **owner)

    def beat(_: float) -> None:
        record._write()

    with pytest.raises(OutputBusyError, match="host"):
        claims.take(output, sleep=beat)
    slept: list[float] = []
    taken = claims.take(output, sleep=slept.append)
    assert sum(slept) >= run_record.OWNER_IS_DEAD_S > 2 * run_record.HEARTBEAT_S
    assert said(output)["run_id"] == taken.run_id


def test_an_owner_on_another_machine_may_end_during_the_wait(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    record = claimed_by(output, monkeypatch, host="elsewhere")
    slept = []

    def end(seconds: float) -> None:
        slept.append(seconds)
        record.finish("succeeded", 0)
        assert record.claim is not None
        record.claim.release()

    claims.take(output, sleep=end)
    assert slept == [1.0]


def test_an_owner_whose_record_has_ended_holds_no_claim(output: Folder) -> None:
    claim = claims.take(output)
    record = run_record.Record(output, {}, claim.run_id, claim)
    record.start()
    record.finish("succeeded", 0)
    claims.take(output, sleep=pytest.fail)


def test_a_signal_ends_the_wait(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed_by(output, monkeypatch, host="elsewhere")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), on_tick(stop):
        claims.take(output, sleep=lambda _: None)


def test_the_second_of_two_takeovers_is_refused(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed_by(output, monkeypatch, host="elsewhere")
    others: list[run_record.Record] = []

    def other(_: float) -> None:
        if not others:  # it has waited for longer than we have
            with monkeypatch.context() as patch:
                patch.setattr(run_record, "OWNER_IS_DEAD_S", 0.0)
                others.append(claimed_by(output, monkeypatch, host="a third one"))

    with pytest.raises(OutputBusyError, match="host a third one"):
        claims.take(output, sleep=other)
    assert said(output)["run_id"] == others[0].id


@pytest.mark.parametrize("ended", [False, True])
def test_of_many_runs_that_start_at_once_one_continues(output: Folder, ended: bool) -> None:
    if ended:
        claims.take(output).release()
    taken: list[str] = []
    refused: list[OutputBusyError] = []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        try:
            taken.append(claims.take(output, sleep=pytest.fail).run_id)
        except OutputBusyError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7
    assert said(output)["run_id"] == taken[0]


def test_our_claim_is_recognised_after_a_lost_response(output: Folder) -> None:
    class Lossy(Stores):
        def call(self, operation: str, uri: str, action: Any) -> Any:
            if operation in ("create", "replace"):
                super().call(operation, uri, action)
            return super().call(operation, uri, action)

    lossy = Folder(Lossy(StorageConfig(), output.stores._environment), output.uri)
    for _ in range(2):
        claims.take(lossy, sleep=pytest.fail).release()
    assert said(output)["state"] == "ended"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"run_id": "r", "owner": 7}'])
def test_damaged_claims_and_records_do_not_block_a_run(output: Folder, content: bytes) -> None:
    output.put("runs/20260101T000000Z-aaaaaa/run.json", content)
    output.put(claims.NAME, content)
    claims.take(output, sleep=lambda _: None).require_ours()


def test_a_run_detects_that_it_was_taken_over(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claims.take(output)
    record = run_record.Record(output, {}, claim.run_id, claim)
    record.start()
    with claims.take(output, check=False, sleep=pytest.fail) as other:
        record._written -= run_record.HEARTBEAT_S
        record.beat()  # it did not stand still: nothing is asked
        record._beaten -= run_record.OWNER_IS_DEAD_S
        with pytest.raises(OutputChangedError, match=f"taken over by run {other.run_id}") as caught:
            record.beat()
        assert caught.value.exit_code == 3
        claim.release()
        assert said(output)["state"] == "active", "it is not ours to release"
    with pytest.raises(OutputChangedError, match="taken over by run"):
        claim.require_ours()
    unchecked = claims.take(output, check=False)
    claims.take(output, check=False)
    unchecked.require_ours()  # who switches the check off has it off


def test_a_deleted_claim_is_an_error(output: Folder) -> None:
    claim = claims.take(output)
    output.delete(claims.NAME)
    with pytest.raises(OutputChangedError, match=r"runs/claim.json is gone"):
        claim.require_ours()
    claim.release()
    assert not output.exists(claims.NAME) and output.names() == []


def test_a_late_takeover_or_release_of_a_dead_run_changes_nothing(output: Folder) -> None:
    claims.take(output).release()
    _, tag = output.read_tagged(claims.NAME)
    dead = claims.Claim(output, "20260101T000000Z-dddddd")
    with claims.take(output) as claim:
        for late in ("active", "ended"):
            with pytest.raises(Conflict):
                output.replace(claims.NAME, dead.content(late), tag)
        claim.require_ours()


def test_a_store_without_conditional_writes_uses_the_run_records(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Folder(Stores(StorageConfig(), {}), f"memory://{time.monotonic_ns()}")
    claim = claims.take(output, sleep=pytest.fail)
    claim.require_ours()
    claim.release()
    assert output.names() == [], "no claim"
    record = run_record.Record(output, {}, claim.run_id, claim)
    record.start()
    with pytest.raises(OutputBusyError):
        claims.take(output, sleep=pytest.fail)
    record.finish("succeeded", 0)
    assert claims.take(output, sleep=pytest.fail).run_id > claim.run_id


class Clock:
    """A clock that jumps: `datetime.now` of this machine."""

    def __init__(self, *moments: datetime) -> None:
        self._moments = list(moments)

    def now(self, zone: Any) -> datetime:
        return self._moments.pop(0) if len(self._moments) > 1 else self._moments[0]

    strptime = staticmethod(datetime.strptime)


def test_only_run_ids_depend_on_the_clock(output: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    past, future = datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(run_record, "datetime", Clock(future, past))
    first = claimed_by(output, monkeypatch, host="elsewhere")
    assert first.id.startswith("2100")

    def beat(_: float) -> None:
        first._write()

    with pytest.raises(OutputBusyError, match="elsewhere"):
        claims.take(output, sleep=beat)
    second = claims.take(output, sleep=lambda _: None)  # its heartbeat does not change: dead, by the counter alone
    assert second.run_id > first.id, "the clock was put back by 130 years in between"


def test_of_many_processes_that_start_at_once_one_continues(output: Folder, tmp_path: Path) -> None:
    """Real processes, which do not share a client or a lock."""
    code = f"""
import sys, time
from imgbatch.ledger import claims
from imgbatch.config.sections import StorageConfig
from imgbatch.errors import OutputBusyError
from imgbatch.storage.stores import Folder, Stores
output = Folder(Stores(StorageConfig()), {output.uri!r})
output.folders()
print(flush=True)
sys.stdin.readline()
try:
    claim = claims.take(output)
except OutputBusyError as error:
    sys.exit(error.exit_code)
print(claim.run_id, flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, **output.stores._environment}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, env=environment)
        for _ in range(3)
    ]
    try:
        _require_one_of(started, output)
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.communicate()
    claims.take(output, sleep=pytest.fail)  # all are dead by now


def _require_one_of(started: list[subprocess.Popen[str]], output: Folder) -> None:
    for process in started:
        assert process.stdout is not None and process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        print(file=process.stdin, flush=True)
    lines = [process.stdout.readline().strip() for process in started if process.stdout is not None]
    winners = [line for line in lines if line]
    assert winners == [said(output)["run_id"]]
    codes = [process.wait() for process, line in zip(started, lines, strict=True) if not line]
    assert codes == [7, 7]

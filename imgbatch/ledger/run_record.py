"""Effects: the record of a run, `runs/RUN_ID/run.json`, with its heartbeat."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from imgbatch.config.secrets import masked
from imgbatch.errors import ImgbatchError, Interrupted, NotFound, StoreError, retry_helps
from imgbatch.ledger import owners
from imgbatch.storage.stores import Folder
from imgbatch.terminal import console

if TYPE_CHECKING:
    from imgbatch.ledger.claims import Claim

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
OWNER_IS_DEAD_S = 25.0
"""A run on another machine whose record does not change for this long is dead. No two clocks are compared."""

_NEWEST = 3
_PACKAGES = ("imgbatch", "ray", "torch", "torchvision", "timm", "pyarrow", "obstore", "fsspec", "s3fs")
_STAMP = "%Y%m%dT%H%M%SZ"

FinishCall = Callable[[Mapping[str, Any]], object]
_finish_calls: ContextVar[tuple[FinishCall, ...]] = ContextVar("calls at the end of a run", default=())
_write_calls: ContextVar[tuple[FinishCall, ...]] = ContextVar("calls after each version of run.json", default=())


@contextmanager
def on_finish(call: FinishCall) -> Iterator[None]:
    """Within the block, make `call` at the end of each run, with the facts of its run.json and `output`, its URI.

    It is called once for each run that started, whether the run succeeded or not, after run.json was written; also if
    writing failed. If the limit of the orderly stop ended the run, it is called in another thread.
    """
    token = _finish_calls.set((*_finish_calls.get(), call))
    try:
        yield
    finally:
        _finish_calls.reset(token)


@contextmanager
def on_write(call: FinishCall) -> Iterator[None]:
    """Within the block, make `call` after each version of run.json was written, with its facts."""
    token = _write_calls.set((*_write_calls.get(), call))
    try:
        yield
    finally:
        _write_calls.reset(token)


def new_run_id(before: str | None = None) -> str:
    """Return a run's name: UTC time, then six random characters.

    Names sort in the order of the runs: if the clock of this machine is earlier than the time in the name of the run `before`,
    one second after that time is used.
    """
    now = datetime.now(UTC)
    if before is not None:
        with suppress(ValueError, OverflowError):
            now = max(
                now, datetime.strptime(before.partition("-")[0], _STAMP).replace(tzinfo=UTC) + timedelta(seconds=1)
            )
    return f"{now.strftime(_STAMP)}-{secrets.token_hex(3)}"


@dataclass
class Record:
    """The record of a run. It is written at the start, with each heartbeat, and at every exit."""

    output: Folder
    facts: dict[str, Any]
    id: str = ""
    """The id of the claim; without a claim it is set at the start, so that it sorts after the existing runs."""
    claim: Claim | None = None
    listed_rows: int = 0
    """The number of rows of its listing, in which a tar is one row; set when the listing is written."""
    output_uri: str = ""
    """The output as the user knows it, if that is not the folder with runs/."""
    live_facts: Callable[[], Mapping[str, Any]] | None = None
    """Returns facts that change while the run works. It is called before each version of the record is written."""
    _beaten: float = 0.0
    """When the last version of the record was sent."""
    _written: float = 0.0
    """When the request for it had ended."""
    _beats: int = 0
    _over: bool = False
    """Whether the final version is written, or being written."""
    _stage_since: float = field(default_factory=time.monotonic)
    _on_finish: tuple[FinishCall, ...] = field(default_factory=_finish_calls.get)
    """Taken when the record is made, since other threads do not have the context of the run."""

    @property
    def folder(self) -> Folder:
        """The run's own folder."""
        return self.output.folder(f"runs/{self.id}")

    def start(self) -> None:
        """Write the record for the first time.

        Raises:
            OutputChangedError: see `beat`.
        """
        if self.claim is not None and time.monotonic() - self.claim.taken_at >= OWNER_IS_DEAD_S:
            self.claim.require_ours()
        self.id = self.id or new_run_id(next(iter(newest(self.output)[-1:]), None))
        self.facts = {
            "run_id": self.id,
            "status": "running",
            "exit_code": None,
            "retry": None,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.facts,
            "versions": _versions(),
            "hardware": _hardware(),
            "owner": owners.this_process(),
        }
        self._write()

    def enter(self, stage: str) -> None:
        """Start a stage of the run, unless it is the current one. The next version of run.json has it."""
        if stage != self.facts.get("stage"):
            self._end_stage()
            self.facts["stage"] = stage

    def _end_stage(self) -> None:
        """Add the time since the last call to the seconds of the current stage."""
        now = time.monotonic()
        seconds, self._stage_since = now - self._stage_since, now
        if stage := self.facts.get("stage"):
            stages = self.facts.get("stages", {})
            self.facts["stages"] = {**stages, stage: round(stages.get(stage, 0.0) + seconds, 3)}

    def beat(self) -> None:
        """Write the record again, if HEARTBEAT_S have passed since the last request ended.

        Raises:
            OutputChangedError: the last time was so long ago that another run considered this one dead, and has taken over.
        """
        since = time.monotonic() - self._beaten
        if self.claim is not None and since >= OWNER_IS_DEAD_S:
            self.claim.require_ours()
        # Slow requests do not follow each other, unless they are so slow that this run would seem dead.
        if time.monotonic() - self._written >= HEARTBEAT_S or since >= OWNER_IS_DEAD_S / 2:
            if self.live_facts is not None:
                self.facts |= self.live_facts()
            self._write()

    def finish(self, status: str, exit_code: int, **facts: Any) -> None:
        """Write the record for the last time."""
        self._over = True
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.facts |= end_facts(status, exit_code) | {"finished": finished, **facts}
        try:
            self._write()
        finally:
            self.call_on_finish()

    def call_on_finish(self, facts: Mapping[str, Any] | None = None) -> None:
        """Make the calls of `on_finish`, once, with these facts or else those of the record."""
        calls, self._on_finish = self._on_finish, ()
        _call_all(calls, {**(facts or self.facts), "output": masked(self.output_uri or self.output.uri)})

    @contextmanager
    def recording_failure(self) -> Iterator[None]:
        """If the block fails, write the error into the record."""
        try:
            yield
        except BaseException as error:
            code = error.exit_code if isinstance(error, ImgbatchError) else 1
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            try:
                self.finish(status, code, error=masked(str(error)) or type(error).__name__)
            except StoreError as store_error:  # the first error is the one to report
                log.error("run.json could not be written: %s", store_error)
            raise

    def record_interrupt(self, signum: int) -> None:
        """Record that a signal ended the run. Called in another thread, if the thread of the run has not ended in time."""
        if self._over:
            return
        stopped = Interrupted(signum)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        final_facts = end_facts("interrupted", stopped.exit_code) | {"finished": finished, "error": str(stopped)}
        facts = self.facts | final_facts
        try:
            self.folder.put("run.json", json.dumps(facts, indent=2, default=str).encode())
        except StoreError as error:
            log.error("run.json could not be written: %s", error)
        finally:
            self.call_on_finish(facts)

    def _write(self) -> None:
        self._beats += 1
        self._end_stage()
        self.facts |= {
            "heartbeat": self._beats,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": None if self._over else console.current_step(),
        }
        # Before the request: it may take so long that other runs consider this one dead, and `beat` has to notice that.
        self._beaten = time.monotonic()
        try:
            self.folder.put("run.json", json.dumps(self.facts, indent=2, default=str).encode())
        finally:
            self._written = time.monotonic()
        _call_all(_write_calls.get(), self.facts)


def _call_all(calls: Iterable[FinishCall], facts: Mapping[str, Any]) -> None:
    """Make calls with the facts of a run. An orchestrator that cannot be notified does not change the result of the run."""
    for call in calls:
        try:
            call(facts)
        except Exception:
            log.exception("the state of the run could not be reported")


def end_facts(status: str, exit_code: int) -> dict[str, Any]:
    """Return the facts of a run that has ended: its status, its exit code, and whether a retry helps."""
    return {"status": status, "exit_code": exit_code, "retry": retry_helps(exit_code)}


def newest(output: Folder) -> list[str]:
    """Return the names of the last few runs."""
    return sorted(output.folders("runs"))[-_NEWEST:]


def read_record(output: Folder, name: str) -> dict[str, Any]:
    """Return the record of a run; an empty one if it is missing or damaged."""
    try:
        return json_object(output.read(f"runs/{name}/run.json"))
    except NotFound:
        return {}


def json_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object in `content`; an empty one if it is damaged or not an object."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _hardware() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": platform.machine(), "driver_cpus": os.cpu_count()}

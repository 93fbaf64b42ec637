"""Effects: the state of a run, read from its run.json in the store, from any machine.

A run is alive as long as its heartbeat changes. That is decided without comparing two clocks wherever possible: by the
process, if the run is on this machine, and otherwise by watching the heartbeat.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from imgbatch.errors import InputError, NotFound
from imgbatch.ledger import owners
from imgbatch.ledger.run_record import OWNER_IS_DEAD_S, json_object, newest
from imgbatch.storage.stores import Folder

RUNNING, LOST = "running", "lost"
LOST_CODE = 3
"""The exit code for a run that ended without recording it."""

_FOLDERS = ("", "_training", "against")
"""Where runs are below an output: of classify and evaluate, of train, and of the second model of `evaluate --against`."""
_TRAINED = "training.json"
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """A run: the URI of its record below the output, and where the record is."""

    output: Folder
    name: str
    """The name of the record below the output."""

    @property
    def run_id(self) -> str:
        """The id of the run; empty for the record of a finished training."""
        return self.name.rpartition("/")[0].rpartition("/")[2]

    def read(self) -> Reading:
        """Read the record.

        Raises:
            NotFound: the record is gone.
        """
        content, meta = self.output.stores.read(self.output.at(self.name))
        return Reading(json_object(content), meta.last_modified)


@dataclass(frozen=True, slots=True)
class Reading:
    """The content of a record, and the time of its last change by the clock of the store."""

    facts: Mapping[str, Any]
    changed: datetime | None

    @property
    def ended(self) -> bool:
        """Whether the run has recorded its end."""
        return bool(self.facts.get("status", RUNNING) != RUNNING)

    @property
    def heartbeat(self) -> Any:
        """A value that changes whenever the run writes its record."""
        return self.facts.get("heartbeat"), self.facts.get("status")


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a run at a moment."""

    facts: Mapping[str, Any]
    state: str
    """running, succeeded, failed, interrupted; or lost: its heartbeat has stopped, and no end is recorded."""
    age_s: float | None = None
    """Seconds since the last heartbeat; None: unknown, or the run has ended."""
    age_of: str = ""
    """How the age was measured."""

    @property
    def exit_code(self) -> int:
        """0 while the run is running, then that of the run."""
        if self.state == LOST:
            return LOST_CODE
        return 0 if self.state == RUNNING else int(self.facts.get("exit_code") or 0)


def find(output: Folder) -> Found:
    """Return the newest run of an output.

    Raises:
        InputError: the output does not exist, or no run was started there.
    """
    runs = []
    for place in _FOLDERS:
        folder = output.folder(place) if place else output
        try:
            runs += [(name, f"{place}/" if place else "") for name in newest(folder)[-1:]]
        except NotFound:
            continue
    if runs:
        name, place = max(runs)
        return Found(output, f"{place}runs/{name}/run.json")
    try:
        if output.exists(_TRAINED):
            return Found(output, _TRAINED)
    except NotFound:
        pass
    raise InputError(
        f"no run found at {output.uri}: it has no runs/ with a run.json. Give the --output of classify, train or evaluate; "
        "a run writes its record a few seconds after its start"
    )


def look(
    found: Found, *, sleep: Callable[[float], None] = time.sleep, now: Callable[[], datetime] | None = None
) -> Status:
    """Return the state of a run; if it looks dead, its heartbeat is watched for up to 25 s.

    Raises:
        InputError: the record is gone.
    """
    first = _read(found)
    status = _ended_or_local(first) or _by_clock(first, (now or _utc_now)())
    if status is not None:
        return status
    # The record looks old. The clocks may differ, so only a heartbeat that does not change shows that the run is lost.
    waited = 0.0
    while waited < OWNER_IS_DEAD_S:
        sleep(_POLL_S)
        waited += _POLL_S
        current = _read(found)
        if current.ended or current.heartbeat != first.heartbeat:
            return _ended_or_local(current) or Status(current.facts, RUNNING, 0.0, "its heartbeat changes")
    return Status(first.facts, LOST, waited, "watched for that long")


def watch(
    found: Found,
    interval_s: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[Status]:
    """Yield the state of a run every few seconds, and its last one when it has ended. No two clocks are compared.

    A run that was started after this one was lost is followed in its place.

    Raises:
        InputError: the record is gone.
    """
    heartbeat, changed_at = None, math.inf
    while True:
        reading = _read(found)
        if reading.heartbeat != heartbeat:
            heartbeat, changed_at = reading.heartbeat, now()
        quiet_s = now() - changed_at
        if reading.ended:
            yield Status(reading.facts, str(reading.facts["status"]), None)
            return
        alive = _is_alive(reading.facts)
        if alive is False or (alive is None and quiet_s >= OWNER_IS_DEAD_S):
            newer = find(found.output)
            if newer.name == found.name:
                yield Status(reading.facts, LOST, quiet_s, _how(alive))
                return
            found, heartbeat = newer, None
            continue
        yield Status(reading.facts, RUNNING, quiet_s)
        sleep(interval_s)


def _read(found: Found) -> Reading:
    try:
        return found.read()
    except NotFound as error:
        raise InputError(f"{found.output.at(found.name)} is gone: the run, or its output, was deleted") from error


def _ended_or_local(reading: Reading) -> Status | None:
    """Return the state of a run that has ended, or whose process is or was on this machine; None for any other run."""
    if reading.ended:
        return Status(reading.facts, str(reading.facts["status"]), None)
    alive, age_s = _is_alive(reading.facts), _age_s(reading, _utc_now())
    if alive is None:
        return None
    return Status(reading.facts, RUNNING if alive else LOST, age_s, _how(alive))


def _is_alive(facts: Mapping[str, Any]) -> bool | None:
    """Return whether the process of a run is alive; None if it is on another machine."""
    owner = facts.get("owner")
    return owners.is_alive(owner) if isinstance(owner, Mapping) else None


def _how(alive: bool | None) -> str:
    return {True: "its process is alive", False: "its process has ended", None: "watched for that long"}[alive]


def _by_clock(reading: Reading, now: datetime) -> Status | None:
    """Return that a run is alive if its record was changed a moment ago; None if that cannot be said."""
    age_s = _age_s(reading, now)
    if age_s is None or not 0 <= age_s <= OWNER_IS_DEAD_S:
        return None
    return Status(reading.facts, RUNNING, age_s, "by the clocks of the store and of this machine")


def _age_s(reading: Reading, now: datetime) -> float | None:
    return None if reading.changed is None else (now - reading.changed).total_seconds()


def _utc_now() -> datetime:
    return datetime.now(UTC)

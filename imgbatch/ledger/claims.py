"""Effects: the claim of an output, `runs/claim.json`: which run may write there.

It is created conditionally (If-None-Match) and taken over by conditional replacement (If-Match), so that of two runs that
start at the same time exactly one continues. The claim only avoids wasted work. The numbered logs ensure that no row is
written twice, by any number of writers. The heartbeat of the owner is in its run's record, `runs/RUN_ID/run.json`.

Requests of a run: one GET and one PUT at the start, one GET before `_SUCCESS` is written, one PUT at the end; one more GET
if an old `_SUCCESS` is removed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from imgbatch.concurrency.monitor import tick
from imgbatch.errors import Conflict, Exists, NotFound, OutputBusyError, OutputChangedError, StoreError
from imgbatch.ledger import owners, run_record
from imgbatch.storage.stores import Folder

log = logging.getLogger(__name__)

NAME = "runs/claim.json"

_MAX_ATTEMPTS = 10


@dataclass
class Claim:
    """The claim of this run. As a context manager, it is released at the end."""

    output: Folder
    run_id: str
    held: bool = True
    """False if the store has no conditional writes: then no claim is written."""
    checked: bool = True
    """Whether the run ends if another one takes over; False with `run.check_owner=false`."""
    taken_at: float = field(default_factory=time.monotonic)
    _started: str = field(default_factory=lambda: _now())
    _tag: str | None = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *ended: object) -> None:
        self.release()

    def content(self, state: str) -> bytes:
        """Return the claim as JSON, in the state `active` or `ended`."""
        facts = {"run_id": self.run_id, "state": state, "started": self._started, "owner": owners.this_process()}
        return json.dumps(facts | ({"ended": _now()} if state == "ended" else {}), indent=2).encode()

    def require_ours(self) -> None:
        """Check that no other run has taken over, with one GET. To other runs, a paused process looks dead.

        Raises:
            OutputChangedError: another run has taken over, or the claim is gone.
        """
        if not (self.held and self.checked):
            return
        claim, tag = _read(self.output)
        if claim is None:
            raise OutputChangedError(
                f"{self.output.at(NAME)} is gone: it was deleted during this run. Run the same command again"
            )
        if claim.get("run_id") != self.run_id:
            raise OutputChangedError(
                f"{self.output.uri} was taken over by {_shown(claim)} while this run was paused. The rows that this "
                "run has committed are kept; run the same command again when the other run has ended"
            )
        self._tag = tag

    def release(self) -> bool:
        """Mark the claim as ended; return False, and change nothing, if another run has taken it over or it is gone."""
        if not self.held:
            return True
        try:
            if self._tag is None:
                claim, self._tag = _read(self.output)
                if claim is None or claim.get("run_id") != self.run_id:
                    return False
            self.output.replace(NAME, self.content("ended"), self._tag)
        except (Conflict, NotFound):
            # If the response was lost, the client repeats the request, which then finds our own ended claim.
            claim, self._tag = _read(self.output)
            if claim is None or claim.get("run_id") != self.run_id:
                return False
        except StoreError as error:  # the next run finds that the owner is dead, or that its record has ended
            log.warning("the claim of the output could not be released: %s", error)
        self.held = False
        return True

    def require_released(self) -> None:
        """Release the claim as the last step of a run.

        Raises:
            OutputChangedError: another run has taken it over, possibly after `require_ours`.
        """
        if not self.release() and self.checked:
            self._tag = None
            self.require_ours()


def take(
    output: Folder,
    *,
    check: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> Claim:
    """Claim an output for a new run.

    A claim whose owner is dead is taken over. An owner on this machine is checked at once; one on another machine counts as
    dead when its heartbeat has not changed for 25 s.

    Args:
        output: the folder of the output.
        check: False: take the claim over even if its owner is alive.
        sleep: waits for a number of seconds.

    Raises:
        OutputBusyError: a live run holds the output, or another one has just taken it.
    """
    if not output.conditional:
        newest = _require_no_live_record(output, check, sleep)
        return Claim(output, run_record.new_run_id(newest), held=False)
    for attempt in range(_MAX_ATTEMPTS):
        previous, tag = _read(output)
        if previous and "run_id" in previous:
            newest = str(previous["run_id"])
            if check and previous.get("state") != "ended":
                _require_dead(output, {newest: previous}, sleep if attempt == 0 else None)
        else:  # an output of 0.1, or a damaged claim
            newest = _require_no_live_record(output, check, sleep)
        claim = Claim(output, run_record.new_run_id(newest), checked=check)
        if _write(claim, tag, exists=previous is not None):
            return claim
    raise OutputBusyError(
        f"{output.at(NAME)} keeps changing: other runs are starting; run the same command again later"
    )


def _write(claim: Claim, tag: str | None, *, exists: bool) -> bool:
    """Create or replace the claim; return False if another run was first."""
    try:
        if exists:
            claim.output.replace(NAME, claim.content("active"), tag)
        else:
            claim.output.create(NAME, claim.content("active"))
    except (Exists, Conflict):
        pass
    except NotFound:
        if not exists:  # the bucket
            raise
    else:
        return True
    # If the response was lost, the client repeats the request, which then finds our own claim.
    current, _ = _read(claim.output)
    return current is not None and current.get("run_id") == claim.run_id


def _require_dead(
    output: Folder,
    claims: Mapping[str, Mapping[str, Any]],
    sleep: Callable[[float], None] | None,
) -> None:
    """Refuse if the owner of one of these claims is alive.

    Args:
        output: the folder of the output.
        claims: claims, or records of runs, which have an owner as well; by run id.
        sleep: waits for a number of seconds. None: an owner on another machine counts as alive at once, since it has just
            taken the claim.

    Raises:
        OutputBusyError: the owner is alive.
    """
    waiting: dict[str, Mapping[str, Any]] = {}
    for run_id, claim in claims.items():
        owner = claim.get("owner")
        alive = owners.is_alive(owner) if isinstance(owner, dict) else None
        if alive is False:
            continue
        record = run_record.read_record(output, run_id)
        if record.get("status", "running") != "running":  # it ended, and its claim could not be released
            continue
        if alive or sleep is None:
            raise _busy(output, claim)
        waiting[run_id] = record
    waited = 0.0
    while waiting and sleep is not None and waited < run_record.OWNER_IS_DEAD_S:
        sleep(1.0)
        tick()
        waited += 1.0
        for run_id, before in list(waiting.items()):
            current = run_record.read_record(output, run_id)
            if current.get("status", "running") != "running":
                del waiting[run_id]
            elif current.get("heartbeat") != before.get("heartbeat"):
                raise _busy(output, claims[run_id])


def _require_no_live_record(output: Folder, check: bool, sleep: Callable[[float], None]) -> str | None:
    """Refuse if one of the newest run records is that of a live run; return the newest name. For outputs without a claim."""
    names = run_record.newest(output)
    records = {name: {"run_id": name, **run_record.read_record(output, name)} for name in names if check}
    running = {name: record for name, record in records.items() if record.get("status") == "running"}
    _require_dead(output, running, sleep)
    return names[-1] if names else None


def _read(output: Folder) -> tuple[dict[str, Any] | None, str | None]:
    """Return the claim and its ETag: None if it does not exist, an empty claim if it is damaged."""
    try:
        content, tag = output.read_tagged(NAME)
    except NotFound:
        return None, None
    return run_record.json_object(content), tag


def _busy(output: Folder, claim: Mapping[str, Any]) -> OutputBusyError:
    return OutputBusyError(
        f"{output.uri} is being written by {_shown(claim)}: wait for it, or give this run an --output of its own"
    )


def _shown(claim: Mapping[str, Any]) -> str:
    owner = claim.get("owner")
    owner = owner if isinstance(owner, dict) else {}
    return f"run {claim.get('run_id')} (host {owner.get('host')}, process {owner.get('pid')})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Effects: the record of a run, `runs/RUN_ID/run.json`, with its heartbeat; and `_SUCCESS`."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from imgbatch.config.secrets import masked
from imgbatch.errors import ImgbatchError, Interrupted, NotFound, StoreError
from imgbatch.ledger import owners
from imgbatch.storage.stores import Folder

if TYPE_CHECKING:
    from imgbatch.ledger.claims import Claim

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
OWNER_IS_DEAD_S = 25.0
"""A run on another machine whose record does not change for so long is dead. No two clocks are compared."""


_LOOKED_AT = 3
_PACKAGES = ("imgbatch", "ray", "torch", "torchvision", "timm", "pyarrow", "obstore", "fsspec", "s3fs")


_STAMP = "%Y%m%dT%H%M%SZ"


def new_run_id(before: str | None = None) -> str:
    """Return a run's name: UTC time, then six random characters.

    Names sort in the order of the runs: where this machine's clock is behind that of the run `before`, a second after
    that one's name is taken.
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
    """What a run reports about itself. Written at the start, with each heartbeat, and at every exit."""

    output: Folder
    facts: dict[str, Any]
    id: str = ""
    """That of the claim; without one it is given at the start, so that it sorts behind the runs that are there."""
    claim: Claim | None = None
    listed_rows: int = 0
    """How many rows its listing has, tars as one each; known when it is written."""
    _beaten: float = 0.0
    _beats: int = 0
    _over: bool = False
    """Whether its last version is written, or on its way."""

    @property
    def folder(self) -> Folder:
        """The run's own folder."""
        return self.output.folder(f"runs/{self.id}")

    def start(self) -> None:
        """Write the record for the first time.

        Raises:
            OutputChangedError: as for `beat`.
        """
        if self.claim is not None and time.monotonic() - self.claim.taken >= OWNER_IS_DEAD_S:
            self.claim.require_ours()
        self.id = self.id or new_run_id(next(iter(newest(self.output)[-1:]), None))
        self.facts = {
            "run_id": self.id,
            "status": "running",
            "exit_code": None,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.facts,
            "versions": _versions(),
            "hardware": _hardware(),
            "owner": owners.this_process(),
        }
        self._write()

    def beat(self, **facts: Any) -> None:
        """Write the record again, if the last time was long enough ago.

        Raises:
            OutputChangedError: it was so long ago that another run took this one for dead, and has taken over.
        """
        since = time.monotonic() - self._beaten
        if self.claim is not None and since >= OWNER_IS_DEAD_S:
            self.claim.require_ours()
        if since >= HEARTBEAT_S:
            self.facts |= facts
            self._write()

    def finish(self, status: str, exit_code: int, **facts: Any) -> None:
        """Write the record for the last time."""
        self._over = True
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.facts |= {"status": status, "exit_code": exit_code, "finished": finished, **facts}
        self._write()

    @contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Say in the record how the work within ended, if it did not end well."""
        try:
            yield
        except BaseException as error:
            code = error.exit_code if isinstance(error, ImgbatchError) else 1
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            try:
                self.finish(status, code, error=masked(str(error)) or type(error).__name__)
            except StoreError as second:  # the first error is the one to tell
                log.error("run.json could not be written: %s", second)
            raise

    def record_interrupt(self, signum: int) -> None:
        """Say that a signal ended the run. Called in another thread, since that of the run does not come to its end."""
        if self._over:
            return
        stopped = Interrupted(signum)
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        last = {"status": "interrupted", "exit_code": stopped.exit_code, "finished": finished, "error": str(stopped)}
        try:
            self.folder.put("run.json", json.dumps(self.facts | last, indent=2, default=str).encode())
        except StoreError as error:
            log.error("run.json could not be written: %s", error)

    def _write(self) -> None:
        self._beats += 1
        self.facts["heartbeat"] = self._beats
        self._beaten = (
            time.monotonic()
        )  # not behind the request, which may take so long that others think this run dead
        self.folder.put("run.json", json.dumps(self.facts, indent=2, default=str).encode())


def newest(output: Folder) -> list[str]:
    """Return the names of the last few runs."""
    return sorted(output.folders("runs"))[-_LOOKED_AT:]


def read_record(output: Folder, name: str) -> dict[str, Any]:
    """Return the record of a run; nothing if it is missing or damaged."""
    try:
        return json_object(output.read(f"runs/{name}/run.json"))
    except NotFound:
        return {}


def json_object(content: bytes) -> dict[str, Any]:
    """Return a JSON object, an empty one for whatever is none."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": platform.machine(), "driver_cpus": os.cpu_count()}

"""The record of a run: `runs/RUN_ID/run.json`, its heartbeat, and who owns an output."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from imgbatch.config import masked
from imgbatch.errors import ImgbatchError, Interrupted, NotFound, OutputError, StoreError
from imgbatch.storage import Folder

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
    """What a run tells of itself. Written at the start, with each heartbeat, and at every exit."""

    output: Folder
    facts: dict[str, Any]
    id: str = ""
    """Given when it starts, so that it sorts behind the runs that are there."""
    _beaten: float = 0.0
    _beats: int = 0
    _over: bool = False
    """Whether its last version is written, or on its way."""

    @property
    def folder(self) -> Folder:
        """The run's own folder."""
        return self.output.folder(f"runs/{self.id}")

    def start(self) -> None:
        """Write the record for the first time."""
        self.id = self.id or new_run_id(next(iter(_newest(self.output)[-1:]), None))
        self.facts = {
            "run_id": self.id,
            "status": "running",
            "exit_code": None,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.facts,
            "versions": _versions(),
            "hardware": _hardware(),
            "owner": _owner(),
        }
        self._write()

    def beat(self, **facts: Any) -> None:
        """Write the record again, if the last time was long enough ago."""
        if time.monotonic() - self._beaten >= HEARTBEAT_S:
            self.facts |= facts
            self._write()

    def finish(self, status: str, exit_code: int, **facts: Any) -> None:
        """Write the record for the last time."""
        self._over = True
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        self.facts |= {"status": status, "exit_code": exit_code, "finished": finished, **facts}
        self._write()

    @contextmanager
    def telling(self) -> Iterator[None]:
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

    def give_up(self, signum: int) -> None:
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
        self.folder.put("run.json", json.dumps(self.facts, indent=2, default=str).encode())
        self._beaten = time.monotonic()


def require_free(output: Folder, sleep: Callable[[float], None] = time.sleep) -> None:
    """Refuse an output that a live run writes.

    A dead owner on this machine is known at once, one on another after 25 s. It only spares wasted work: the numbered
    logs keep every image single whoever writes.

    Raises:
        OutputError: naming the run and its host.
    """
    running = {name: record for name in _newest(output) if (record := _read(output, name)).get("status") == "running"}
    unknown = {name: record for name, record in running.items() if (alive := _lives_here(record)) is None or alive}
    for name, record in unknown.items():
        if _lives_here(record):
            raise _taken(output, name, record)
    waited = 0.0
    while unknown and waited < OWNER_IS_DEAD_S:
        sleep(1.0)
        waited += 1.0
        for name, record in unknown.items():
            now = _read(output, name)
            if now.get("heartbeat") != record.get("heartbeat") and now.get("status") == "running":
                raise _taken(output, name, record)


def read_success(output: Folder) -> dict[str, Any] | None:
    """Return what `_SUCCESS` says, None if there is none, nothing if it is damaged."""
    try:
        return _object(output.read("_SUCCESS"))
    except NotFound:
        return None


def write_success(output: Folder, run_id: str, counts: Mapping[str, int], limit: int | None, seal: str) -> None:
    """Write `_SUCCESS`: its existence means that the books balance. `seal` names the run that sealed the logs."""
    content = json.dumps({"run_id": run_id, "counts": counts, "limit": limit, "seal": seal}, indent=2).encode()
    # Never over one that was not seen: then the late request of a dead run cannot take the place of this one either.
    output.change("_SUCCESS", lambda _: content)


def _newest(output: Folder) -> list[str]:
    return sorted(output.folders("runs"))[-_LOOKED_AT:]


def _read(output: Folder, name: str) -> dict[str, Any]:
    try:
        return _object(output.read(f"runs/{name}/run.json"))
    except NotFound:
        return {}


def _object(content: bytes) -> dict[str, Any]:
    """Return a JSON object, an empty one for whatever is none."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _taken(output: Folder, name: str, record: Mapping[str, Any]) -> OutputError:
    owner = record.get("owner", {})
    return OutputError(
        f"{output.uri} is being written by run {name} (host {owner.get('host')}, process {owner.get('pid')}): wait for "
        "it, or give this run an --output of its own"
    )


def _owner() -> dict[str, Any]:
    where = {"host": socket.gethostname(), "boot": _boot(), "processes": _pid_namespace()}
    return {**where, "pid": os.getpid(), "born": _born(os.getpid())}


def _lives_here(record: Mapping[str, Any]) -> bool | None:
    """Return whether the owner lives, None if it is (or may be) on another machine."""
    owner = record.get("owner", {})
    # Two containers of a machine may share its name; a process number says nothing outside its own namespace.
    here = (socket.gethostname(), _boot(), _pid_namespace())
    if not _boot() or (owner.get("host"), owner.get("boot"), owner.get("processes")) != here:
        return None
    return bool(_born(int(owner.get("pid", 0))) == owner.get("born"))


def _boot() -> str | None:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None


def _pid_namespace() -> str | None:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _born(pid: int) -> int | None:
    """Return when a process was started, in the kernel's ticks: a number may be used again, not with its time."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


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

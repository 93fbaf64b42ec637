"""Effects: which rows a run is judged by, and with which rows they are compared.

Judged are all rows that are newer than the last `_SUCCESS`, so that a run that resumes another one, or follows one that was
held back, is judged by the rows of both. They are compared with the rows of the run that wrote the last `_SUCCESS`, which
are those of the runs in its range `rows`: the run itself, and the runs that it resumed.

A later run removes `_SUCCESS` as soon as it finds work, and copies it to `runs/last_success.json` before. So the range is
found with one GET, whatever number of runs were killed or held back in between.
"""

from __future__ import annotations

import getpass
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from imgbatch.config.results import GuardConfig
from imgbatch.errors import ConfigError
from imgbatch.ledger.run_record import read_record
from imgbatch.ledger.success_marker import SuccessMarker, read_success
from imgbatch.quality.row_counts import RunRange
from imgbatch.storage.stores import Folder
from imgbatch.storage.uris import absolute

log = logging.getLogger(__name__)

HELD_BACK = 8
"""The exit code of a run that a guard held back."""


@dataclass(frozen=True, slots=True)
class LastRows:
    """The rows that the next run is compared with, as `_SUCCESS` and run.json have them in `rows`."""

    runs: RunRange
    new_rejects: int | None = None
    """The number of rejects among them, without those of images that had been rejected before; None: not known. It is
    recorded, since a reject that is retried becomes a row of the run that retries it."""
    transient: int | None = None
    """The number of rejects that the next run retries; None: not known."""
    all_rejects: int | None = None
    """The number of rejects in the output; None: not known."""

    @classmethod
    def of(cls, rows: Any, run_id: str, counts: Mapping[str, Any]) -> LastRows:
        """Return the rows of a run.

        Args:
            rows: `rows` of `_SUCCESS` or run.json. It is absent before version 0.2: then they are all rows of the output.
            run_id: of the run.
            counts: `counts` of the same file.
        """
        rows = rows if isinstance(rows, dict) else {}
        runs = RunRange(str(rows.get("after") or ""), str(rows.get("through") or run_id))
        return cls(runs, rows.get("new_rejects"), rows.get("transient"), counts.get("rejected"))

    @classmethod
    def of_success(cls, content: Mapping[str, Any]) -> LastRows | None:
        """Return the rows of the run that wrote `_SUCCESS`; None without a `_SUCCESS`."""
        run_id = content.get("run_id")
        return cls.of(content.get("rows"), str(run_id), content.get("counts") or {}) if run_id else None

    def new_among(self, rejected: int, transient: int, retry: str) -> int:
        """Return how many rejects of the next run are new: those that it retries have become rows of it.

        Args:
            rejected: the number of rejects of that run.
            transient: how many of them are transient.
            retry: which rejects it retries: transient, all.
        """
        if retry == "all":
            return max(0, rejected - (rejected if self.all_rejects is None else self.all_rejects))
        return rejected - min(transient, transient if self.transient is None else self.transient)

    def public(self) -> dict[str, Any]:
        """Return the `rows` of `_SUCCESS` and run.json."""
        known = {"new_rejects": self.new_rejects, "transient": self.transient}
        return {"after": self.runs.after, "through": self.runs.through} | {
            name: number for name, number in known.items() if number is not None
        }


@dataclass(frozen=True, slots=True)
class Reference:
    """The rows that are judged, and the rows they are compared with."""

    judged: RunRange
    last: LastRows | None
    """None: there is nothing to compare with."""
    output: Folder
    """The output that has those rows."""
    own: LastRows | None
    """The rows of this output that the next run is compared with if this run adds none; None: no run has succeeded."""
    history: Sequence[Mapping[str, Any]] = ()
    """The differences between the last successful runs, oldest first."""
    accepted: str | None = None
    """The run that was held back and is accepted."""
    other_model: str = ""
    """The model of the reference, if it is another one."""
    same_labels: bool = True
    """Whether that model has the same classes."""
    note: str = ""
    """Why there is nothing to compare with."""


def find_reference(
    output: Folder, last: Mapping[str, Any], config: GuardConfig, fingerprint: Mapping[str, Any]
) -> Reference:
    """Return what the run that is about to succeed is compared with.

    Args:
        output: of the run.
        last: the content of the last `_SUCCESS`; empty if no run has succeeded yet.
        config: the guards.
        fingerprint: of the run.

    Raises:
        ConfigError: `guard.accept` or `guard.reference` cannot be used.
    """
    own = LastRows.of_success(last)
    after = own.runs.through or "" if own else ""
    if config.accept is not None and config.accept > after:
        return _accepted(output, after, config.accept)
    if config.accept is not None:
        log.info("guard.accept=%s has no effect: a later run has succeeded", config.accept)
    if config.reference is not None:
        return _other_output(output, own, config.reference, fingerprint)
    if own is None:
        return Reference(RunRange(), None, output, None, note="no run of this output has succeeded before")
    return Reference(RunRange(after), own, output, own, _history(read_record(output, own.runs.through or "")))


def require_acceptable(output: Folder, run_id: str) -> dict[str, Any]:
    """Return the record of a run that was held back.

    Raises:
        ConfigError: there is no such run, or it was not held back by the comparison with earlier rows.
    """
    record = read_record(output, run_id) if run_id.strip("./") == run_id and "/" not in run_id else {}
    if not record:
        raise ConfigError(
            f"guard.accept={run_id}: {output.uri} has no run of this id; its runs are in {output.at('runs')}"
        )
    if record.get("exit_code") != HELD_BACK:
        raise ConfigError(
            f"guard.accept={run_id}: this run was not held back by a guard; it ended with exit code {record.get('exit_code')}"
        )
    if not (record.get("drift") or {}).get("held_back"):  # its rows, and those of runs before it, were not compared
        raise ConfigError(
            f"guard.accept={run_id}: the canary held this run back, which cannot be accepted. Correct the model, or set "
            "another guard.canary or guard.canary_accuracy"
        )
    return record


def accepted_by(config: GuardConfig) -> str:
    """Return who accepts a run: `guard.accepted_by`, else the user of this process."""
    if config.accepted_by is not None:
        return config.accepted_by
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"


def _accepted(output: Folder, after: str, run_id: str) -> Reference:
    """Return the reference after a run was accepted: its rows, with which newer rows are compared."""
    record = require_acceptable(output, run_id)
    drift = record.get("drift")
    rows = LastRows.of(drift.get("rows") if isinstance(drift, dict) else None, run_id, record.get("counts") or {})
    last = replace(rows, runs=RunRange(after, run_id))
    history = [entry for entry in _history(record) if entry.get("run_id") != run_id]
    return Reference(RunRange(run_id), last, output, last, history, accepted=run_id)


def _other_output(output: Folder, own: LastRows | None, uri: str, fingerprint: Mapping[str, Any]) -> Reference:
    """Return the last success of another output as the reference."""
    judged = RunRange(own.runs.through or "" if own else "")
    other = Folder(output.stores, absolute(uri))
    success = SuccessMarker(other, read_success(other)).last()
    last = LastRows.of_success(success)
    if last is None:
        if not other.folders("runs"):
            raise ConfigError(f"guard.reference={uri} is no output of classify: it has no runs")
        return Reference(judged, None, other, own, note=f"no run of {other.uri} has succeeded")
    record = read_record(other, str(success["run_id"]))
    theirs = record.get("fingerprint") or {}
    is_other = any(theirs.get(key) != fingerprint.get(key) for key in ("weights", "labels", "preprocess"))
    model = record.get("model") or {}
    return Reference(
        judged,
        replace(last, transient=0, all_rejects=0),  # its rejects are not retried here
        other,
        own,
        _history(read_record(other, last.runs.through or "")),
        other_model=str(model.get("reference", "another model")) if is_other else "",
        same_labels=theirs.get("labels") == fingerprint.get("labels"),
    )


def _history(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    drift = record.get("drift")
    history = drift.get("history") if isinstance(drift, dict) else None
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []

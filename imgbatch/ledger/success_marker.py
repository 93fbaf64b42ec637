"""Effects: `_SUCCESS`. It is written and removed conditionally, so that no run overwrites what another run has written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgbatch.errors import Conflict, Exists, NotFound, OutputChangedError
from imgbatch.ledger.run_record import json_object
from imgbatch.storage.stores import Folder

SUCCESS = "_SUCCESS"
LAST_SUCCESS = "runs/last_success.json"
"""A copy of the last `_SUCCESS` that was removed, since a later run found work."""


def read_success(output: Folder) -> dict[str, Any] | None:
    """Return the content of `_SUCCESS`: None if it does not exist, an empty one if it is damaged."""
    try:
        return json_object(output.read(SUCCESS))
    except NotFound:
        return None


@dataclass
class SuccessMarker:
    """`_SUCCESS` as this run read it last. A newer version of another run is neither replaced nor removed."""

    output: Folder
    content: dict[str, Any] | None = None
    """None if it does not exist."""
    _tag: str | None = None

    def refresh(self) -> None:
        """Read it, with one GET."""
        try:
            data, self._tag = self.output.read_tagged(SUCCESS)
            self.content = json_object(data)
        except NotFound:
            self.content = self._tag = None

    def last(self) -> dict[str, Any]:
        """Return its content; if it does not exist or is damaged, that of the last one that was removed; empty if none was."""
        if self.content:
            return self.content
        try:
            return json_object(self.output.read(LAST_SUCCESS))
        except NotFound:
            return {}

    def keep_copy(self) -> None:
        """Copy it to `runs/last_success.json`, before it is removed: the next run that succeeds is compared with it.

        If this run is killed, later runs find the copy. A late PUT of a killed run does not replace a newer copy.
        """
        content = self.content or {}
        if "run_id" in content:
            self.output.change(LAST_SUCCESS, lambda old: _newer(old, content))

    def withdraw(self) -> None:
        """Remove it, if it existed: the run has found work, or has failed.

        Where the store has conditional deletion, a late DELETE of a killed run does not remove a newer `_SUCCESS`.

        Raises:
            OutputChangedError: another run has written a newer one.
        """
        if self.content is None:
            return
        try:
            self.output.delete(SUCCESS, self._tag)
        except Conflict as error:
            raise _changed(self.output, "since this run began") from error
        self.content = self._tag = None

    def write(
        self,
        run_id: str,
        counts: Mapping[str, int],
        limit: int | None,
        seal: str,
        rows: Mapping[str, Any] | None = None,
    ) -> None:
        """Write it: its existence means that the counts reconcile.

        Args:
            run_id: of this run.
            counts: of the audit.
            limit: of the run; None: all images were listed.
            seal: the run that sealed the logs.
            rows: the range of the runs that the next run is compared with; see `quality.reference`.

        Raises:
            OutputChangedError: another run has written or removed it since `refresh`.
        """
        content = {"run_id": run_id, "counts": dict(counts), "limit": limit, "seal": seal}
        content |= {"rows": dict(rows)} if rows is not None else {}
        data = json.dumps(content, indent=2).encode()
        try:
            if self.content is None:
                self.output.create(SUCCESS, data)
            else:
                self.output.replace(SUCCESS, data, self._tag)
        except (Exists, Conflict, NotFound) as error:
            # If the response was lost, the client repeats the request, which then finds its own content.
            if (read_success(self.output) or {}).get("run_id") != run_id:
                raise _changed(self.output, "while this run counted the rows") from error


def _newer(old: bytes | None, content: Mapping[str, Any]) -> bytes:
    """Return the newer of two versions of the copy."""
    if old is not None and str(json_object(old).get("run_id", "")) >= str(content["run_id"]):
        return old
    return json.dumps(content, indent=2).encode()


def _changed(output: Folder, when: str) -> OutputChangedError:
    return OutputChangedError(
        f"{output.at(SUCCESS)} was changed by another run {when}, and is left unchanged. The rows that this run has "
        "committed are kept: run the same command again"
    )

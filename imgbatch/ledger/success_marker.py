"""Effects: `_SUCCESS`, which is written and removed conditionally."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgbatch.errors import Conflict, Exists, NotFound, OutputChangedError
from imgbatch.ledger.run_record import json_object
from imgbatch.storage.stores import Folder

SUCCESS = "_SUCCESS"


def read_success(output: Folder) -> dict[str, Any] | None:
    """Return what `_SUCCESS` says, None if there is none, nothing if it is damaged."""
    try:
        return json_object(output.read(SUCCESS))
    except NotFound:
        return None


@dataclass
class SuccessMarker:
    """`_SUCCESS` as this run saw it last. What another run has written since is neither replaced nor removed."""

    output: Folder
    content: dict[str, Any] | None = None
    """What it says, None if it is not there."""
    _tag: str | None = None

    def refresh(self) -> None:
        """Read it, one GET."""
        try:
            content, self._tag = self.output.read_tagged(SUCCESS)
            self.content = json_object(content)
        except NotFound:
            self.content = self._tag = None

    def withdraw(self) -> None:
        """Remove it, if it was there: the run has found work, or an error.

        A DELETE of a killed run that arrives late changes nothing, where the store has conditional deletion.

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

    def write(self, run_id: str, counts: Mapping[str, int], limit: int | None, seal: str) -> None:
        """Write it: its existence means that the counts reconcile. `seal` names the run that sealed the logs.

        Raises:
            OutputChangedError: another run has written it, or removed it, since it was looked at.
        """
        said = {"run_id": run_id, "counts": dict(counts), "limit": limit, "seal": seal}
        content = json.dumps(said, indent=2).encode()
        try:
            if self.content is None:
                self.output.create(SUCCESS, content)
            else:
                self.output.replace(SUCCESS, content, self._tag)
        except (Exists, Conflict, NotFound) as error:
            # After a lost answer the request is repeated, and finds what it has written itself.
            if (read_success(self.output) or {}).get("run_id") != run_id:
                raise _changed(self.output, "while this run counted the rows") from error


def _changed(output: Folder, when: str) -> OutputChangedError:
    return OutputChangedError(
        f"{output.at(SUCCESS)} was changed by another run {when}; it is left as it is. What this run has committed stays: "
        "run the same command again"
    )

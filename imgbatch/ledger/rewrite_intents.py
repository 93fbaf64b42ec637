"""Effects: intents: the parts of a log that are about to be rewritten, recorded before the rewrite is sent.

The PUT of a killed run may reach the store after the next run has ended. It is conditional on the part's ETag, so it fails
once the part has changed. Therefore the next run rewrites every part that was announced here and not withdrawn, with the
same rows and a new ETag (`Log.fence`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable

from imgbatch.errors import NotFound, OutputError
from imgbatch.storage.stores import Folder

PartsByWriter = dict[str, list[int]]
"""The numbers of the parts that each writer has announced."""


class RewriteIntents:
    """The parts of a table that each writer is about to rewrite, in a JSON object of this name."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._writer = uuid.uuid4().hex
        self._ours: set[int] = set()

    def add(self, numbers: Iterable[int]) -> None:
        """Announce that these parts will be rewritten. No request is made if this writer has announced all of them."""
        ours = self._ours.union(numbers)
        if ours != self._ours:
            self._change(lambda parts: parts | {self._writer: sorted(ours)})
            self._ours = ours

    def invalidate(self, number: int) -> None:
        """Make the next `add` announce a part again: another writer changed it, and may have withdrawn our announcement."""
        self._ours.discard(number)

    def pending(self) -> PartsByWriter:
        """Return the announcements of all writers, dead or alive, that were not withdrawn."""
        try:
            return self._parts(self._folder.read(self._name))
        except NotFound:
            return {}

    def withdraw(self, parts: PartsByWriter | None = None) -> None:
        """Record that no PUT is pending any more: for the parts that this writer announced, or for `parts` of other writers."""
        if parts is None:
            parts, self._ours = {self._writer: sorted(self._ours)} if self._ours else {}, set()
        if parts:
            # An entry that has changed meanwhile belongs to a live writer, and is kept.
            self._change(
                lambda announced: {
                    writer: numbers for writer, numbers in announced.items() if parts.get(writer) != numbers
                }
            )

    def _parts(self, data: bytes) -> PartsByWriter:
        try:
            return dict(json.loads(data)["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self._folder.at(self._name)} is damaged or was not written by imgbatch; remove it"
            ) from error

    def _change(self, change: Callable[[PartsByWriter], PartsByWriter]) -> None:
        def encoded(data: bytes | None) -> bytes:
            # With a nonce no two contents, and so no two ETags, are equal: a late change of a dead run is refused as well.
            content = {"parts": change({} if data is None else self._parts(data)), "nonce": uuid.uuid4().hex}
            return json.dumps(content).encode()

        self._folder.change(self._name, encoded)

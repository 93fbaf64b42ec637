"""Effects: which parts of a log are about to be rewritten: said before it is done, so that the next run knows what may
still come.

The replacement that a killed run has sent may arrive when the next run has ended well. It is conditional on the part being
the one that was read, so it is refused once the part is another one. So the next run writes every part again that was
announced and not taken back, with the same rows.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable

from imgbatch.errors import NotFound, OutputError
from imgbatch.storage.stores import Folder

Parts = dict[str, list[int]]
"""By writer."""


class Announced:
    """The numbers of the parts of a table that each writer is about to rewrite, in a JSON object of this name."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._writer = uuid.uuid4().hex
        self._ours: set[int] = set()

    def add(self, numbers: Iterable[int]) -> None:
        """Announce these parts; those that this writer has announced are not said again."""
        ours = self._ours.union(numbers)
        if ours != self._ours:
            self._change(lambda parts: parts | {self._writer: sorted(ours)})
            self._ours = ours

    def doubt(self, number: int) -> None:
        """Let the next `add` announce a part again: someone else was at it, and may have taken the announcement back."""
        self._ours.discard(number)

    def left(self) -> Parts:
        """Return what was announced and not taken back: by runs that died, or that are at work."""
        try:
            return self._parts(self._folder.read(self._name))
        except NotFound:
            return {}

    def take_back(self, parts: Parts | None = None) -> None:
        """Say that nothing is under way any more to what this writer announced, or to these parts of others."""
        if parts is None:
            parts, self._ours = {self._writer: sorted(self._ours)} if self._ours else {}, set()
        if parts:
            self._change(lambda known: {writer: each for writer, each in known.items() if parts.get(writer) != each})

    def _parts(self, data: bytes) -> Parts:
        try:
            return dict(json.loads(data)["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{self._folder.at(self._name)} is damaged or not ours; remove it") from error

    def _change(self, change: Callable[[Parts], Parts]) -> None:
        def encoded(data: bytes | None) -> bytes:
            # The nonce: no two contents are the same, so that a late change of a dead run is refused as well.
            content = {"parts": change({} if data is None else self._parts(data)), "nonce": uuid.uuid4().hex}
            return json.dumps(content).encode()

        self._folder.change(self._name, encoded)

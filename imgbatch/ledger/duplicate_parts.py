"""Effects: parts whose rows are in other parts as well: which files these are, and what to do.

No run writes such a part. It is a copy that a person made, or a part that was restored from a backup. Whichever of the two
files is moved away, no image is lost: the next run labels the images that only that file held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.errors import AuditError
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.storage.stores import Folder

_SHOWN = 5

REMEDY = "then run the same classify.py command again"


@dataclass
class DuplicateParts:
    """The parts that hold second rows of images."""

    output: Folder
    examples: dict[tuple[str, int], str] = field(default_factory=dict)
    """An image, by table and number of the part that holds its second row."""

    def note(self, table: str, number: int, rows: pa.Table, duplicated: npt.NDArray[np.bool_]) -> None:
        """Note a part if any of its rows is the second of its image."""
        if duplicated.any():
            self.examples[table, number] = str(rows["uri"][int(np.argmax(duplicated))])

    def refuse(self) -> None:
        """Raise if there are any.

        Raises:
            AuditError: naming the files, and what to do with them.
        """
        if self.examples:
            raise AuditError(self.advice())

    def advice(self) -> str:
        """Say which parts hold rows of which other parts, and which files to move away.

        A reject of an image that has a label is not a matter of files: two writers at a time may leave it, and the next run
        removes it.
        """
        first = list(self.examples.items())[:_SHOWN]
        holders = self._holders({uri for _, uri in first})
        shown, away = [], []
        for part, uri in first:
            others = [holder for holder in holders.get(uri, []) if holder != part]
            place = _at(self.output, *part)
            shown.append(f"in two rows: {uri}, in {f'{_at(self.output, *others[0])} and in ' if others else ''}{place}")
            if not others or any(table == part[0] for table, _ in others):
                away.append(place)
        if not away:
            return f"{'; '.join(shown)}; run the same classify.py command again, which removes the reject"
        remaining = len(self.examples) - _SHOWN
        more = f" ({remaining} more are named when these are gone)" if remaining > 0 else ""
        return f"{'; '.join(shown)}. Move away {', '.join(away)}{more}, {REMEDY}"

    def _holders(self, uris: set[str]) -> dict[str, list[tuple[str, int]]]:
        """Return the parts that hold a row of each of these images; both tables are read once more."""
        holders: dict[str, list[tuple[str, int]]] = {}
        for name in (LABELS_LOG, REJECTS_LOG):
            log = Log(self.output.folder(name))
            log.scan()
            for number, table, _ in log.read(["uri"]):
                for uri in uris.intersection(table["uri"].to_pylist()):
                    holders.setdefault(uri, []).append((name, number))
        return holders


def _at(output: Folder, table: str, number: int) -> str:
    return Log(output.folder(table)).uri(number)

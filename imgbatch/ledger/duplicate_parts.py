"""Effects: parts with rows that other parts have as well: their names, and the remedy.

No run writes such a part. It was copied by a person, or restored from a backup. Either of the two files may be moved away:
the next run labels the images that only that file held.
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
        """Note a part if it holds the second row of an image."""
        if duplicated.any():
            self.examples[table, number] = str(rows["uri"][int(np.argmax(duplicated))])

    def refuse(self) -> None:
        """Raise if an image has two rows.

        Raises:
            AuditError: with the names of the files, and the remedy.
        """
        if self.examples:
            raise AuditError(self.advice())

    def advice(self) -> str:
        """Return which parts hold rows of which other parts, and which files to move away.

        If an image has a label and a reject, no file has to be moved: two concurrent writers may cause this, and the next run
        removes the reject.
        """
        shown_parts = list(self.examples.items())[:_SHOWN]
        holders = self._holders({uri for _, uri in shown_parts})
        shown, removable = [], []
        for part, uri in shown_parts:
            other_holders = [holder for holder in holders.get(uri, []) if holder != part]
            part_uri = _at(self.output, *part)
            parts = [*(_at(self.output, *holder) for holder in other_holders[:1]), part_uri]
            shown.append(f"in two rows: {uri}, in {' and in '.join(parts)}")
            if not other_holders or any(table == part[0] for table, _ in other_holders):
                removable.append(part_uri)
        if not removable:
            return f"{'; '.join(shown)}; run the same classify.py command again, which removes the reject"
        remaining = len(self.examples) - _SHOWN
        suffix = f" ({remaining} more are named after that)" if remaining > 0 else ""
        return f"{'; '.join(shown)}. Move away {', '.join(removable)}{suffix}, {REMEDY}"

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

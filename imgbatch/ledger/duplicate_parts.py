"""Effects: parts that hold rows which other parts hold as well: which files these are, and what to do.

No run writes such a part; it is a copy that somebody made, or a part that was put back from a backup. Whichever of the two
files is moved away, no image is lost: what only that one held is made again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.errors import AuditError
from imgbatch.ledger.commit_log import Log
from imgbatch.storage.stores import Folder

_SHOWN = 5

REMEDY = "then run the same classify.py command again"


@dataclass
class Doubles:
    """The parts whose rows were found to be in a part before them."""

    output: Folder
    found: dict[tuple[str, int], str] = field(default_factory=dict)
    """An image, by table and number of the part that holds its second row."""

    def note(self, table: str, number: int, rows: pa.Table, double: npt.NDArray[np.bool_]) -> None:
        """Note the rows of a part that are second ones."""
        if double.any():
            self.found[table, number] = str(rows["uri"][int(np.argmax(double))])

    def refuse(self) -> None:
        """Raise if there are any.

        Raises:
            AuditError: naming the files, and what to do with them.
        """
        if self.found:
            raise AuditError(self.advice())

    def advice(self) -> str:
        """Say which parts hold rows of which others, and which ones to move away.

        A reject of an image that has a label is taken out by the next run, as two writers at a time may leave it.
        """
        first = list(self.found.items())[:_SHOWN]
        holders = self._holders({uri for _, uri in first})
        shown, away = [], []
        for part, uri in first:
            others = [holder for holder in holders.get(uri, []) if holder != part]
            place = _at(self.output, *part)
            shown.append(f"in two rows: {uri}, in {f'{_at(self.output, *others[0])} and in ' if others else ''}{place}")
            if not others or any(table == part[0] for table, _ in others):
                away.append(place)
        if not away:
            return f"{'; '.join(shown)}; run the same classify.py command again, which takes the reject out"
        more = f" ({len(self.found) - _SHOWN} more are named when these are gone)" if len(self.found) > _SHOWN else ""
        return f"{'; '.join(shown)}. Move away {', '.join(away)}{more}, {REMEDY}"

    def _holders(self, uris: set[str]) -> dict[str, list[tuple[str, int]]]:
        """Return the parts that hold a row of each of these images, read once more."""
        holders: dict[str, list[tuple[str, int]]] = {}
        for name in ("labels", "rejects"):
            log = Log(self.output.folder(name))
            log.scan()
            for number, table, _ in log.read(["uri"]):
                for uri in uris.intersection(table["uri"].to_pylist()):
                    holders.setdefault(uri, []).append((name, number))
        return holders


def _at(output: Folder, table: str, number: int) -> str:
    return Log(output.folder(table)).uri(number)

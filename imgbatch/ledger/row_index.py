"""Values: the index of the rows of both tables: the image of each row, its version, and the part that holds the row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.ledger.status import DONE, DUPLICATE, LABELS_LOG, NEW, REJECTS_LOG, STALE
from imgbatch.ledger.versions import Versions, changed_since
from imgbatch.schema import single_chunk
from imgbatch.uri_index import Keys, UriIndex, uri_keys

_REJECT, _PASSING, _SEEN, _STALE = 1, 2, 4, 8
"""Bits of a row's state: it is in rejects/; it is a reject that is retried; its image is listed; it will be replaced."""

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
Status = npt.NDArray[np.uint8]
KeysByPart = dict[int, Keys]


class RowIndex:
    """The facts of each row, in 37 bytes: image, version, part, state, and a hash of the carried values."""

    def __init__(self, retry: str = "transient") -> None:
        """Make an empty index; `retry`: which rejects are retried: transient, all."""
        self._retry = retry
        self._rows = UriIndex(size=np.uint32, tag=np.uint64, part=np.int32, state=np.uint8, carried=np.uint32)
        self.stale = 0
        """The number of rows that will be replaced."""

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, number: int, table: pa.Table, *, rejects: bool = False, seen: Mask | bool = False) -> Mask:
        """Add the rows of a part; return a mask of the images that were not in the index before.

        Args:
            number: of the part.
            table: its rows, with VERSION_COLUMNS and, for rejects, `passing`.
            rejects: the part is in rejects/.
            seen: rows whose images count as listed.
        """
        versions = Versions.of(table)
        state = np.where(np.broadcast_to(seen, len(table)), _SEEN, 0).astype(np.uint8)
        if rejects:
            passing = np.asarray(single_chunk(table["passing"]).fill_null(False))
            state |= np.where(passing, _PASSING | _REJECT, _REJECT).astype(np.uint8)
        parts = np.full(len(table), number, np.int32)
        unknown = np.zeros(len(table), np.uint32)
        return self._rows.add(
            versions.keys, size=versions.sizes, tag=versions.tags, part=parts, state=state, carried=unknown
        )

    def mark_seen(self, batch: pa.RecordBatch, keys: Keys | None = None) -> Status:
        """Mark listed images as seen; return for each whether it is NEW, DONE, STALE or a DUPLICATE of one seen before.

        URIs must be unique within the batch. NEW images are not added to the index.
        """
        versions = Versions.of(batch, keys)
        status = np.full(len(batch), NEW, np.uint8)
        for match in self._rows.lookup(versions.keys):
            rows, state = match.rows, match["state"]
            changed = changed_since(match["size"], versions.sizes[rows], match["tag"], versions.tags[rows])
            retried = (state & _REJECT > 0) & ((state & _PASSING > 0) | (self._retry == "all"))
            seen = state & _SEEN > 0
            stale = (changed | retried) & ~seen  # `mark_changed` compares the version in a second row of an image
            status[rows] = np.where(seen, DUPLICATE, np.where(stale, STALE, DONE))
            match.write("state", state | np.where(stale, _STALE | _SEEN, _SEEN).astype(np.uint8))
        self.stale += int(np.count_nonzero(status == STALE))
        return status

    def mark_changed(self, batch: pa.Table, keys: Keys) -> Mask:
        """Compare DONE images again, since more is known of their versions; return a mask of those that are STALE now."""
        versions = Versions.of(batch, keys)
        changed = np.zeros(len(batch), bool)
        for match in self._rows.lookup(keys):
            rows, state = match.rows, match["state"]
            differs = changed_since(match["size"], versions.sizes[rows], match["tag"], versions.tags[rows])
            stale = (state & _STALE == 0) & differs
            match.write("state", state | np.where(stale, _STALE, 0).astype(np.uint8))
            changed[rows] = stale
        self.stale += int(np.count_nonzero(changed))
        return changed

    def mark_stale(self, uri: str) -> None:
        """Mark the row of one URI as STALE."""
        for match in self._rows.lookup(uri_keys(pa.array([uri]))):
            match.write("state", match["state"] | np.uint8(_STALE))
            self.stale += len(match.rows)

    def take_stale(self, keys: Keys) -> dict[str, KeysByPart]:
        """Return the STALE rows of these images, by table and part, and clear their mark: the caller removes the rows."""
        keys_by_part: dict[str, dict[int, list[Keys]]] = {LABELS_LOG: {}, REJECTS_LOG: {}}
        for match in self._rows.lookup(keys):
            state = match["state"]
            stale = state & _STALE > 0
            rows, parts, rejects = match.rows[stale], match["part"][stale], state[stale] & _REJECT > 0
            for name, in_table in ((LABELS_LOG, ~rejects), (REJECTS_LOG, rejects)):
                for number in np.unique(parts[in_table]).tolist():
                    keys_by_part[name].setdefault(number, []).append(keys[rows[in_table & (parts == number)]])
            match.write("state", state & np.uint8(255 - _STALE))
            self.stale -= len(rows)
        return {
            name: {number: np.concatenate(keys) for number, keys in parts.items()}
            for name, parts in keys_by_part.items()
        }

    def unseen(self, name: str) -> KeysByPart:
        """Return the rows of a table whose images are not listed, by part."""
        reject_bit = _REJECT if name == REJECTS_LOG else 0
        keys_by_part: dict[int, list[Keys]] = {}
        for columns, keys in self._rows.rows():
            unseen = columns["state"] & (_SEEN | _REJECT) == reject_bit
            parts = columns["part"][unseen]
            for number in np.unique(parts).tolist():
                keys_by_part.setdefault(number, []).append(keys[unseen][parts == number])
        return {number: np.concatenate(of_part) for number, of_part in keys_by_part.items()}

    def count_unseen(self) -> int:
        """Return the number of rows whose images are not listed."""
        return sum(int(np.count_nonzero(state & _SEEN == 0)) for state in self._rows.columns("state"))

    def are_rejects(self, keys: Keys) -> Mask:
        """Return a mask of the images with a row in rejects/; True also for images without a row."""
        rejects = np.ones(len(keys), bool)
        for match in self._rows.lookup(keys):
            rejects[match.rows] = match["state"] & _REJECT > 0
        return rejects

    def set_carried(self, name: str, number: int, keys: Keys, hashes: npt.NDArray[np.uint32]) -> None:
        """Set the hashes of the carried values of the rows that a part of a table holds."""
        reject_bit = _REJECT if name == REJECTS_LOG else 0
        for match in self._rows.lookup(keys):
            in_part = (match["part"] == number) & (match["state"] & _REJECT == reject_bit)
            match.write("carried", hashes[match.rows[in_part]], where=in_part)

    def carried(self, keys: Keys, mask: Mask) -> Iterator[tuple[Numbers, Numbers, Mask, npt.NDArray[np.uint32]]]:
        """Yield positions in `keys`, parts, whether in rejects/, and hashes of the masked images that have a row."""
        for match in self._rows.lookup(keys):
            selected = mask[match.rows]
            rejects = match["state"][selected] & _REJECT > 0
            yield match.rows[selected], match["part"][selected].astype(np.int64), rejects, match["carried"][selected]

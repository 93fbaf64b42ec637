"""Effects: rows that are done, and whose carried values are others in the input by now: a manifest was corrected, say.

They are found when all is listed: the index of the ledger gets a hash of the carried values of each row, read from the
parts, and the listing's pages are held against it. Only columns that both a part and the listing have are compared. Nothing
is fetched or classified for such a row; its part is rewritten (`Ledger.correct`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.monitor import tick
from imgbatch.ledger.carried import NewValues, has_value, row_hashes
from imgbatch.ledger.ledger import REJECT, Corrections, Ledger
from imgbatch.ledger.listing import pages
from imgbatch.ledger.repeats import MAX_BUFFERED_BYTES
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.schema import TAR, carried_fields, single_chunk
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import Keys, uri_keys

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]


@dataclass
class _Parts:
    """Which carried columns each part has, of those that the listing has as well."""

    schemas: dict[pa.Schema, int] = field(default_factory=dict)
    of: dict[str, dict[int, int]] = field(default_factory=lambda: {LABELS_LOG: {}, REJECTS_LOG: {}})

    def schemas_of(self, parts: Numbers, rejects: Mask) -> Numbers:
        """Return the number of the schema of each row's part, -1 where it has no such column."""
        found = np.full(len(parts), -1, np.int64)
        for name, mine in ((LABELS_LOG, np.flatnonzero(~rejects)), (REJECTS_LOG, np.flatnonzero(rejects))):
            numbers, which = np.unique(parts[mine], return_inverse=True)
            found[mine] = np.array([self.of[name].get(number, -1) for number in numbers.tolist()], np.int64)[which]
        return found


@dataclass
class _Found:
    """Rows with new values, until they are enough to rewrite the parts that they are in."""

    keys: list[Keys] = field(default_factory=list)
    parts: list[Numbers] = field(default_factory=list)
    rejects: list[Mask] = field(default_factory=list)
    values: list[pa.Table] = field(default_factory=list)
    bytes: int = 0

    def add(self, keys: Keys, parts: Numbers, rejects: Mask, values: pa.Table) -> None:
        self.keys.append(keys)
        self.parts.append(parts)
        self.rejects.append(rejects)
        self.values.append(values)
        self.bytes += values.nbytes + keys.nbytes

    def by_part(self) -> Corrections:
        keys, parts, rejects = np.concatenate(self.keys), np.concatenate(self.parts), np.concatenate(self.rejects)
        values = pa.concat_tables(self.values).combine_chunks()
        corrections: dict[str, dict[int, NewValues]] = {}
        for name, mine in ((LABELS_LOG, np.flatnonzero(~rejects)), (REJECTS_LOG, np.flatnonzero(rejects))):
            rows = mine[np.argsort(parts[mine], kind="stable")]
            numbers, starts = np.unique(parts[rows], return_index=True)
            corrections[name] = {
                number: NewValues(keys[these], values.take(pa.array(these)))
                for number, these in zip(numbers.tolist(), np.split(rows, starts)[1:], strict=True)
            }
        return corrections


def corrections(
    ledger: Ledger,
    listing: Folder,
    carried: pa.Schema,
    pending: Mask,
    *,
    limited: bool = False,
) -> Iterator[Corrections]:
    """Yield what is to be corrected, in batches of bounded size.

    Args:
        ledger: open, and all images visited.
        listing: the folder of the pages.
        carried: the listing's carried columns.
        pending: by number, the images that are to be done anyway.
        limited: the listing ended at its limit, so that a value that it lacks may be in what it did not come to.
    """
    if not carried.names:
        return
    parts = _hash_parts(ledger, carried)
    if not parts.schemas:
        return
    found, first = _Found(), 0
    for page in pages(listing):
        tick()
        _compare(ledger, page, pending[first : first + len(page)], parts, found, limited=limited)
        first += len(page)
        if found.bytes > MAX_BUFFERED_BYTES:
            yield found.by_part()
            found = _Found()
    if found.keys:
        yield found.by_part()


def count_rows(corrected: Corrections) -> int:
    """Return the number of rows."""
    return sum(len(new.keys) for parts in corrected.values() for new in parts.values())


def _hash_parts(ledger: Ledger, carried: pa.Schema) -> _Parts:
    """Note the hash of the carried values of each row in the ledger's index; return which columns the parts have."""
    parts = _Parts()
    for name, log in ((LABELS_LOG, ledger.labels), (REJECTS_LOG, ledger.rejects)):
        for number, table, _ in log.read(["uri"], carried.names):
            tick()
            schema = carried_fields(table.schema.remove_metadata())
            if not len(table) or not schema.names:
                continue
            parts.of[name][number] = parts.schemas.setdefault(schema, len(parts.schemas))
            hashes = row_hashes(table, schema)
            for columns, rows, positions in ledger.done.lookup(uri_keys(single_chunk(table["uri"]))):
                state, part = columns["state"][positions], columns["part"][positions]
                mine = (part == number) & (state & REJECT == (0 if name == LABELS_LOG else REJECT))
                columns["carried"][positions[mine]] = hashes[rows[mine]]
    return parts


def _compare(ledger: Ledger, page: pa.Table, pending: Mask, parts: _Parts, found: _Found, *, limited: bool) -> None:
    """Add the rows of a page whose images are done and have other carried values in their parts."""
    keys = uri_keys(single_chunk(page["uri"]))
    left_alone = pending | np.asarray(pc.fill_null(pc.equal(page["container"], TAR), False))
    for columns, rows, positions in ledger.done.lookup(keys):
        rows, positions = rows[~left_alone[rows]], positions[~left_alone[rows]]
        part, hashes = columns["part"][positions].astype(np.int64), columns["carried"][positions]
        rejects = columns["state"][positions] & REJECT > 0
        schemas = parts.schemas_of(part, rejects)
        for schema, number in parts.schemas.items():
            mine = np.flatnonzero(schemas == number)
            given = page.take(pa.array(rows[mine])).select(schema.names)
            other = row_hashes(given, schema) != hashes[mine]
            for name in schema.names if limited else ():
                other &= has_value(single_chunk(given[name]))
            if other.any():
                at = mine[other]
                values = page.take(pa.array(rows[at])).select(carried_fields(page.schema).names)
                found.add(keys[rows[at]], part[at], rejects[at], values)

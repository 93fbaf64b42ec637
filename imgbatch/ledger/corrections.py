"""Effects: corrections of rows whose carried values have changed in the input, for example in a corrected manifest.

They are computed when all images are listed. The index of the ledger gets a hash of the carried values of each row, read
from the parts, and the listing's pages are compared with it. Only columns that both a part and the listing have are compared.
No image is fetched or classified again; the parts are rewritten (`Ledger.correct`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.concurrency.monitor import tick
from imgbatch.ledger.carried import NewValues, has_value, row_hashes
from imgbatch.ledger.ledger import Corrections, Ledger
from imgbatch.ledger.listing_pages import pages
from imgbatch.ledger.repeats import MAX_BUFFERED_BYTES
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.schema import carried_fields, single_chunk
from imgbatch.sources.base import is_stream
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import Keys, uri_keys

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]


@dataclass
class _PartSchemas:
    """The carried columns that each part and the listing have in common."""

    ids: dict[pa.Schema, int] = field(default_factory=dict)
    by_part: dict[str, dict[int, int]] = field(default_factory=lambda: {LABELS_LOG: {}, REJECTS_LOG: {}})

    def ids_of(self, parts: Numbers, rejects: Mask) -> Numbers:
        """Return the id of the schema of each row's part, -1 where it has no such column."""
        ids = np.full(len(parts), -1, np.int64)
        for name, rows in ((LABELS_LOG, np.flatnonzero(~rejects)), (REJECTS_LOG, np.flatnonzero(rejects))):
            numbers, inverse = np.unique(parts[rows], return_inverse=True)
            ids[rows] = np.array([self.by_part[name].get(number, -1) for number in numbers.tolist()], np.int64)[inverse]
        return ids


@dataclass
class _ChangedRows:
    """Rows with new values, collected until there are enough to rewrite the parts that they are in."""

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
        for name, in_table in ((LABELS_LOG, np.flatnonzero(~rejects)), (REJECTS_LOG, np.flatnonzero(rejects))):
            rows = in_table[np.argsort(parts[in_table], kind="stable")]
            numbers, starts = np.unique(parts[rows], return_index=True)
            corrections[name] = {
                number: NewValues(keys[of_part], values.take(pa.array(of_part)))
                for number, of_part in zip(numbers.tolist(), np.split(rows, starts)[1:], strict=True)
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
    """Yield the corrections, in batches of bounded size.

    Args:
        ledger: open, and all images marked as seen.
        listing: the folder of the pages.
        carried: the listing's carried columns.
        pending: by number, the images that this run labels again anyway.
        limited: the listing ended at its limit. A missing value may be in the input after the limit, so only
            values that the listing has are compared.
    """
    if not carried.names:
        return
    schemas = _hash_parts(ledger, carried)
    if not schemas.ids:
        return
    changed, page_start = _ChangedRows(), 0
    for page in pages(listing):
        tick()
        _compare(ledger, page, pending[page_start : page_start + len(page)], schemas, changed, limited=limited)
        page_start += len(page)
        if changed.bytes > MAX_BUFFERED_BYTES:
            yield changed.by_part()
            changed = _ChangedRows()
    if changed.keys:
        yield changed.by_part()


def count_rows(corrected: Corrections) -> int:
    """Return the number of rows."""
    return sum(len(new_values.keys) for parts in corrected.values() for new_values in parts.values())


def _hash_parts(ledger: Ledger, carried: pa.Schema) -> _PartSchemas:
    """Set the hash of the carried values of each row in the ledger's index; return the carried columns of each part."""
    schemas = _PartSchemas()
    for name, log in ((LABELS_LOG, ledger.labels), (REJECTS_LOG, ledger.rejects)):
        for number, table, _ in log.read(["uri"], carried.names):
            tick()
            schema = carried_fields(table.schema.remove_metadata())
            if not len(table) or not schema.names:
                continue
            schemas.by_part[name][number] = schemas.ids.setdefault(schema, len(schemas.ids))
            ledger.index.set_carried(name, number, uri_keys(single_chunk(table["uri"])), row_hashes(table, schema))
    return schemas


def _compare(
    ledger: Ledger, page: pa.Table, pending: Mask, schemas: _PartSchemas, changed: _ChangedRows, *, limited: bool
) -> None:
    """Add the rows of a page whose images are done and have other carried values in their parts."""
    keys = uri_keys(single_chunk(page["uri"]))
    compared = ~pending & ~np.asarray(is_stream(page))
    for rows, parts, rejects, hashes in ledger.index.carried(keys, compared):
        ids = schemas.ids_of(parts, rejects)
        for schema, schema_id in schemas.ids.items():
            of_schema = np.flatnonzero(ids == schema_id)
            listed = page.take(pa.array(rows[of_schema])).select(schema.names)
            differs = row_hashes(listed, schema) != hashes[of_schema]
            for name in schema.names if limited else ():
                differs &= has_value(single_chunk(listed[name]))
            if differs.any():
                at = of_schema[differs]
                values = page.take(pa.array(rows[at])).select(carried_fields(page.schema).names)
                changed.add(keys[rows[at]], parts[at], rejects[at], values)

"""The books: read back from the store, is each listed image in exactly one row?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from imgbatch.errors import BooksError
from imgbatch.listing import pages
from imgbatch.parts import Log
from imgbatch.storage import Folder
from imgbatch.uris import UriIndex, uri_keys

_SHOWN = 5


@dataclass
class Books:
    """What the tables and the listing come to. All from files; nothing that a run remembers goes in."""

    listed: int = 0
    labelled: int = 0
    """Rows in labels/ of listed images."""
    rejected: int = 0
    """Rows in rejects/ of listed images."""
    kept: int = 0
    """Rows of images that the listing lacks."""
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    double: list[str] = field(default_factory=list)

    def require_balance(self) -> None:
        """Raise if an image is missing or double.

        Raises:
            BooksError: with the sums, and the first few images.
        """
        whole = self.rows == self.listed + self.kept and self.listed == self.labelled + self.rejected
        if self.missing or self.double or not whole:
            sums = f"{self.listed} listed + {self.kept} kept, {self.rows} rows"
            shown = [f"in no row: {uri}" for uri in self.missing] + [f"in two rows: {uri}" for uri in self.double]
            raise BooksError(f"the books do not balance ({sums}). {'; '.join(shown)}")


def audit(output: Folder, listing: Folder | None, pulse: Callable[[], None] = lambda: None) -> Books:
    """Count both tables against a listing; without one, every row counts as listed. `pulse` is called with each part.

    Memory: 18 bytes a row.
    """
    books = Books()
    seen = UriIndex(reject=np.bool_, listed=np.bool_)
    for name, reject in (("labels", False), ("rejects", True)):
        log = Log(output.folder(name))
        log.scan()
        for _, table, _ in log.read(["uri", "reason"] if reject else ["uri"]):
            pulse()
            new = seen.add(
                uri_keys(table["uri"].combine_chunks()),
                reject=np.full(len(table), reject),
                listed=np.full(len(table), listing is None),
            )
            books.rows += len(table)
            books.double += table.filter(pa.array(~new))["uri"].to_pylist()[:_SHOWN]
            if reject:
                books.reasons.update(table["reason"].to_pylist())
    if listing is not None:
        _count_listed(books, seen, listing)
    for columns, _ in seen.rows():
        listed, rejected = columns["listed"], columns["reject"]
        books.labelled += int(np.count_nonzero(listed & ~rejected))
        books.rejected += int(np.count_nonzero(listed & rejected))
        books.kept += int(np.count_nonzero(~listed))
    books.listed = books.listed if listing is not None else len(seen)
    return books


def _count_listed(books: Books, seen: UriIndex, listing: Folder) -> None:
    for page in pages(listing):
        found = np.zeros(len(page), bool)
        for columns, rows, positions in seen.lookup(uri_keys(page["uri"].combine_chunks())):
            columns["listed"][positions] = True
            found[rows] = True
        books.listed += len(page)
        if len(books.missing) < _SHOWN:
            books.missing += page.filter(pa.array(~found))["uri"].to_pylist()[:_SHOWN]

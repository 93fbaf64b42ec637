"""The books: read back from the store, is each listed image in exactly one row?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import BooksError
from imgbatch.listing import pages
from imgbatch.parts import Log
from imgbatch.schema import TAR
from imgbatch.shards import LABELS_LOG, REJECTS_LOG, Shards, version_of
from imgbatch.storage import Folder
from imgbatch.tally import Example, note_examples
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
    examples: dict[str, Example] = field(default_factory=dict)
    """The first reject of each reason."""
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


def audit(
    output: Folder, listing: Folder | None, pulse: Callable[[], None] = lambda: None, *, limited: bool = False
) -> Books:
    """Count both tables against a listing; without one, every row counts as listed. `pulse` is called with each part and page.

    What a tar holds, its parts' footers say: so many rows of its members there have to be. Of a `limited` run's tars, what
    was read counts. Memory: 19 bytes a row.
    """
    books = Books()
    seen = UriIndex(reject=np.bool_, listed=np.bool_, member=np.bool_)
    tars = {LABELS_LOG: Shards(), REJECTS_LOG: Shards()}
    for name, reject in (("labels", False), ("rejects", True)):
        log = Log(output.folder(name))
        log.scan()
        for number, table, footer in log.read(["uri", "reason", "message"] if reject else ["uri"]):
            pulse()
            member = tars[name].take(name, number, table, footer.shards)
            new = seen.add(
                uri_keys(table["uri"].combine_chunks()),
                reject=np.full(len(table), reject),
                listed=np.full(len(table), listing is None),
                member=member & (listing is not None),
            )
            books.rows += len(table)
            books.double += table.filter(pa.array(~new))["uri"].to_pylist()[:_SHOWN]
            if reject:
                reasons, uris, messages = (table[each].to_pylist() for each in ("reason", "uri", "message"))
                books.reasons.update(reasons)
                note_examples(books.examples, reasons, uris, messages)
    if listing is not None:
        _count_listed(books, seen, listing, tars, pulse, limited=limited)
    for columns, _ in seen.rows():
        alone, listed, rejected = ~columns["member"], columns["listed"], columns["reject"]
        books.labelled += int(np.count_nonzero(alone & listed & ~rejected))
        books.rejected += int(np.count_nonzero(alone & listed & rejected))
        books.kept += int(np.count_nonzero(alone & ~listed))
    if listing is not None:
        books.kept += sum(progress.rows for shards in tars.values() for _, progress in shards.kept())
    books.listed = books.listed if listing is not None else len(seen)
    return books


def _count_listed(
    books: Books,
    seen: UriIndex,
    listing: Folder,
    tars: Mapping[str, Shards],
    pulse: Callable[[], None],
    *,
    limited: bool,
) -> None:
    for page in pages(listing):
        pulse()
        is_tar = np.asarray(pc.fill_null(pc.equal(page["container"], TAR), False))
        found = np.zeros(len(page), bool)
        for columns, rows, positions in seen.lookup(uri_keys(page["uri"].combine_chunks())):
            columns["listed"][positions] = True
            found[rows] = True
        books.listed += int(np.count_nonzero(found | ~is_tar))
        if len(books.missing) < _SHOWN:
            books.missing += page.filter(pa.array(~found & ~is_tar))["uri"].to_pylist()[:_SHOWN]
        for at in np.flatnonzero(is_tar).tolist():
            _count_tar(books, page.slice(at, 1).to_pylist()[0], tars, needs_no_end=limited or bool(found[at]))


def _count_tar(books: Books, row: dict[str, Any], tars: Mapping[str, Shards], *, needs_no_end: bool) -> None:
    """Count the members of a listed tar; one that has a reject itself was perhaps not read to its end."""
    version = version_of(row["etag"], row["last_modified"])
    labels, rejects = (tars[name].visit(row["uri"], version) for name in (LABELS_LOG, REJECTS_LOG))
    rows = labels.rows + rejects.rows
    books.listed += rows
    books.labelled += labels.rows
    books.rejected += rejects.rows
    if not needs_no_end and labels.images != rows and len(books.missing) < _SHOWN:
        books.missing.append(
            f"{row['uri']}#… ({rows} rows of {'?' if labels.images is None else labels.images} members)"
        )

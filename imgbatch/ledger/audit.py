"""Effects: the books: read back from the store, is each listed image in exactly one row?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.monitor import tick
from imgbatch.errors import AuditError, NotFound
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.duplicate_parts import Doubles
from imgbatch.ledger.listing import pages
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.ledger.tar_progress import Shards, version_of
from imgbatch.rejects import Example, note_examples
from imgbatch.schema import TAR
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import UriIndex, uri_keys

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
    doubles: Doubles | None = None
    """Parts with second rows."""
    absent: list[str] = field(default_factory=list)
    """Parts whose numbers are missing."""

    @property
    def double(self) -> list[str]:
        """An image of each part with second rows."""
        return list(self.doubles.found.values()) if self.doubles is not None else []

    def require_balance(self) -> None:
        """Raise if an image is missing or double, or a part is missing.

        Raises:
            AuditError: with the sums, the first few images, and what to do.
        """
        whole = self.rows == self.listed + self.kept and self.listed == self.labelled + self.rejected
        if self.missing or self.absent or self.double or not whole:
            sums = f"{self.listed} listed + {self.kept} kept, {self.rows} rows"
            shown = [f"missing: {part}" for part in self.absent[:_SHOWN] if not self.double]  # or a copy left the gap
            shown += [f"in no row: {uri}" for uri in self.missing]
            if self.doubles is not None and self.double:
                remedy = self.doubles.advice()
            else:
                remedy = "run the same classify.py command again, which makes what is missing"
            raise AuditError("; ".join([f"the books do not balance ({sums})", *shown, remedy]))


def audit(
    output: Folder,
    listing: Folder | None,
    *,
    limited: bool = False,
    known: Mapping[str, Sequence[int]] = {},
    log_of: Callable[[Folder, Sequence[int]], Log] = Log,
) -> Books:
    """Count both tables against a listing; without one, every row counts as listed.

    What a tar holds, its parts' footers say: so many rows of its members there have to be. Of a `limited` run's tars, what
    was read counts. Memory: 19 bytes a row.

    Args:
        known: the numbers of the parts, by table, that have to be there.
        log_of: opens a table, given its folder and the numbers known.

    Raises:
        OutputChangedError: one of those is gone.
    """
    doubles = Doubles(output)
    books, tars = Books(doubles=doubles), Shards()
    seen = UriIndex(reject=np.bool_, listed=np.bool_, member=np.bool_)
    for name, reject in ((LABELS_LOG, False), (REJECTS_LOG, True)):
        log = log_of(output.folder(name), known.get(name, ()))
        log.scan()
        books.absent += [log.uri(number) for number in log.missing[:_SHOWN]]
        for number, table, footer in log.read(["uri", "reason", "message"] if reject else ["uri"]):
            tick()
            member = tars.take(name, number, table, footer.shards)
            new = seen.add(
                uri_keys(table["uri"].combine_chunks()),
                reject=np.full(len(table), reject),
                listed=np.full(len(table), listing is None),
                member=member & (listing is not None),
            )
            books.rows += len(table)
            doubles.note(name, number, table, ~new)
            if reject:
                books.reasons.update(table["reason"].to_pylist())
                note_examples(books.examples, table)
    if listing is not None:
        _count_listed(books, seen, listing, tars, limited=limited)
    for columns, _ in seen.rows():
        alone, listed, rejected = ~columns["member"], columns["listed"], columns["reject"]
        books.labelled += int(np.count_nonzero(alone & listed & ~rejected))
        books.rejected += int(np.count_nonzero(alone & listed & rejected))
        books.kept += int(np.count_nonzero(alone & ~listed))
    if listing is not None:
        books.kept += sum(progress.rows for _, progress in tars.kept())
    books.listed = books.listed if listing is not None else len(seen)
    return books


def _count_listed(
    books: Books,
    seen: UriIndex,
    listing: Folder,
    tars: Shards,
    *,
    limited: bool,
) -> None:
    for page in _listed(listing):
        tick()
        is_tar = np.asarray(pc.fill_null(pc.equal(page["container"], TAR), False))
        found = np.zeros(len(page), bool)
        for columns, rows, positions in seen.lookup(uri_keys(page["uri"].combine_chunks())):
            columns["listed"][positions] = True
            found[rows] = True
        books.listed += int(np.count_nonzero(found | ~is_tar))
        if len(books.missing) < _SHOWN:
            books.missing += page.filter(pa.array(~found & ~is_tar))["uri"].to_pylist()[:_SHOWN]
        for at in np.flatnonzero(is_tar).tolist():
            _count_tar(books, page.slice(at, 1).to_pylist()[0], tars, limited=limited, refused=bool(found[at]))


def _listed(listing: Folder) -> Iterator[pa.Table]:
    """Yield the pages of a listing.

    Raises:
        AuditError: one is missing or damaged.
    """
    found = pages(listing)
    while True:
        try:
            page = next(found, None)
        except (NotFound, pa.ArrowException) as error:
            raise AuditError(
                f"the listing {listing.uri} is damaged ({error}): run the same classify.py command again, which lists anew"
            ) from error
        if page is None:
            return
        yield page


def _count_tar(books: Books, row: dict[str, Any], tars: Shards, *, limited: bool, refused: bool) -> None:
    """Count the members of a listed tar; one that has a reject itself was perhaps not read to its end."""
    read = tars.visit(row["uri"], version_of(row["etag"], row["last_modified"]))
    books.listed += read.rows
    books.labelled += read.rows_in(LABELS_LOG)
    books.rejected += read.rows_in(REJECTS_LOG)
    whole = read.closed and not read.reached.torn
    if not (limited or refused or whole) and len(books.missing) < _SHOWN:
        members = "?" if read.images is None else read.images
        books.missing.append(f"{row['uri']}#… ({read.rows} rows of {members} members)")

"""Effects: the audit of an output: both tables are read back from the store and compared with the listing."""

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
from imgbatch.ledger.duplicate_parts import DuplicateParts
from imgbatch.ledger.listing_pages import pages
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.ledger.tar_progress import TarIndex, version_of
from imgbatch.rejects import Example, note_examples
from imgbatch.schema import TAR
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import UriIndex, uri_keys

_SHOWN = 5


@dataclass
class AuditResult:
    """The counts of an output. All are read from files; nothing that a run remembers goes in."""

    listed: int = 0
    labelled: int = 0
    """Rows in labels/ of listed images."""
    rejected: int = 0
    """Rows in rejects/ of listed images."""
    kept: int = 0
    """Rows of images that are not listed."""
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    """The first reject of each reason."""
    missing: list[str] = field(default_factory=list)
    """The first few listed images without a row."""
    duplicates: DuplicateParts | None = None
    """Parts with second rows."""
    missing_parts: list[str] = field(default_factory=list)
    """Parts whose numbers are missing."""

    @property
    def duplicated(self) -> list[str]:
        """An image of each part with second rows."""
        return list(self.duplicates.examples.values()) if self.duplicates is not None else []

    def require_reconciled(self) -> None:
        """Require that each listed image is in exactly one row, and that no part is missing.

        Raises:
            AuditError: with the sums, the first few images, and what to do.
        """
        equal = self.rows == self.listed + self.kept and self.listed == self.labelled + self.rejected
        if self.missing or self.missing_parts or self.duplicated or not equal:
            sums = f"{self.listed} listed + {self.kept} kept, {self.rows} rows"
            # Where rows are duplicated, the number of a copied part may have left the gap: only the copy is named.
            shown = [f"missing: {part}" for part in self.missing_parts[:_SHOWN] if not self.duplicated]
            shown += [f"in no row: {uri}" for uri in self.missing]
            if self.duplicates is not None and self.duplicated:
                remedy = self.duplicates.advice()
            else:
                remedy = "run the same classify.py command again, which labels what is missing"
            raise AuditError("; ".join([f"the counts do not reconcile ({sums})", *shown, remedy]))


def audit(
    output: Folder,
    listing: Folder | None,
    *,
    limited: bool = False,
    known: Mapping[str, Sequence[int]] = {},
    log_of: Callable[[Folder, Sequence[int]], Log] = Log,
) -> AuditResult:
    """Count both tables against a listing.

    The footers of the parts record how many members a tar has, and so many rows must exist. Of the tars of a `limited` run,
    only what was read counts. Memory: 19 bytes a row.

    Args:
        output: the folder of the output.
        listing: the folder of the listing's pages; None: every row counts as listed.
        limited: the run had a limit.
        known: the numbers of the parts, by table, that have to exist.
        log_of: opens a table, given its folder and its known numbers.

    Raises:
        OutputChangedError: one of those parts is gone.
    """
    result, tars = AuditResult(duplicates=DuplicateParts(output)), TarIndex()
    seen = UriIndex(reject=np.bool_, listed=np.bool_, member=np.bool_)
    for name in (LABELS_LOG, REJECTS_LOG):
        _read_table(
            result, name, log_of(output.folder(name), known.get(name, ())), seen, tars, all_listed=listing is None
        )
    if listing is not None:
        _count_listed(result, seen, listing, tars, limited=limited)
    for columns, _ in seen.rows():
        alone, listed, rejected = ~columns["member"], columns["listed"], columns["reject"]
        result.labelled += int(np.count_nonzero(alone & listed & ~rejected))
        result.rejected += int(np.count_nonzero(alone & listed & rejected))
        result.kept += int(np.count_nonzero(alone & ~listed))
    if listing is not None:
        result.kept += sum(progress.rows for _, progress in tars.unlisted())
    else:
        result.listed = len(seen)
    return result


def _read_table(result: AuditResult, name: str, log: Log, seen: UriIndex, tars: TarIndex, *, all_listed: bool) -> None:
    """Read all parts of a table: count its rows, and find those of images that already have one."""
    log.scan()
    rejects = name == REJECTS_LOG
    result.missing_parts += [log.uri(number) for number in log.missing[:_SHOWN]]
    for number, table, footer in log.read(["uri", "reason", "message"] if rejects else ["uri"]):
        tick()
        members = tars.take(name, number, table, footer.tars)
        new = seen.add(
            uri_keys(table["uri"].combine_chunks()),
            reject=np.full(len(table), rejects),
            listed=np.full(len(table), all_listed),
            # Members of tars are not on the listing's pages: `_count_tar` counts them by the footers.
            member=members & (not all_listed),
        )
        result.rows += len(table)
        if result.duplicates is not None:
            result.duplicates.note(name, number, table, ~new)
        if rejects:
            result.reasons.update(table["reason"].to_pylist())
            note_examples(result.examples, table)


def _count_listed(result: AuditResult, seen: UriIndex, listing: Folder, tars: TarIndex, *, limited: bool) -> None:
    """Mark the rows of listed images in `seen`, and count listed images with and without a row."""
    for page in _listed(listing):
        tick()
        is_tar = np.asarray(pc.fill_null(pc.equal(page["container"], TAR), False))
        has_row = np.zeros(len(page), bool)
        for match in seen.lookup(uri_keys(page["uri"].combine_chunks())):
            match.write("listed", True)
            has_row[match.rows] = True
        result.listed += int(np.count_nonzero(has_row | ~is_tar))
        if len(result.missing) < _SHOWN:
            result.missing += page.filter(pa.array(~has_row & ~is_tar))["uri"].to_pylist()[:_SHOWN]
        for at in np.flatnonzero(is_tar).tolist():
            _count_tar(result, page.slice(at, 1).to_pylist()[0], tars, limited=limited, refused=bool(has_row[at]))


def _listed(listing: Folder) -> Iterator[pa.Table]:
    """Yield the pages of a listing.

    Raises:
        AuditError: one is missing or damaged.
    """
    remaining = pages(listing)
    while True:
        try:
            page = next(remaining, None)
        except (NotFound, pa.ArrowException) as error:
            raise AuditError(
                f"the listing {listing.uri} is damaged ({error}): run the same classify.py command again, which lists anew"
            ) from error
        if page is None:
            return
        yield page


def _count_tar(result: AuditResult, row: dict[str, Any], tars: TarIndex, *, limited: bool, refused: bool) -> None:
    """Count the members of a listed tar. If the tar itself has a reject, it may not have been read to its end."""
    progress = tars.mark_seen(row["uri"], version_of(row["etag"], row["last_modified"]))
    result.listed += progress.rows
    result.labelled += progress.rows_in(LABELS_LOG)
    result.rejected += progress.rows_in(REJECTS_LOG)
    complete = progress.closed and not progress.reached.truncated
    if not (limited or refused or complete) and len(result.missing) < _SHOWN:
        members = "?" if progress.member_count is None else progress.member_count
        result.missing.append(f"{row['uri']}#… ({progress.rows} rows of {members} members)")

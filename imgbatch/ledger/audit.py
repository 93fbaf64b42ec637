"""Effects: the audit of an output: it reads both tables back from the store, and compares them with the listing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.concurrency.monitor import tick
from imgbatch.errors import AuditError, NotFound
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.duplicate_parts import DuplicateParts
from imgbatch.ledger.listing_pages import pages
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.ledger.tar_progress import TarIndex
from imgbatch.rejects import Example, note_examples
from imgbatch.sources.base import is_stream
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import UriIndex, uri_keys

_SHOWN = 5


@dataclass
class AuditResult:
    """The counts of an output. All are read from files, none from the memory of a run."""

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
    """The URIs of parts that are missing in the sequence of numbers."""

    @property
    def duplicated(self) -> list[str]:
        """An image of each part with second rows."""
        return list(self.duplicates.examples.values()) if self.duplicates is not None else []

    def require_reconciled(self) -> None:
        """Require that each listed image is in exactly one row, and that no part is missing.

        Raises:
            AuditError: with the sums, the first few images, and the remedy.
        """
        equal = self.rows == self.listed + self.kept and self.listed == self.labelled + self.rejected
        if self.missing or self.missing_parts or self.duplicated or not equal:
            sums = f"{self.listed} listed + {self.kept} kept, {self.rows} rows"
            # If a part was copied to a higher number, the numbers between are missing too: then only the copy is named.
            shown = [f"missing: {part}" for part in self.missing_parts[:_SHOWN] if not self.duplicated]
            shown += [f"in no row: {uri}" for uri in self.missing]
            if self.duplicates is not None and self.duplicated:
                remedy = self.duplicates.advice()
            else:
                remedy = "run the same classify.py command again, which labels the missing images"
            raise AuditError("; ".join([f"the counts do not reconcile ({sums})", *shown, remedy]))


def audit(
    output: Folder,
    listing: Folder | None,
    *,
    limited: bool = False,
    part_numbers: Mapping[str, Sequence[int]] = {},
    log_of: Callable[[Folder, Sequence[int]], Log] = Log,
) -> AuditResult:
    """Count both tables against a listing.

    The footers of the parts record how many images a stream has; the tables must contain as many rows. Of the streams
    of a `limited` run, only images that were read count. Memory: 19 bytes a row.

    Args:
        output: the folder of the output.
        listing: the folder of the listing's pages; None: every row counts as listed.
        limited: the run had a limit.
        part_numbers: the numbers of the parts, by table, that have to exist.
        log_of: opens a table, from its folder and these numbers.

    Raises:
        OutputChangedError: one of those parts is gone.
    """
    result, streams = AuditResult(duplicates=DuplicateParts(output)), TarIndex()
    index = UriIndex(reject=np.bool_, listed=np.bool_, member=np.bool_)
    for name in (LABELS_LOG, REJECTS_LOG):
        _read_table(
            result,
            name,
            log_of(output.folder(name), part_numbers.get(name, ())),
            index,
            streams,
            all_listed=listing is None,
        )
    if listing is not None:
        _count_listed(result, index, listing, streams, limited=limited)
    for columns, _ in index.rows():
        alone, listed, rejected = ~columns["member"], columns["listed"], columns["reject"]
        result.labelled += int(np.count_nonzero(alone & listed & ~rejected))
        result.rejected += int(np.count_nonzero(alone & listed & rejected))
        result.kept += int(np.count_nonzero(alone & ~listed))
    if listing is not None:
        result.kept += streams.unlisted_rows()
    else:
        result.listed = len(index)
    return result


def _read_table(
    result: AuditResult, name: str, log: Log, index: UriIndex, streams: TarIndex, *, all_listed: bool
) -> None:
    """Read all parts of a table: count its rows, and find those of images that already have one."""
    log.scan()
    rejects = name == REJECTS_LOG
    result.missing_parts += [log.uri(number) for number in log.missing[:_SHOWN]]
    for number, table, footer in log.read(["uri", "reason", "message"] if rejects else ["uri"]):
        tick()
        members = streams.take(name, number, table, footer.streams)
        is_new = index.add(
            uri_keys(table["uri"].combine_chunks()),
            reject=np.full(len(table), rejects),
            listed=np.full(len(table), all_listed),
            # Images in streams are not on the listing's pages: `_count_stream` counts them by the footers.
            member=members & (not all_listed),
        )
        result.rows += len(table)
        if result.duplicates is not None:
            result.duplicates.note(name, number, table, ~is_new)
        if rejects:
            result.reasons.update(table["reason"].to_pylist())
            note_examples(result.examples, table)


def _count_listed(result: AuditResult, index: UriIndex, listing: Folder, streams: TarIndex, *, limited: bool) -> None:
    """Mark the rows of listed images in `index`, and count listed images with and without a row."""
    for page in _listed(listing):
        tick()
        in_place = np.asarray(is_stream(page))
        has_row = np.zeros(len(page), bool)
        for match in index.lookup(uri_keys(page["uri"].combine_chunks())):
            match.write("listed", True)
            has_row[match.rows] = True
        result.listed += int(np.count_nonzero(has_row | ~in_place))
        if len(result.missing) < _SHOWN:
            result.missing += page.filter(pa.array(~has_row & ~in_place))["uri"].to_pylist()[:_SHOWN]
        for at in np.flatnonzero(in_place).tolist():
            _count_stream(result, page.slice(at, 1).to_pylist()[0], streams, limited=limited, refused=bool(has_row[at]))


def _listed(listing: Folder) -> Iterator[pa.Table]:
    """Yield the pages of a listing.

    Raises:
        AuditError: a page is missing or damaged.
    """
    remaining = pages(listing)
    while True:
        try:
            page = next(remaining, None)
        except (NotFound, pa.ArrowException) as error:
            raise AuditError(
                f"the listing {listing.uri} is damaged ({error}): run the same classify.py command again, which "
                "lists the inputs again"
            ) from error
        if page is None:
            return
        yield page


def _count_stream(result: AuditResult, row: dict[str, Any], streams: TarIndex, *, limited: bool, refused: bool) -> None:
    """Count the images of a listed stream. If the stream itself has a reject, it may not have been read to its end."""
    counted = streams.count_listed(row)
    result.listed += counted.labelled + counted.rejected
    result.labelled += counted.labelled
    result.rejected += counted.rejected
    if not (limited or refused or counted.complete) and len(result.missing) < _SHOWN:
        result.missing.append(counted.description)

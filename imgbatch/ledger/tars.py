"""Effects: listed tars in the ledger: how many rows each has, and the cursor of one of which there is more to read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from imgbatch.ledger.status import DONE, NEW, STALE
from imgbatch.ledger.streams import OpenedStream
from imgbatch.ledger.tar_cursor import TarCursor
from imgbatch.ledger.tar_progress import members_of, version_of

if TYPE_CHECKING:
    from imgbatch.ledger.ledger import Ledger


def open_tar(ledger: Ledger, row: Mapping[str, Any], status: int) -> OpenedStream:
    """Return how far a listed tar is read, and a cursor from the first offset at which rows are missing.

    Args:
        ledger: open.
        row: of the listing.
        status: of the row of the tar itself: NEW where it has none.

    Raises:
        AuditError: a member has two rows.
    """
    uri = row["uri"]
    version = ledger.streams.version(uri, version_of(row["etag"], row["last_modified"]))
    progress = ledger.streams.mark_seen(uri, version)
    has_reject = status != NEW
    if progress.closed and status != STALE and (has_reject or not progress.reached.truncated):
        return OpenedStream(progress.rows + int(status == DONE), DONE)
    duplicated = ledger.index_rows(ledger.streams.parts_of(uri, version), partial(members_of, tar=uri))
    cursor = TarCursor.of(uri, version, progress, ledger.mark_seen)
    if status == DONE and not cursor.unbroken:
        # The tar itself has a reject, which says how its reading ended. Rows before that are missing, so the tar is read again
        # and gets a new one.
        ledger.index.mark_stale(uri)
        status = STALE
    rows = progress.rows - duplicated
    if status == DONE:  # the tar itself has a reject, and it stays
        return OpenedStream(rows + 1, DONE)
    cursor.was_rejected = status == STALE
    return OpenedStream(rows, status, cursor)

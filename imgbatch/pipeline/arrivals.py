"""Effects: arrivals of rows: which rows are new, up to the limit of the run, and rejects in place of lost rows.

Ray may compute a block again and deliver it twice, or never: the work plan records what has arrived.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from imgbatch.ledger.listing_pages import Pages
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.schema import RESULTS, carried_fields, with_carried
from imgbatch.sources.base import StreamEnd
from imgbatch.storage.stores import Folder

log = logging.getLogger(__name__)


@dataclass
class Arrivals:
    """Accepts the first row of each image, and rows of a stream in its order, up to the limit of the run."""

    work_plan: WorkPlan
    remaining: int | None = None
    """The number of rows of streams that are still accepted; None: no limit."""

    def __post_init__(self) -> None:
        if self.remaining is not None:  # the images in streams that have rows already may be more than the limit
            self.remaining = max(0, self.remaining)
            self.close_at_limit()

    def accept(self, rows: pa.Table, ends: Sequence[StreamEnd]) -> pa.Table:
        """Return the rows that are new, and mark their images as arrived.

        Args:
            rows: RESULTS with carried columns.
            ends: how readers reached the ends of streams.
        """
        before = self.work_plan.found.rows
        rows = self.work_plan.accept(rows, ends, self.remaining)
        if self.remaining is not None:
            self.remaining -= self.work_plan.found.rows - before
        return rows

    def close_at_limit(self) -> bool:
        """Stop reading streams once the run's limit is reached; return whether nothing is pending then."""
        if self.remaining == 0:
            self.work_plan.stop_streams()
        return self.remaining == 0 and not self.work_plan.remaining

    def lost_rows(self, listing: Folder, tries: int) -> pa.Table | None:
        """Return rejects for images that are pending after the last attempt: alone in a process, each ended it `tries` times.

        They are transient, so that the next run tries again: in the last round images are decoded in a child process, so the
        process around the decoder died. A stream gets one reject for all images that were not read.
        """
        lost = self.work_plan.take_lost()
        if not len(lost):
            return None
        listed = Pages(listing).rows(lost)
        message = "its process died in each attempt, while it processed no other image"
        values = {"stage": "decode", "reason": "crashed", "message": message, "passing": True, "attempts": tries}
        columns = {"index": pa.array(lost), **{name: listed[name] for name in listed.column_names}}
        schema = with_carried(RESULTS, carried_fields(listed.schema))
        for column in schema:
            if column.name not in columns:
                columns[column.name] = pa.repeat(pa.scalar(values.get(column.name), column.type), len(lost))
        return pa.table(columns).select(schema.names).cast(schema)

    def warn_of_unpaired(self) -> None:
        """Warn that sidecars were not read."""
        found = self.work_plan.found
        if found.unpaired:
            log.warning(
                "%s members .cls, .json and .txt of tars are not next to an image of their name, such as %s: they are in no "
                "table. A tar is read in its order; write it in the order of names (tar --sort=name)",
                f"{found.unpaired:,}",
                found.unpaired_example,
            )

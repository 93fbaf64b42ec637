"""Effects: which rows of the workers are new, and what is still pending: images, and tars up to the last member that arrived.

Ray may compute a block again and deliver it twice, or never: one bit per listed image records whether its row has arrived.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Counts
from imgbatch.ledger.listing_pages import Pages
from imgbatch.ledger.tar_cursor import deduplicate
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.schema import RESULTS, carried_fields, with_carried
from imgbatch.storage.stores import Folder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TarCounts:
    """What was found in tars, which the listing did not know."""

    rows: int = 0
    """Rows of their members, and of tars that could not be read."""
    ignored: int = 0
    """Members that are no images."""
    unpaired: int = 0
    """Sidecars that do not lie beside an image of their name."""

    def added_to(self, listed: Counts) -> Counts:
        """Return the counts of a listing with those of its tars."""
        return replace(
            listed,
            listed=listed.listed + self.rows,
            ignored=listed.ignored + self.ignored,
            unpaired=listed.unpaired + self.unpaired,
        )


@dataclass
class Arrivals:
    """Accepts each image's first row, and those of a tar in the order of its members; owns what is pending."""

    work_plan: WorkPlan
    ledger: Ledger
    """Says which members of tars have a row already."""
    remaining: int | None = None
    """How many members of tars may come yet; None: no limit."""
    _tar_rows: int = 0
    _ignored_members: int = 0
    _unpaired: int = 0
    unpaired_example: str = ""
    _touched: set[int] = field(default_factory=set)
    """Tars whose progress the next commit records."""

    def __post_init__(self) -> None:
        if self.remaining is not None:  # the members that have rows already may be more than the limit
            self.remaining = max(0, self.remaining)
            self.close_at_limit()

    def accept(self, rows: pa.Table, tars_read: Sequence[dict[str, Any]]) -> pa.Table:
        """Return the rows that are new, and mark their images as arrived.

        Args:
            rows: RESULTS with carried columns.
            tars_read: the reports of readers that came to the end of their tar.
        """
        if not self.work_plan.tars:
            return self._first_rows(rows)
        is_member = pc.is_valid(rows["offset"])
        members = rows.filter(is_member)
        new = pa.concat_tables([self._first_rows(rows.filter(pc.invert(is_member))), *self._next_members(members)])
        self._close_tars(tars_read, set(pc.unique(members["index"]).to_pylist()))
        return new

    @property
    def tar_counts(self) -> TarCounts:
        """What was found in tars so far."""
        return TarCounts(self._tar_rows, self._ignored_members, self._unpaired)

    @property
    def has_tar_progress(self) -> bool:
        """Whether tars were read further since `take_tar_progress`, even if none of their rows is new."""
        return bool(self._touched)

    def take_tar_progress(self) -> dict[str, dict[str, Any]]:
        """Return how far tars are read with all rows accepted so far, by URI: of the tars that changed since the last call."""
        numbers, self._touched = sorted(self._touched), set()
        return {self.work_plan.tars[number].uri: self.work_plan.tars[number].entry() for number in numbers}

    def close_at_limit(self) -> bool:
        """Stop reading tars once the run's limit is reached; return whether nothing is pending then."""
        if self.remaining == 0:
            for number, tar in self.work_plan.tars.items():
                # A reject of the tar itself, of an earlier run, counts as long as this run has no row in its place.
                self._tar_rows += bool(tar.refused and self.work_plan.pending[number])
            self.work_plan.mark_arrived(self.work_plan.tars)
        return self.remaining == 0 and not self.work_plan.remaining

    def lost_rows(self, listing: Folder, tries: int) -> pa.Table | None:
        """Return rejects for what is pending after the last attempt: alone in its process, each image ended it `tries` times.

        They are transient, so that the next run tries again: images are decoded in a child process by then, so that it was
        the process around the decoder that died. Of a tar one reject stands for all that was not read.
        """
        # A truncated tar has its reject already.
        self.work_plan.mark_arrived(number for number, tar in self.work_plan.tars.items() if tar.truncated)
        lost = np.flatnonzero(self.work_plan.pending)
        if not len(lost):
            return None
        self._tar_rows += int(np.isin(lost, list(self.work_plan.tars)).sum())
        listed = Pages(listing).rows(lost)
        message = "the process that worked on it died, each time, with nothing else in it"
        values = {"stage": "decode", "reason": "crashed", "message": message, "passing": True, "attempts": tries}
        columns = {"index": pa.array(lost), **{name: listed[name] for name in listed.column_names}}
        schema = with_carried(RESULTS, carried_fields(listed.schema))
        for column in schema:
            if column.name not in columns:
                columns[column.name] = pa.repeat(pa.scalar(values.get(column.name), column.type), len(lost))
        return pa.table(columns).select(schema.names).cast(schema)

    def warn_of_unpaired(self) -> None:
        """Warn that sidecars were not read."""
        if self._unpaired:
            log.warning(
                "%s members .cls, .json and .txt of tars do not lie beside an image of their name, such as %s: they are in no "
                "table. A tar is read in its order; write it in that of its names (tar --sort=name)",
                f"{self._unpaired:,}",
                self.unpaired_example,
            )

    def _first_rows(self, rows: pa.Table) -> pa.Table:
        """Return the rows of images that did not arrive before."""
        numbers = rows["index"].to_numpy()
        new = self.work_plan.mark_arrived(numbers)
        return rows if new.all() else rows.filter(pa.array(new))

    def _next_members(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Yield, tar by tar, the rows that follow the last ones that arrived. Members are not in the listing."""
        numbers = rows["index"].to_numpy()
        for number in np.unique(numbers).tolist():
            tar = self.work_plan.tars[number]
            offered = rows.filter(pa.array(numbers == number))
            # Up to a limit they are admitted step by step: rows that are in the tables already do not count. `admit` keeps
            # what it does not return, so that nothing is offered in the later steps.
            while self.remaining != 0 and len(admitted := tar.admit(offered, self.remaining)):
                self._touched.add(number)
                admitted = deduplicate(tar, admitted, self.ledger.index.mark_seen)
                self._tar_rows += len(admitted)
                self.remaining = None if self.remaining is None else self.remaining - len(admitted)
                yield admitted
                if self.remaining is None:
                    break
                offered = offered.slice(0, 0)

    def _close_tars(self, tars_read: Sequence[dict[str, Any]], moved: set[int]) -> None:
        """Close the tars whose readers came to their end and of which no row is missing.

        The report of the end may overtake rows: it is kept until they have arrived.
        """
        for report in tars_read:
            self.work_plan.tars[report["number"]].end_report = report
        for number in sorted(moved | {report["number"] for report in tars_read}):
            tar = self.work_plan.tars[number]
            end = tar.end_report
            if end is not None and end["last_offset"] == tar.last_offset and self.work_plan.pending[number]:
                tar.closed = end["whole"]
                self.work_plan.mark_arrived([number])
                self._touched.add(number)
                self._ignored_members += end["ignored"]
                if end["unpaired"]:
                    self._unpaired += end["unpaired"]
                    self.unpaired_example = self.unpaired_example or end["unpaired_example"]

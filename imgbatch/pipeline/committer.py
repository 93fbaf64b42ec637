"""Effects: takes blocks of result rows on the driver, and commits the first row of each image, every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa

from imgbatch.errors import ImgbatchError
from imgbatch.inference.messages import received
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.pipeline.arrivals import Arrivals
from imgbatch.pipeline.canary import require_canary
from imgbatch.pipeline.run_statistics import RunStatistics
from imgbatch.pipeline.store_health import StoreHealth
from imgbatch.report.row_samples import RowSamples
from imgbatch.schema import PLACE_COLUMNS, RESULTS
from imgbatch.storage.stores import Folder

log = logging.getLogger(__name__)

_MAX_BUFFERED_ROWS = 4_096


@dataclass
class Committer:
    """Buffers new rows, and commits them. On exit it commits the rest of the buffer."""

    ledger: Ledger
    run_id: str
    model: str
    arrivals: Arrivals
    statistics: RunStatistics
    health: StoreHealth
    commit_s: float
    clock: Callable[[], float] = time.monotonic
    samples: RowSamples = field(default_factory=RowSamples)
    """Rows for the report."""
    last_commit: str | None = None
    """The time of the last commit: UTC, ISO 8601."""
    committed: int = 0
    """The number of rows of this run that are in the tables."""
    _buffer: list[pa.Table] = field(default_factory=list)
    _buffered_rows: int = 0
    _committed: float = 0.0

    def __post_init__(self) -> None:
        self._committed = self.clock()

    @property
    def work_plan(self) -> WorkPlan:
        """The pending images and tars."""
        return self.arrivals.work_plan

    @property
    def arrived(self) -> int:
        """The number of images of this run with a row that is committed, or buffered."""
        return self.statistics.arrived

    @property
    def left_out(self) -> Mapping[str, Mapping[str, str]]:
        """Nodes whose workers give wrong answers."""
        return self.statistics.left_out

    def take(self, block: pa.Table) -> None:
        """Take one block of results.

        Raises:
            ImgbatchError: the block contains an error, its node fails the canary, or the store of the input is unreachable.
        """
        rows, notes, ends = received(block)
        self.statistics.add_notes(notes)
        require_canary(notes)
        rows = self.arrivals.accept(rows, ends)
        if not len(rows):
            return
        self._buffer.append(rows.drop_columns(["index", *PLACE_COLUMNS]))
        self._buffered_rows += len(rows)
        self.statistics.count(rows)
        self.samples.take(rows)
        # Last: if this raises, `__exit__` still commits the rows that have arrived.
        self.health.check(rows)

    def reject_lost(self, listing: Folder, tries: int) -> None:
        """Take a reject for each image that is pending after the last attempt."""
        rows = self.arrivals.lost_rows(listing, tries)
        if rows is not None:
            self.take(rows)

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        late = self.clock() - self._committed >= self.commit_s
        waiting = bool(self._buffer) or self.work_plan.has_progress
        return self._buffered_rows >= _MAX_BUFFERED_ROWS or (waiting and late)

    def commit(self) -> None:
        """Write the rows in the buffer, and the progress of streams with them."""
        if self._buffer or self.work_plan.has_progress:
            no_rows = RESULTS.empty_table().drop_columns(["index", *PLACE_COLUMNS])
            rows = pa.concat_tables(self._buffer or [no_rows], promote_options="default")
            # Emptied first: a commit that failed is not repeated by `__exit__`, since parts of it may be in the store.
            self._buffer, self._buffered_rows = [], 0
            progress = self.work_plan.take_progress()
            started = self.clock()
            self.ledger.commit(rows, self.run_id, self.model, progress)
            self.statistics.add_seconds("commit", self.clock() - started)
            self.committed += len(rows)
            self.last_commit = datetime.now(UTC).isoformat(timespec="seconds")
        self._committed = self.clock()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Commit the rest of the buffer. If the run has failed, its own error is reported, not one of this commit."""
        try:
            self.commit()
        except ImgbatchError as commit_error:
            if error is None:
                raise
            log.error("the last rows could not be committed, and the next run computes them again: %s", commit_error)

"""Effects: takes blocks of result rows on the driver, and commits the first row of each image, every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from imgbatch.errors import ImgbatchError
from imgbatch.inference.messages import received
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.pipeline.arrivals import Arrivals
from imgbatch.pipeline.run_statistics import RunStatistics
from imgbatch.pipeline.store_health import StoreHealth
from imgbatch.schema import PLACE_COLUMNS, RESULTS
from imgbatch.storage.stores import Folder

log = logging.getLogger(__name__)

_MAX_BUFFERED_ROWS = 4_096


@dataclass
class Committer:
    """Buffers the rows that are new, and commits them. On exit it commits what is left in the buffer."""

    ledger: Ledger
    run_id: str
    model: str
    arrivals: Arrivals
    statistics: RunStatistics
    health: StoreHealth
    commit_s: float
    clock: Callable[[], float] = time.monotonic
    _buffer: list[pa.Table] = field(default_factory=list)
    _buffered_rows: int = 0
    _committed: float = 0.0

    def __post_init__(self) -> None:
        self._committed = self.clock()

    @property
    def work_plan(self) -> WorkPlan:
        """What is pending."""
        return self.arrivals.work_plan

    @property
    def arrived(self) -> int:
        """How many images of this run have a row, committed or about to be."""
        return self.statistics.arrived

    @property
    def left_out(self) -> Mapping[str, Mapping[str, str]]:
        """Nodes whose workers give wrong answers."""
        return self.statistics.left_out

    def take(self, block: pa.Table) -> None:
        """Take one block of results.

        Raises:
            ImgbatchError: the block holds an error in place of rows, or the store is away.
        """
        rows, notes, tars_read = received(block)
        self.statistics.add_notes(notes)
        rows = self.arrivals.accept(rows, tars_read)
        if not len(rows):
            return
        self._buffer.append(rows.drop_columns(["index", *PLACE_COLUMNS]))
        self._buffered_rows += len(rows)
        self.statistics.count(rows)
        # Last: what has arrived is committed on the way out, also if the store is away.
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
        waiting = bool(self._buffer) or self.arrivals.has_tar_progress
        return self._buffered_rows >= _MAX_BUFFERED_ROWS or (waiting and late)

    def commit(self) -> None:
        """Write what is in the buffer, and how far tars are read with it."""
        if self._buffer or self.arrivals.has_tar_progress:
            nothing = RESULTS.empty_table().drop_columns(["index", *PLACE_COLUMNS])
            rows = pa.concat_tables(self._buffer or [nothing], promote_options="default")
            # Emptied first: a commit that failed is not repeated by `__exit__`, since parts of it may be in the store.
            self._buffer, self._buffered_rows = [], 0
            tar_progress = self.arrivals.take_tar_progress()
            started = self.clock()
            self.ledger.commit(rows, self.run_id, self.model, tar_progress)
            self.statistics.add_seconds("commit", self.clock() - started)
        self._committed = self.clock()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Commit what is left, also where the run fails: its own error is then the one to report."""
        try:
            self.commit()
        except ImgbatchError as second:
            if error is None:
                raise
            log.error("the last rows could not be committed, and will be made again: %s", second)

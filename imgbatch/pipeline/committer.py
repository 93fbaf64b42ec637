"""Effects: what becomes of result rows on the driver: each image's first row goes into the ledger, every few seconds.

Ray may compute a block again and deliver it twice, or never: one bit a listed image says what has arrived.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import ClusterError, ImgbatchError, Unreachable
from imgbatch.inference.messages import received
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import WorkPlan
from imgbatch.ledger.listing_pages import Pages
from imgbatch.ledger.tar_cursor import deduplicate
from imgbatch.rejects import Example, note_examples
from imgbatch.schema import PLACE_COLUMNS, RESULTS, carried_fields, with_carried
from imgbatch.storage.stores import Folder

log = logging.getLogger(__name__)

STORE_IS_AWAY = 20
"""So many reads in a row that failed, across objects, are not the objects' fault."""

_STORES_FAULT = ("unreachable", "timeout", "forbidden")

_MOST_KILLERS, _FEW_KILLERS = 200, 20
_MOST_WAITING = 4_096

Mask = npt.NDArray[np.bool_]


@dataclass
class Pace:
    """When the first rows came, and how fast the others after them."""

    first_row: str | None = None
    """UTC, ISO 8601."""
    _first: float = 0.0
    _last: float = 0.0
    _rows: int = 0

    def note(self, rows: int, now: float) -> None:
        """Note that rows came."""
        if self.first_row is None:
            self.first_row, self._first = datetime.now(UTC).isoformat(timespec="milliseconds"), now
        else:
            self._rows += rows
        self._last = now

    def rate(self) -> float | None:
        """Return images a second from the first rows on, without the start; None if they all came at once."""
        return round(self._rows / (self._last - self._first), 2) if self._rows and self._last > self._first else None


@dataclass
class Committer:
    """Takes blocks from workers, drops second arrivals, and commits."""

    ledger: Ledger
    run_id: str
    model: str
    work_plan: WorkPlan
    commit_s: float
    store_answers: Callable[[], bool] = lambda: True
    """Asks the input's store whether it lets us in at all, when many reads in a row are forbidden."""
    clock: Callable[[], float] = time.monotonic
    remaining: int | None = None
    """How many members of tars may come yet; None: all."""
    retried: int = 0
    """How many of the images are tried again, or have changed."""
    tar_rows: int = 0
    """Rows of members of tars, which the listing did not know."""
    ignored_members: int = 0
    """Members of tars that are no images."""
    unpaired: int = 0
    """Sidecars in tars that do not lie beside an image of their name."""
    unpaired_example: str = ""
    labelled: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    """The first reject of each reason."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What workers tell of themselves: device, dtype, runtime, batch size."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Seconds of work by stage, summed over all workers."""
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    """Nodes whose workers give wrong answers, by their ids: `host`, and `why`."""
    started: float = 0.0
    _pace: Pace = field(default_factory=Pace)
    _waiting: list[pa.Table] = field(default_factory=list)
    _rows_waiting: int = 0
    _seen: int = 0
    _touched: set[int] = field(default_factory=set)
    """Tars of which the next commit tells how far they are read."""
    _committed: float = 0.0
    _failing: int = 0

    def __post_init__(self) -> None:
        self.started = self._committed = self.clock()
        if self.remaining is not None:  # what is there of tars may be more than the limit
            self.remaining = max(0, self.remaining)
            self.close_at_limit()

    @property
    def arrived(self) -> int:
        """How many images of this run have a row, committed or about to be."""
        return self.labelled + self.rejected

    def take(self, block: pa.Table) -> None:
        """Take one block of results.

        Raises:
            ImgbatchError: the block holds an error in place of rows, or the store is away.
        """
        rows, notes, read = received(block)
        for note in notes:
            self._note(note)
        if self.work_plan.tars:
            is_member = pc.is_valid(rows["offset"])
            members = rows.filter(is_member)
            rows = pa.concat_tables([self._once(rows.filter(pc.invert(is_member))), *self._accept_members(members)])
            self._close(read, set(pc.unique(members["index"]).to_pylist()))
        else:
            rows = self._once(rows)
        if not len(rows):
            return
        self._pace.note(len(rows), self.clock())
        self._waiting.append(rows.drop_columns(["index", *PLACE_COLUMNS]))
        self._rows_waiting += len(rows)
        refused = rows.filter(pc.is_valid(rows["reason"]))
        self.labelled += len(rows) - len(refused)
        self.rejected += len(refused)
        if len(refused):
            self.reasons.update(refused["reason"].to_pylist())
            note_examples(self.examples, refused)
        self._watch_the_store(rows)

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        late = self.clock() - self._committed >= self.commit_s
        return self._rows_waiting >= _MOST_WAITING or (bool(self._rows_waiting or self._touched) and late)

    def commit(self) -> None:
        """Write what waits."""
        if self._waiting or self._touched:
            nothing = RESULTS.empty_table().drop_columns(["index", *PLACE_COLUMNS])
            rows = pa.concat_tables(self._waiting or [nothing], promote_options="default")
            progress = {
                self.work_plan.tars[number].uri: self.work_plan.tars[number].entry() for number in sorted(self._touched)
            }
            self._waiting, self._rows_waiting, self._touched = [], 0, set()
            started = self.clock()
            self.ledger.commit(rows, self.run_id, self.model, progress)
            self.seconds["commit"] += self.clock() - started  # type: ignore[assignment]
        self._committed = self.clock()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Commit what waits, also on the way out of a failing run, whose own error is then the one to tell."""
        try:
            self.commit()
        except ImgbatchError as second:
            if error is None:
                raise
            log.error("the last rows could not be committed, and will be made again: %s", second)

    def blame_the_cluster(self, nodes: int, lost: float, *, last: bool) -> None:
        """Stop where so many images did not come back that it cannot be theirs: nothing of them is written.

        Raises:
            ClusterError: more than 200, and more than the share `lost` of all; or, in the last round, more than 20 and all,
                those apart that may have died before.
        """
        left = int(np.count_nonzero(self.work_plan.pending))
        if left > max(_MOST_KILLERS, lost * (left + self.arrived)) or (
            last and not self.arrived and left > max(_FEW_KILLERS, self.retried)
        ):
            raise ClusterError(
                f"{left:,} images never came back from {nodes} node(s): their processes die whatever the image is; "
                "look at Ray's worker logs, then run the same command again"
            )

    def give_up(self, listing: Folder, tries: int) -> None:
        """Reject what never came: alone in its process, each of these ended it that often.

        The next run tries again: decoders run in a child by then, so that it was the process around them that died. Of a tar
        whatever was not read hangs on it.
        """
        for number, tar in self.work_plan.tars.items():
            if tar.truncated:  # and has its reject
                self.work_plan.pending[number] = False
        left = np.flatnonzero(self.work_plan.pending)
        if len(left):
            self.tar_rows += int(np.isin(left, list(self.work_plan.tars)).sum())
            listed = Pages(listing).rows(left)
            message = "the process that worked on it died, each time, with nothing else in it"
            given = {"stage": "decode", "reason": "crashed", "message": message, "passing": True, "attempts": tries}
            columns = {"index": pa.array(left), **{name: listed[name] for name in listed.column_names}}
            schema = with_carried(RESULTS, carried_fields(listed.schema))
            for field in schema:
                if field.name not in columns:
                    columns[field.name] = pa.repeat(pa.scalar(given.get(field.name), field.type), len(left))
            self.take(pa.table(columns).select(schema.names).cast(schema))

    def _once(self, rows: pa.Table) -> pa.Table:
        """Return the rows of images that did not arrive before."""
        numbers = rows["index"].to_numpy()
        fresh = self.work_plan.pending[numbers]
        self.work_plan.pending[numbers] = False
        return rows if fresh.all() else rows.filter(pa.array(fresh))

    def _accept_members(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Yield, tar by tar, the rows that go on where the last ones ended: listed, since only now they are known."""
        numbers = rows["index"].to_numpy()
        for number in np.unique(numbers).tolist():
            tar = self.work_plan.tars[number]
            given = rows.filter(pa.array(numbers == number))
            # Up to a limit they are admitted step by step: rows that are in the tables already do not count.
            while self.remaining != 0 and len(admitted := tar.admit(given, self.remaining)):
                self._touched.add(number)
                admitted = deduplicate(tar, admitted, self.ledger.index.mark_seen)
                self.tar_rows += len(admitted)
                self.remaining = None if self.remaining is None else self.remaining - len(admitted)
                yield admitted
                if self.remaining is None:
                    break
                given = given.slice(0, 0)

    def _close(self, read: list[dict[str, Any]], moved: set[int]) -> None:
        """Close the tars whose readers came to their end and of which no row is missing."""
        for report in read:
            self.work_plan.tars[report["number"]].end_report = report
        for number in sorted(moved | {report["number"] for report in read}):
            tar = self.work_plan.tars[number]
            end = tar.end_report
            if end is not None and end["last_offset"] == tar.last_offset and self.work_plan.pending[number]:
                tar.closed = end["whole"]
                self.work_plan.pending[number] = False
                self._touched.add(number)
                self.ignored_members += end["ignored"]
                if end["unpaired"]:
                    self.unpaired += end["unpaired"]
                    self.unpaired_example = self.unpaired_example or end["unpaired_example"]

    def warn_of_unpaired(self) -> None:
        """Say that sidecars were not read."""
        if self.unpaired:
            log.warning(
                "%s members .cls, .json and .txt of tars do not lie beside an image of their name, such as %s: they are in no "
                "table. A tar is read in its order; write it in that of its names (tar --sort=name)",
                f"{self.unpaired:,}",
                self.unpaired_example,
            )

    def close_at_limit(self) -> bool:
        """Leave the tars as far as they are read, once the run's limit is reached; return whether nothing is left to do."""
        if self.remaining == 0:
            for number, tar in self.work_plan.tars.items():
                self.tar_rows += bool(tar.refused and self.work_plan.pending[number])
                self.work_plan.pending[number] = False
        return self.remaining == 0 and not self.work_plan.pending.any()

    def moved_on(self) -> bool:
        """Return whether rows came since this was asked last."""
        before, self._seen = self._seen, self.arrived
        return self.arrived > before

    def report(self) -> dict[str, Any]:
        """Return what the run's record says of the work so far."""
        seconds = {stage: round(value, 2) for stage, value in self.seconds.items()}
        return {
            **self.facts,
            "rejects": dict(self.reasons),
            "seconds": seconds,
            "first_row": self._pace.first_row,
            "images_per_second": self.rate() or self._overall(),
        }

    def rate(self) -> float | None:
        """Return images a second without the start of the workers; None if all rows came at once."""
        return self._pace.rate()

    def _overall(self) -> float | None:
        elapsed = self.clock() - self.started
        return round(self.arrived / elapsed, 2) if elapsed else None

    def _note(self, note: dict[str, Any]) -> None:
        for key, value in note.items():
            if key.endswith("_s"):
                self.seconds[key.removesuffix("_s")] += value
            elif key == "left_out":
                self.left_out |= value
                faults = {told["host"]: f"{told['why']}: the node is left out" for told in value.values()}
                self._note_faults(faults)
            elif key == "node_faults":
                self._note_faults(value)
            else:
                self.facts[key] = value

    def _note_faults(self, faults: dict[str, str]) -> None:
        """Note what workers found wrong with their node, and say it once."""
        known = self.facts.setdefault("node_faults", {})
        for host, fault in faults.items():
            if known.get(host) != fault:
                log.warning("node %s: %s", host, fault)
            known[host] = fault

    def _watch_the_store(self, rows: pa.Table) -> None:
        at_fetch = pc.fill_null(pc.equal(rows["stage"], "fetch"), False)
        failing = np.asarray(pc.and_(at_fetch, pc.is_in(rows["reason"], pa.array(_STORES_FAULT))))
        longest, trailing = _runs(failing, self._failing)
        if longest >= STORE_IS_AWAY:
            failed = rows.filter(pa.array(failing))
            # A folder without rights is its objects' fault, as long as the store lets us in elsewhere.
            if pc.unique(failed["reason"]).to_pylist() != ["forbidden"] or not self.store_answers():
                last = failed["message"][-1].as_py()
                raise Unreachable(f"{longest} objects in a row could not be read, the store is away: {last}")
        self._failing = trailing


def _runs(mask: Mask, before: int) -> tuple[int, int]:
    """Return the longest run of True, with `before` more in front of the first, and the length of the last run.

    >>> _runs(np.array([True, False, True, True]), 4)
    (5, 2)
    """
    ends = np.flatnonzero(~mask)
    if not len(ends):
        return before + len(mask), before + len(mask)
    inner = int(np.diff(ends).max(initial=1)) - 1
    return max(before + int(ends[0]), inner, len(mask) - 1 - int(ends[-1])), len(mask) - 1 - int(ends[-1])

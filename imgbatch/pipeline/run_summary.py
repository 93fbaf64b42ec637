"""Effects: the summary of one run: logged when the run ends, and written to run.json as `this_run`."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imgbatch.config.secrets import masked
from imgbatch.rejects import Example
from imgbatch.terminal.plurals import number

if TYPE_CHECKING:
    from imgbatch.ledger.audit import AuditResult
    from imgbatch.ledger.listing import Counts
    from imgbatch.ledger.run_record import Record
    from imgbatch.pipeline.run_statistics import RunStatistics

log = logging.getLogger("imgbatch")


_MAX_MESSAGE = 200  # characters


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The result of a run. The counts are those of the tables, as in `run.json`; `seconds` is of this run alone."""

    run_id: str
    output: str
    """The URI of the folder with labels/ and rejects/."""
    counts: Mapping[str, int]
    """`listed`, `labelled`, `rejected`, `already_done`, `updated`, `ignored`, `duplicates`, `kept`, `unpaired_sidecars`."""
    rejects: Mapping[str, int]
    """The number of rejects by reason."""
    this_run: Mapping[str, Any]
    """The counts of this run alone: `labelled`, `rejected`, `seconds`, `images_per_second`."""

    def __str__(self) -> str:
        counts = self.counts
        updated = f"{counts['updated']:,} of them updated, " if counts["updated"] else ""
        return (
            f"{counts['listed']:,} images listed, {counts['labelled']:,} labelled, {counts['rejected']:,} rejected "
            f"({counts['already_done']:,} already done, {updated}{counts['kept']:,} kept, {counts['ignored']:,} objects "
            f"ignored) in {self.this_run['seconds']:.1f} s: {self.output}/labels"
        )


@dataclass
class Tally:
    """Counts of one run."""

    now: Callable[[], float] = time.monotonic
    labelled: int = 0
    rejected: int = 0
    rate: float | None = None
    """Images per second after the first rows, without the start; None: all rows arrived at once."""
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    _audited: bool = False

    def __post_init__(self) -> None:
        self._started = self.now()

    def take(self, statistics: RunStatistics) -> None:
        """Copy the counts so far."""
        self.labelled, self.rejected, self.rate = statistics.labelled, statistics.rejected, statistics.rate()
        self.reasons, self.examples = Counter(statistics.reasons), dict(statistics.examples)

    def audited(self, result: AuditResult) -> None:
        """Copy the counts of rejects in the tables, which include those of earlier runs."""
        self.reasons, self._audited = Counter(result.reasons), True
        self.examples = {**result.examples, **self.examples}

    @property
    def seconds(self) -> float:
        """Seconds since the run started."""
        return round(self.now() - self._started, 1)

    def public(self) -> dict[str, Any]:
        """Return the `this_run` of run.json."""
        seconds = self.seconds
        counts = {"labelled": self.labelled, "rejected": self.rejected}
        return {**counts, "seconds": seconds, "images_per_second": round(self._per_second(seconds), 2)}

    def _per_second(self, seconds: float) -> float:
        return (self.labelled + self.rejected) / seconds if seconds else 0.0

    def lines(self) -> Iterator[str]:
        """Yield the log lines at the end of the run."""
        seconds = self.seconds
        rate = f", {number(self._per_second(seconds))} images/s" if self.labelled or self.rejected else ""
        later = f" ({number(self.rate)} after the first rows)" if self.rate else ""
        yield f"this run: {self.labelled:,} labelled, {self.rejected:,} rejected in {seconds:.1f} s{rate}{later}"
        of = "rejects/ holds" if self._audited else "rejected in this run:"
        for reason, count in self.reasons.most_common():
            uri, message = map(masked, self.examples.get(reason, ("", "")))
            example = ": ".join(filter(None, (uri, message[:_MAX_MESSAGE])))
            yield f"{of} {count:,} {reason}{f', such as {example}' if example else ''}"

    @contextmanager
    def reported(self, record: Record) -> Iterator[None]:
        """When the block ends, log the summary and the URIs of the tables, and write the summary to the record.

        If the block fails before the first row, only the record is changed.
        """
        record.facts["this_run"] = self.public()
        failed = True
        try:
            yield
            failed = False
        finally:
            record.facts["this_run"] = self.public()
            if not failed or self.labelled or self.rejected:
                for line in self.lines():
                    log.info("%s", line)
                for name in ("labels", "rejects"):
                    log.info("%s: %s", name, masked(record.output.at(name)))
                log.info("record: %s", masked(record.folder.at("run.json")))


def counts_so_far(listed: Counts, statistics: RunStatistics) -> dict[str, int]:
    """Return the `counts` of run.json in the middle of a run."""
    return {
        "listed": listed.listed,
        "labelled": statistics.labelled,
        "rejected": statistics.rejected,
        "already_done": listed.already_done,
        "updated": listed.updated,
        "ignored": listed.ignored,
        "duplicates": listed.duplicates,
        "unpaired_sidecars": listed.unpaired,
    }

"""Effects: what one run did, apart from what its tables hold: logged when it ends, and kept in run.json as `this_run`."""

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
    from imgbatch.ledger.run_record import Record
    from imgbatch.pipeline.committer import Committer

log = logging.getLogger("imgbatch")


_MOST_MESSAGE = 200  # characters


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run came to. The counts are those of the tables, as in `run.json`; `seconds` is of this run."""

    run_id: str
    output: str
    """The URI below which labels/ and rejects/ lie."""
    counts: Mapping[str, int]
    """`listed`, `labelled`, `rejected`, `already_done`, `updated`, `ignored`, `duplicates`, `kept`, `unpaired_sidecars`."""
    rejects: Mapping[str, int]
    """How many rejects have each reason."""
    this_run: Mapping[str, Any]
    """What this run alone did: `labelled`, `rejected`, `seconds`, `images_per_second`."""

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
    """Images a second after the first rows, without the start; None: they all came at once."""
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    _audited: bool = False

    def __post_init__(self) -> None:
        self._started = self.now()

    def take(self, committer: Committer) -> None:
        """Take over what the committer has counted so far."""
        self.labelled, self.rejected, self.rate = committer.labelled, committer.rejected, committer.rate()
        self.reasons, self.examples = Counter(committer.reasons), dict(committer.examples)

    def audited(self, result: AuditResult) -> None:
        """Take over the rejects that the tables hold, among them those of earlier runs."""
        self.reasons, self._audited = Counter(result.reasons), True
        self.examples = {**result.examples, **self.examples}

    @property
    def seconds(self) -> float:
        """How long the run has been at work."""
        return round(self.now() - self._started, 1)

    def public(self) -> dict[str, Any]:
        """Return what run.json holds of it."""
        seconds = self.seconds
        counts = {"labelled": self.labelled, "rejected": self.rejected}
        return {**counts, "seconds": seconds, "images_per_second": round(self._per_second(seconds), 2)}

    def _per_second(self, seconds: float) -> float:
        return (self.labelled + self.rejected) / seconds if seconds else 0.0

    def lines(self) -> Iterator[str]:
        """Yield what the log says at the end of the run."""
        seconds = self.seconds
        rate = f", {number(self._per_second(seconds))} images/s" if self.labelled or self.rejected else ""
        later = f" ({number(self.rate)} after the first rows)" if self.rate else ""
        yield f"this run: {self.labelled:,} labelled, {self.rejected:,} rejected in {seconds:.1f} s{rate}{later}"
        of = "rejects/ holds" if self._audited else "rejected in this run:"
        for reason, count in self.reasons.most_common():
            uri, message = map(masked, self.examples.get(reason, ("", "")))
            example = ": ".join(filter(None, (uri, message[:_MOST_MESSAGE])))
            yield f"{of} {count:,} {reason}{f', such as {example}' if example else ''}"

    @contextmanager
    def reported(self, record: Record) -> Iterator[None]:
        """Log what the run did and where it is written when the block ends, and put it into the record.

        A block that fails before there is a row has nothing to report.
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

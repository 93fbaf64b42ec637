"""What one run did, apart from what its tables hold: logged at its end, and kept in run.json as `this_run`."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imgbatch.config import masked
from imgbatch.progress import number

if TYPE_CHECKING:
    from imgbatch.books import Books
    from imgbatch.committer import Committer
    from imgbatch.runs import Record

log = logging.getLogger("imgbatch")

Example = tuple[str, str]
"""The URI of a reject, and its message."""

_MOST_MESSAGE = 200  # characters


def note_examples(examples: dict[str, Example], reasons: list[Any], uris: list[Any], messages: list[Any]) -> None:
    """Keep the first reject of each reason: there are 14."""
    for reason, uri, message in zip(reasons, uris, messages, strict=True):
        examples.setdefault(reason, (uri, message or ""))


@dataclass
class Tally:
    """Counts of one run."""

    now: Callable[[], float] = time.monotonic
    labelled: int = 0
    rejected: int = 0
    rate: float | None = None
    """Images a second from the first rows on, without the start."""
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    _audited: bool = False

    def __post_init__(self) -> None:
        self._started = self.now()

    def take(self, committer: Committer) -> None:
        """Take over what the committer has counted so far."""
        self.labelled, self.rejected, self.rate = committer.labelled, committer.rejected, committer.rate()
        self.reasons, self.examples = Counter(committer.reasons), dict(committer.examples)

    def audited(self, books: Books) -> None:
        """Take over the rejects that the tables hold, among them those of earlier runs."""
        self.reasons, self._audited = Counter(books.reasons), True
        self.examples = {**books.examples, **self.examples}

    @property
    def seconds(self) -> float:
        """How long the run has been at work."""
        return round(self.now() - self._started, 1)

    def public(self) -> dict[str, Any]:
        """Return what run.json holds of it."""
        counts = {"labelled": self.labelled, "rejected": self.rejected}
        return {**counts, "seconds": self.seconds, "images_per_second": self.rate}

    def lines(self) -> Iterator[str]:
        """Yield what the log says at the end of the run."""
        rate = f", {number(self.rate)} images/s after the first rows" if self.rate else ""
        yield f"this run: {self.labelled:,} labelled, {self.rejected:,} rejected in {self.seconds:.1f} s{rate}"
        of = "rejects/ holds" if self._audited else "rejected in this run:"
        for reason, count in self.reasons.most_common():
            uri, message = self.examples.get(reason, ("", ""))
            example = f", such as {uri}: {message[:_MOST_MESSAGE]}" if uri else ""
            yield masked(f"{of} {count:,} {reason}{example}")

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
                log.info("%s", places(record))


def places(record: Record) -> str:
    """Return where the tables and the record of a run are."""
    tables = ", ".join(f"{name}: {record.output.at(name)}" for name in ("labels", "rejects"))
    return masked(f"{tables}, record: {record.folder.at('run.json')}")

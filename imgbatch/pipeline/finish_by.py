"""Effects: `run.finish_by`: the forecast of a run that labels images, and what happens once it passes the deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from imgbatch.config import deadline
from imgbatch.terminal.progress import Rate

log = logging.getLogger("imgbatch")

_MIN_RATE_S = 15.0  # of labelling, before the rate is used
_END_S = 5.0  # for the last commit and the audit
_GROW_S = 30.0

LateCall = Callable[[dict[str, Any]], object]
_late_calls: ContextVar[tuple[LateCall, ...]] = ContextVar("calls when a run will be late", default=())


@contextmanager
def on_late(call: LateCall) -> Iterator[None]:
    """Within the block, make `call` once for each run whose forecast passes `run.finish_by`, with the fact `late`."""
    token = _late_calls.set((*_late_calls.get(), call))
    try:
        yield
    finally:
        _late_calls.reset(token)


@dataclass
class Punctuality:
    """Watches whether a run will end in time. Without a deadline it does nothing."""

    finish_by: datetime | None
    facts: MutableMapping[str, Any]
    """The facts of run.json, which get `late`."""
    total: float | None
    """The number of images that the run labels; None: unknown, and only the deadline itself counts."""
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _rate: Rate = field(init=False)
    _first: float | None = None
    _grown: float = 0.0

    def __post_init__(self) -> None:
        self._rate = Rate(self.clock)

    @classmethod
    def of(cls, text: str | None, facts: MutableMapping[str, Any], total: float | None) -> Punctuality:
        """Return a watch for `run.finish_by` of a run that starts now."""
        finish_by = None if text is None else deadline.parse(text, "run.finish_by").at(datetime.now(UTC))
        return cls(finish_by, facts, total)

    @property
    def is_late(self) -> bool:
        """Whether the forecast has passed the deadline once."""
        return "late" in self.facts

    def check(self, done: int) -> None:
        """Forecast the end; the first time it is after the deadline, warn, and make the calls of `on_late`.

        Args:
            done: the number of images of this run with a row.
        """
        if self.finish_by is None or self.is_late:
            return
        self._rate.mark(done)
        if done and self._first is None:
            self._first = self.clock()
        now = self.now()
        end = self._forecast(now, done)
        if (end or now) <= self.finish_by:
            return
        late = {
            "finish_by": self.finish_by.isoformat(),
            "forecast": None if end is None else end.isoformat(timespec="seconds"),
            "noticed": now.isoformat(timespec="seconds"),
        }
        self.facts["late"] = late
        if end is None:
            log.warning("the run is late: run.finish_by was %s UTC", _shown(self.finish_by))
        else:
            log.warning(
                "the run will be late: at %.0f images/s it ends at %s UTC, run.finish_by is %s UTC",
                self._rate(), _shown(end), _shown(self.finish_by),
            )  # fmt: skip
        for call in _late_calls.get():
            try:
                call(late)
            except Exception:  # whoever cannot be notified does not change the result of the run
                log.exception("the delay could not be reported")

    def should_grow(self) -> bool:
        """Return whether it is time to look for more nodes: every half minute of a run that will be late."""
        if not self.is_late or self.clock() - self._grown < _GROW_S:
            return False
        self._grown = self.clock()
        return True

    def _forecast(self, now: datetime, done: int) -> datetime | None:
        if (
            self.total is None
            or self._first is None
            or self.clock() - self._first < _MIN_RATE_S
            or not (rate := self._rate())
        ):
            return None
        return now + timedelta(seconds=max(0.0, self.total - done) / rate + _END_S)


def _shown(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M")

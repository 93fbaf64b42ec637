"""Effects: the monitor of a run: work that may take long calls `tick`, which ends the run if that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_calls: ContextVar[tuple[Callable[[], object], ...]] = ContextVar("calls of tick", default=())


def tick() -> None:
    """Make the calls of the current run: its stop request is checked, and its heartbeat written when it is due.

    Each loop on the driver that may take longer than a few seconds calls this in each step. It does nothing outside a run,
    and in threads other than that of the run.

    Raises:
        Interrupted: the run is to end.
        OutputChangedError: another run has taken over.
    """
    for call in _calls.get():
        call()


@contextmanager
def on_tick(call: Callable[[], object]) -> Iterator[None]:
    """Have each `tick` within make this call as well."""
    token = _calls.set((*_calls.get(), call))
    try:
        yield
    finally:
        _calls.reset(token)

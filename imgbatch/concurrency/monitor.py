"""Effects: the monitor of a run: long loops call `tick`, which ends the run if a stop was requested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_calls: ContextVar[tuple[Callable[[], object], ...]] = ContextVar("calls of tick", default=())


def tick() -> None:
    """Make the calls of the current run: check for a stop request, and write the heartbeat when it is due.

    Each loop on the driver that may take longer than a few seconds calls this in each step. Outside a run, and in threads
    other than that of the run, it does nothing.

    Raises:
        Interrupted: a stop was requested.
        OutputChangedError: another run has taken over the output.
    """
    for call in _calls.get():
        call()


@contextmanager
def on_tick(call: Callable[[], object]) -> Iterator[None]:
    """Within the block, make `call` in each `tick`, after the calls of the blocks around it."""
    token = _calls.set((*_calls.get(), call))
    try:
        yield
    finally:
        _calls.reset(token)

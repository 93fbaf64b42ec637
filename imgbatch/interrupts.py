"""Signals as requests: a run ends where nothing is lost by it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from imgbatch.errors import Interrupted


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def install(self) -> StopRequest:
        """Take both signals over. Called again whenever another may have taken them since."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._remember)
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum

    @contextmanager
    def beside_ray(self) -> Iterator[None]:
        """Take both signals over again behind Ray, whose end leaves SIGTERM to the kernel: to die on the spot (2.60)."""
        try:
            yield
        finally:
            self.install()

    def check(self) -> None:
        """Raise if a signal came.

        Raises:
            Interrupted: with its number.
        """
        if self.signum is not None:
            raise Interrupted(self.signum)

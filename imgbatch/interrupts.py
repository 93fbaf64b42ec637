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
        """Keep SIGTERM a request around Ray, which takes it over when it starts and forgets it when it ends.

        Ray's own handler raises SystemExit until `install` is called behind its start; its end leaves the signal with
        the kernel's default, which is to die on the spot (seen in 2.60).

        Raises:
            Interrupted: SIGTERM came while Ray was starting.
        """
        try:
            yield
        except SystemExit as error:
            if error.code != signal.SIGTERM:
                raise
            raise Interrupted(signal.SIGTERM) from None
        finally:
            self.install()

    def check(self) -> None:
        """Raise if a signal came.

        Raises:
            Interrupted: with its number.
        """
        if self.signum is not None:
            raise Interrupted(self.signum)

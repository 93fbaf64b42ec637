"""Effects: Ray is left as it was found, for callers whose process goes on after a job. Does not import Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_as_found() -> Iterator[None]:
    """Shut down a Ray that the block has started, also where it fails.

    The command line does without: there a process that failed ends with all that it has started.
    """
    before = is_initialized()
    try:
        yield
    finally:
        if is_initialized() and not before:
            from imgbatch.engine import session

            session.end()


def is_initialized() -> bool:
    """Return whether this process is connected to Ray; nobody is who has not imported it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())

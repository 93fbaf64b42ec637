"""Effects: shuts Ray down after a job of the Python API, whose process continues. Does not import Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def shut_down_if_started() -> Iterator[None]:
    """Shut down a Ray that the block has started, also if it fails.

    The command line does not use this: a process that failed ends there, with everything that it has started.
    """
    before = is_initialized()
    try:
        yield
    finally:
        if is_initialized() and not before:
            from imgbatch.engine import session

            session.shut_down()


def is_initialized() -> bool:
    """Return whether this process is connected to Ray, without importing it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())

"""Values: how long to wait before a request is made again."""

from __future__ import annotations

import random

_FIRST_S, _LONGEST_S = 0.2, 20.0


def backoff(attempt: int) -> float:
    """Return seconds to wait after the `attempt`-th failure in a row: exponential, with jitter between half and whole.

    >>> 0.2 <= backoff(1) <= 0.4 and 10 <= backoff(20) <= 20
    True
    """
    return min(_LONGEST_S, _FIRST_S * 2.0 ** min(attempt, 10)) * (0.5 + random.random() / 2)

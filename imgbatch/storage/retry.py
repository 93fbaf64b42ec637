"""Values: the wait before a request is repeated."""

from __future__ import annotations

import random

_FIRST_S, _MAX_S = 0.2, 20.0


def backoff(attempt: int) -> float:
    """Return the seconds to wait after the `attempt`-th consecutive failure: exponential, times a random factor in [0.5, 1].

    >>> 0.2 <= backoff(1) <= 0.4 and 10 <= backoff(20) <= 20
    True
    """
    return min(_MAX_S, _FIRST_S * 2.0 ** min(attempt, 10)) * (0.5 + random.random() / 2)

"""Values: how many images arrived when, in a series whose size does not depend on the length of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_INTERVALS = 240


@dataclass
class RateSeries:
    """The number of images in intervals of equal length; when there are too many intervals, each two become one."""

    interval_s: float = 1.0
    images: list[int] = field(default_factory=list)

    def note(self, rows: int, at_s: float) -> None:
        """Add images.

        Args:
            rows: the number of images.
            at_s: seconds since the start.

        >>> series = RateSeries()
        >>> for second in range(0, 480, 2): series.note(3, second)
        >>> series.interval_s, len(series.images), sum(series.images)
        (2.0, 240, 720)
        """
        while (at := int(at_s // self.interval_s)) >= MAX_INTERVALS:
            padded = [*self.images, 0]
            self.images = [sum(padded[start : start + 2]) for start in range(0, len(self.images), 2)]
            self.interval_s *= 2
        self.images += [0] * (at + 1 - len(self.images))
        self.images[at] += rows

    def public(self) -> dict[str, Any]:
        """Return the series for run.json."""
        return {"interval_s": self.interval_s, "images": list(self.images)}

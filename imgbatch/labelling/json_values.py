"""Values: values of tables and records as JSON can hold them."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: times as ISO 8601, bytes in base64, null for NaN and infinite numbers.

    >>> plain({"etag": None, "scores": [0.5, float("nan")], "image": b"x"})
    {'etag': None, 'scores': [0.5, None], 'image': 'eA=='}
    """
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)

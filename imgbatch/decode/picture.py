"""Values: the results of decoding: a picture, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[Any]]


class Rejected(Exception):
    """The bytes cannot be decoded. `reason` is one of `rejects.REASONS`; the message has the details."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that it survives pickling
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, slots=True)
class Picture:
    """Upright pixels, and the size of the original."""

    pixels: Pixels
    """uint8 (H, W, 3), RGB, contiguous."""
    width: int
    """Pixels of the original, upright: not those of `pixels` if a JPEG was decoded at a reduced scale."""
    height: int


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Check the size in a header against the limit.

    Raises:
        Rejected: too_large, or corrupt if a side is 0.
    """
    if width < 1 or height < 1:
        raise Rejected("corrupt", f"the size in the header is {width}x{height} pixels")
    if width * height > max_pixels:
        raise Rejected("too_large", f"{width}x{height} pixels are more than decode.max_pixels={max_pixels}")


def upright(pixels: Pixels, width: int, height: int, orientation: int) -> Picture:
    """Apply an EXIF orientation to (H, W, 3). `width` and `height` are those in the file's header."""
    if orientation >= 5:
        pixels, width, height = pixels.swapaxes(0, 1), height, width
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return Picture(np.ascontiguousarray(pixels), width, height)

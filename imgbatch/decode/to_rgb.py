"""Values: from the values in a file to 8 bits of R, G and B."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from imgbatch.decode.picture import Pixels, Rejected

_STRIP = 1 << 20  # values: in float64 a whole picture would take 8 bytes a pixel, several times
_MIN_IS_WHITE = 0


def rgb(image: Image.Image, kind: str) -> Pixels:
    """Apply the package's table to what Pillow has loaded. Returns (H, W, 3)."""
    image.info.pop("transparency", None)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "pnm"):  # PNM: 16 bits in the mode for 32
        tags = getattr(image, "tag_v2", {})
        bits = min(16, tags.get(258, (16,))[0]) if kind == "tiff" else 16
        grey = in_strips(np.asarray(image), lambda few: scaled(few, bits))
        return to_grey(255 - grey if tags.get(262) == _MIN_IS_WHITE else grey)
    if image.mode in ("I", "F"):
        return to_grey(stretch(np.asarray(image)))
    if image.mode == "LAB":
        raise Rejected("unsupported", "CIELAB colours are not read in this version")
    return np.array(image.convert("RGB"))


def to_grey(values: Pixels) -> Pixels:
    """Repeat (H, W) as R, G and B."""
    return np.repeat(values[:, :, None], 3, axis=2)


def scaled(values: Pixels, bits: int | None = None) -> Pixels:
    """Map 0..2**bits - 1 to 0..255, rounded; `bits` are those of the type unless given. Larger values are 255.

    >>> scaled(np.array([0, 128, 129, 65535], np.uint16)).tolist(), scaled(np.array([0, 4095], np.uint16), 12).tolist()
    ([0, 0, 1, 255], [0, 255])
    """
    bits = bits or 8 * values.dtype.itemsize
    if bits == 8 and values.dtype == np.uint8:
        return values
    greatest = 2**bits - 1
    grey: Pixels = np.clip((values.astype(np.int64) * 510 + greatest) // (2 * greatest), 0, 255).astype(np.uint8)
    return grey


def stretch(values: Pixels) -> Pixels:
    """Map the least..greatest finite value to 0..255.

    >>> stretch(np.array([-1.0, np.nan, 0.0, 1.0, np.inf])).tolist()
    [0, 0, 128, 255, 255]
    """
    low, high = np.inf, -np.inf
    for few in _strips(values):
        finite = few[np.isfinite(few)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if not low < high:
        return np.zeros(values.shape, np.uint8)

    def share(few: Pixels) -> Pixels:
        # Halves, since the difference of two floats may be greater than any.
        part = (few / 2 - low / 2) / (high / 2 - low / 2)
        grey: Pixels = np.rint(np.nan_to_num(part, nan=0.0, posinf=1.0, neginf=0.0) * 255).astype(np.uint8)
        return grey

    return in_strips(values, lambda few: share(few.astype(np.float64)))


def in_strips(values: Pixels, function: Callable[[Pixels], Pixels]) -> Pixels:
    """Apply a function on single values, or on single colours of (H, W, 3), to a part of the picture at a time."""
    strips = _strips(values)
    with np.errstate(all="ignore"):  # whatever the values are, what comes out is clipped
        first = function(strips[0])
        whole = np.empty((sum(map(len, strips)), *first.shape[1:]), first.dtype)
        for number, few in enumerate(strips):
            whole[number * _STRIP : number * _STRIP + len(few)] = function(few) if number else first
    return whole.reshape(*values.shape[:2], *first.shape[1:])


def _strips(values: Pixels) -> list[Pixels]:
    flat = values.reshape(-1, *values.shape[2:])
    return [flat[at : at + _STRIP] for at in range(0, len(flat), _STRIP)]

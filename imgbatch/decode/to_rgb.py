"""Values: convert the values in a file to 8 bits of R, G and B."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from imgbatch.decode.picture import Pixels, Rejected

_STRIP = 1 << 20  # values at a time: in float64 a complete picture would take 8 bytes a pixel, several times
_MIN_IS_WHITE = 0


def rgb(image: Image.Image, kind: str) -> Pixels:
    """Convert an image that Pillow has loaded, by the table in `decode`; return (H, W, 3)."""
    image.info.pop("transparency", None)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "pnm"):  # PNM: 16 bits in the mode for 32
        tags = getattr(image, "tag_v2", {})
        bits = min(16, tags.get(258, (16,))[0]) if kind == "tiff" else 16
        grey = in_strips(np.asarray(image), lambda strip: scaled(strip, bits))
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
    maximum = 2**bits - 1
    grey: Pixels = np.clip((values.astype(np.int64) * 510 + maximum) // (2 * maximum), 0, 255).astype(np.uint8)
    return grey


def stretch(values: Pixels) -> Pixels:
    """Map the minimum..maximum finite value to 0..255.

    >>> stretch(np.array([-1.0, np.nan, 0.0, 1.0, np.inf])).tolist()
    [0, 0, 128, 255, 255]
    """
    low, high = np.inf, -np.inf
    for strip in _strips(values):
        finite = strip[np.isfinite(strip)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if not low < high:
        return np.zeros(values.shape, np.uint8)

    def to_bytes(strip: Pixels) -> Pixels:
        # Halves, since the difference of two floats may overflow.
        part = (strip / 2 - low / 2) / (high / 2 - low / 2)
        grey: Pixels = np.rint(np.nan_to_num(part, nan=0.0, posinf=1.0, neginf=0.0) * 255).astype(np.uint8)
        return grey

    return in_strips(values, lambda strip: to_bytes(strip.astype(np.float64)))


def in_strips(values: Pixels, function: Callable[[Pixels], Pixels]) -> Pixels:
    """Apply a function of values, or of colours of (H, W, 3), to one strip of the picture at a time."""
    strips = _strips(values)
    with np.errstate(all="ignore"):  # overflow and NaN are expected, and results are clipped
        first_result = function(strips[0])
        result = np.empty((sum(map(len, strips)), *first_result.shape[1:]), first_result.dtype)
        for number, strip in enumerate(strips):
            result[number * _STRIP : number * _STRIP + len(strip)] = function(strip) if number else first_result
    return result.reshape(*values.shape[:2], *first_result.shape[1:])


def _strips(values: Pixels) -> list[Pixels]:
    flat = values.reshape(-1, *values.shape[2:])
    return [flat[at : at + _STRIP] for at in range(0, len(flat), _STRIP)]

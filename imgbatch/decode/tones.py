"""From the values in a file to 8 bits of R, G and B."""

from __future__ import annotations

import numpy as np
from PIL import Image

from imgbatch.decode.picture import Pixels, Rejected


def rgb(image: Image.Image, kind: str) -> Pixels:
    """Apply the package's table. Returns (H, W, 3)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "pnm"):  # PNM: 16 bits in the mode for 32
        grey = ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif image.mode in ("I", "F"):
        grey = stretch(np.asarray(image))
    else:
        image.info.pop("transparency", None)
        if image.mode == "LAB":
            raise Rejected("unsupported", "CIELAB colours are not read in this version")
        return np.array(image.convert("RGB"))
    return np.repeat(grey[:, :, None], 3, axis=2)


def stretch(values: Pixels) -> Pixels:
    """Map the least..greatest finite value to 0..255.

    >>> stretch(np.array([-1.0, np.nan, 0.0, 1.0, np.inf])).tolist()
    [0, 0, 128, 255, 255]
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    share = np.nan_to_num((values.astype(np.float64) - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(share * 255).astype(np.uint8)

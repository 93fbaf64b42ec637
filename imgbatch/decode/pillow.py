"""Everything that Pillow reads."""

from __future__ import annotations

import io
import re
import warnings

from PIL import Image

from imgbatch.decode.exif import orientation
from imgbatch.decode.picture import Pixels, check_size
from imgbatch.decode.tones import rgb

READERS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "pnm": "PPM"}

Image.init()  # or it would happen at the first picture, in several threads at once
# The limit is `max_pixels`, checked on every header below; Pillow's own would warn or refuse before it.
Image.MAX_IMAGE_PIXELS = None
_HUSHED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def hush() -> None:
    """Keep Pillow's remarks on odd metadata off the log."""
    # `catch_warnings` is not safe among threads, hence a filter for the process; others may have put theirs in front.
    if list(warnings.filters[:1]) != [_HUSHED]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def read(data: bytes, kind: str, max_pixels: int) -> tuple[Pixels, int]:
    """Return the pixels (H, W, 3) as they lie in the file, and the orientation that is still to be applied."""
    if kind == "webp" and data[12:16] == b"VP8X" and len(data) >= 30:  # Pillow takes memory for the canvas on opening
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        check_size(width, height, max_pixels)
    with Image.open(io.BytesIO(data), formats=[READERS[kind]]) as image:
        check_size(image.width, image.height, max_pixels)
        image.load()  # turns a TIFF upright; PNG may have its EXIF data behind the pixels
        exif = image.info.get("exif") if kind in ("png", "webp") else None
        return rgb(image, kind), orientation(exif or b"")

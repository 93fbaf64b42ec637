"""Values: the formats that Pillow reads."""

from __future__ import annotations

import io
import re
import warnings

from PIL import AvifImagePlugin, Image, ImageFile

from imgbatch.decode import headers
from imgbatch.decode.exif import orientation
from imgbatch.decode.picture import Pixels, check_size
from imgbatch.decode.to_rgb import rgb

READERS = {
    **{"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "pnm": "PPM"},
    **{"avif": "AVIF", "heic": "HEIF", "jp2": "JPEG2000"},
}
"""Pillow's names of the formats; HEIF is available once `heic` has been imported."""

Image.init()  # otherwise done at the first picture, in several threads at once
# The limit is `max_pixels`, checked on every header below; Pillow's own would warn or refuse before it.
Image.MAX_IMAGE_PIXELS = None
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there is a worker on every core
_IGNORED = ("ignore", None, Warning, re.compile(r"(PIL|pydicom|pillow_heif)\."), 0)
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def ignore_warnings() -> None:
    """Ignore the libraries' warnings about unusual metadata."""
    # `catch_warnings` is not thread-safe, hence a filter for the process; other code may have inserted filters before it.
    if list(warnings.filters[:1]) != [_IGNORED]:
        warnings.filterwarnings("ignore", module=r"(PIL|pydicom|pillow_heif)\.")


def read(data: bytes, kind: str, max_pixels: int) -> tuple[Pixels, int]:
    """Return the pixels (H, W, 3) as stored in the file, and the orientation that the caller has to apply."""
    if kind == "gif":
        headers.check_gif(data)
    elif kind == "webp":
        headers.check_webp(data, max_pixels)
    elif kind == "jp2":
        headers.check_jp2(data, max_pixels)
    elif kind in ("avif", "heic"):
        headers.check_boxes(data, max_pixels)
    elif kind == "png":
        data = headers.painting_chunks(data)
    with _opened(data, kind) as image:
        check_size(image.width, image.height, max_pixels)
        if kind == "tiff":
            tags = image.tag_v2  # type: ignore[attr-defined]
            check_size(tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1), max_pixels)
        image.load()  # turns a TIFF upright, and PNG may have its EXIF data after the pixels
        exif = image.info.get("exif") if kind in ("png", "webp", "avif") else None  # libheif turns HEIC itself
        return rgb(image, kind), orientation(exif or b"")


def _opened(data: bytes, kind: str) -> ImageFile.ImageFile:
    """Read the header. Unlike those of `Image.open`, exceptions name the cause."""
    reader, _ = Image.OPEN[READERS[kind]]
    return reader(io.BytesIO(data), "")

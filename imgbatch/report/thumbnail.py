"""Effects: the small picture of an image for a page. It decodes untrusted bytes, so only child processes call it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from imgbatch.config.sections import Config
from imgbatch.rejects import Refusal

if TYPE_CHECKING:
    from PIL.Image import Image

    from imgbatch.sources.fetch import Fetched

_SIDE = 192  # pixels
_QUALITIES = (70, 45, 20, 5)


def thumbnail(fetched: Fetched, row: Mapping[str, Any], config: Config, max_bytes: int) -> tuple[bytes, str]:
    """Return a small WebP image of a fetched one, or the reason why there is none.

    Args:
        row: its version in the listing.
        max_bytes: unless the lowest quality needs more.
    """
    from PIL import Image

    from imgbatch.decode import Rejected, decode

    if isinstance(fetched.content, Refusal):
        return b"", fetched.content.reason
    if _has_changed(fetched, row):
        return b"", "the image has changed"
    try:
        pixels = decode(fetched.content, max_pixels=config.decode.max_pixels, short_side=_SIDE).pixels
    except Rejected as error:
        return b"", error.reason
    return reduced(Image.fromarray(pixels), max_bytes), ""


def _has_changed(fetched: Fetched, row: Mapping[str, Any]) -> bool:
    """Return whether the ETag differs, or without one the size or the time."""
    if row["etag"] is not None and fetched.etag is not None:
        return bool(row["etag"] != fetched.etag)
    pairs = ((row["size"], fetched.size), (row["last_modified"], fetched.last_modified))
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def reduced(image: Image, max_bytes: int) -> bytes:
    """Return a small WebP file of an image, of at most `max_bytes` or of the lowest quality."""
    image.thumbnail((_SIDE, _SIDE))
    content = b""
    for quality in _QUALITIES:
        file = io.BytesIO()
        image.save(file, "WebP", quality=quality)
        content = file.getvalue()
        if len(content) <= max_bytes:
            break
    return content

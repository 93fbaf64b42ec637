"""Values: map the exceptions of decoders to rejects with a reason."""

from __future__ import annotations

import contextlib
import io

from PIL import Image

from imgbatch.decode.exif import number
from imgbatch.decode.headers import ends_early
from imgbatch.decode.picture import Rejected

_UNSUPPORTED = ("nsupported", "not support", "unknown pixel mode", "unknown raw mode")


def to_rejected(data: bytes, kind: str, error: Exception) -> Rejected:
    """Return the reject for an exception of a decoder, by its text: decoders have no error codes."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Security limit" in text:  # of libheif: the text also contains "memory", but none was allocated
        return Rejected("too_large" if "Image size" in text else "corrupt", f"{kind}: {text}")
    if isinstance(error, MemoryError) or ("emory" in text and "Invalid" not in text):
        return Rejected("out_of_memory", f"{kind}: {text}")
    if isinstance(error, NotImplementedError) or any(word in text for word in _UNSUPPORTED):
        return Rejected("unsupported", f"{kind}: {text}")
    early = ("truncated", "not enough image data", "EOF", "Unexpected end", "less than expected")
    if isinstance(error, EOFError) or any(word in text for word in early) or _ends_early(data, kind):
        return Rejected("truncated", f"{kind}: the file ends early ({text})")
    return Rejected("corrupt", f"{kind}: {text}")


def _ends_early(data: bytes, kind: str) -> bool:
    """Return whether the file is shorter than the lengths in it, or lacks the end marker of its format."""
    if kind in ("webp", "bmp"):
        start, base = (4, 8) if kind == "webp" else (2, 0)
        return len(data) < base + int.from_bytes(data[start : start + 4], "little")
    if kind in ("avif", "heic", "jp2"):
        return ends_early(data)
    if kind in ("png", "gif"):
        return b"IEND" not in data if kind == "png" else b";" not in data[-16:]
    if kind != "tiff":
        return False
    directory = number(data, 4, 4)
    if directory + 2 + 12 * number(data, directory, 2) > len(data):
        return True
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
        tags = image.tag_v2  # type: ignore[attr-defined]
        ranges = (zip(tags.get(at, ()), tags.get(size, ()), strict=False) for at, size in ((273, 279), (324, 325)))
        return any(start + size > len(data) for pairs in ranges for start, size in pairs)  # strips, tiles
    return False

"""Bytes of an image file become RGB pixels, or a reject that says why not.

The bytes alone decide the type; names play no part. JPEG goes through libjpeg-turbo (simplejpeg), everything else
through Pillow, which reads the first frame or page only. What the file holds becomes 8-bit RGB like this:

    in the file                     becomes
    ------------------------------  -----------------------------------------------------------
    RGB, 8 bits                     itself
    RGB, 16 bits                    the upper 8 bits, as Pillow reads it
    grey, 8 bits                    R = G = B
    grey, 16 bits                   value / 257, rounded: the full range, whatever the picture uses of it
    grey, 32-bit integer or float   the picture's own least..greatest to 0..255; constant and NaN are 0
    1 bit                           0 and 255
    palette                         its colours
    alpha, or a transparent colour  dropped, as `Image.convert("RGB")` does and timm's training with it
    CMYK, YCCK                      Pillow's conversion, no colour profile

The orientation in the EXIF data is applied; EXIF data that makes no sense counts as upright.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[Any]]

_READERS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "pnm": "PPM"}
_MAGIC = [
    ("jpeg", re.compile(rb"\xff\xd8\xff")),
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("webp", re.compile(rb"RIFF.{4}WEBP", re.S)),
    ("gif", re.compile(rb"GIF8[79]a")),
    ("bmp", re.compile(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.S)),  # "BM" alone also begins texts
    ("tiff", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("pnm", re.compile(rb"P[1-6][\s#]")),
    ("avif", re.compile(rb".{4}ftypavi[fs]", re.S)),
    ("heic", re.compile(rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.S)),
    ("jp2", re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ("jxl", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    ("dicom", re.compile(rb".{128}DICM", re.S)),
    ("psd", re.compile(rb"8BPS")),
    ("ico", re.compile(rb"\0\0[\1\2]\0[^\0]\0")),
    ("svg", re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml.{0,1000}?)?<svg", re.S)),
]

Image.init()  # or it would happen at the first picture, in several threads at once
# The limit is `max_pixels`, checked on every header below; Pillow's own would warn or refuse before it.
Image.MAX_IMAGE_PIXELS = None
_HUSHED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither a stuffed byte (FF00) nor a restart (FFD0 to FFD7)
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_FRAMES, _PROGRESSIVE = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}, {0xC2, 0xCA}
_READABLE_FRAMES = {0xC0, 0xC1, 0xC9} | _PROGRESSIVE


class Rejected(Exception):
    """The bytes give no picture. `reason` is one word of the closed list of DESIGN.md; the message tells the rest."""

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
    """Pixels of the original, upright: not those of `pixels` where a JPEG was decoded at a reduced scale."""
    height: int


def sniff(data: bytes) -> str | None:
    """Name the format by its first bytes, or return None if they are those of no image format known here.

    >>> sniff(b"GIF89a..."), sniff(b"%PDF-1.7")
    ('gif', None)
    """
    return next((kind for kind, magic in _MAGIC if magic.match(data)), None)


def decode(data: bytes, *, max_pixels: int, short_side: int | None = None) -> Picture:
    """Decode an image file. May be called from several threads; the decoders release the GIL.

    Args:
        max_pixels: a picture with more is refused from its header, before memory is taken for it.
        short_side: what the caller will shrink the shorter side to. A JPEG may then be decoded at 1/2, 1/4 or 1/8, as
            long as twice that side is left, so that the caller's own filter does the shrinking that can be seen.

    Raises:
        Rejected: empty, not_an_image, unsupported, too_large, truncated, corrupt or out_of_memory. Whatever the bytes,
            nothing else is raised.
    """
    if not data:
        raise Rejected("empty", "the object has no bytes")
    kind = sniff(data)
    if kind is None:
        raise Rejected("not_an_image", f"no image format begins with {data[:16]!r}")
    if kind not in _READERS:
        raise Rejected("unsupported", f"{kind} is not read in this version; there are: {', '.join(_READERS)}")
    _hush_pillow()
    try:
        if kind == "jpeg":
            return _decode_jpeg(data, max_pixels, short_side)
        pixels, orientation = _pillow(data, kind, max_pixels)
        return _picture(pixels, pixels.shape[1], pixels.shape[0], orientation)
    except Rejected:
        raise
    except Exception as error:
        raise _refusal(data, kind, error) from error


def _hush_pillow() -> None:
    """Keep Pillow's remarks on odd metadata off the log."""
    # `catch_warnings` is not safe among threads, hence a filter for the process; others may have put theirs in front.
    if list(warnings.filters[:1]) != [_HUSHED]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise Rejected("corrupt", f"the header says {width}x{height} pixels")
    if width * height > max_pixels:
        raise Rejected("too_large", f"{width}x{height} pixels are more than decode.max_pixels={max_pixels}")


def _picture(pixels: Pixels, width: int, height: int, orientation: int) -> Picture:
    """Turn (H, W, 3) as it lies in the file upright. `width` and `height` are those in the file's header."""
    if orientation >= 5:
        pixels, width, height = pixels.swapaxes(0, 1), height, width
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return Picture(np.ascontiguousarray(pixels), width, height)


def _orientation(exif: bytes) -> int:
    """Return the orientation (1 to 8) that EXIF data names; 1 where it names none, or one that does not exist."""
    # Only slices, which never raise; Pillow would read every tag of every photo.
    tiff = exif.removeprefix(b"Exif\0\0")
    first = _number(tiff, 4, 4) + 2
    for entry in range(first, min(first + 12 * _number(tiff, first - 2, 2), len(tiff)), 12):
        if _number(tiff, entry, 2) == 0x0112:
            value = _number(tiff, entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _number(tiff: bytes, start: int, size: int) -> int:
    return int.from_bytes(tiff[start : start + size], "little" if tiff[:2] == b"II" else "big")


class _JpegHeader(NamedTuple):
    width: int
    height: int
    components: int
    exif: bytes


def _decode_jpeg(data: bytes, max_pixels: int, short_side: int | None) -> Picture:
    header = _jpeg_header(data, max_pixels)
    enough = 2 * short_side if short_side else max_pixels
    factor = next((n for n in (8, 4, 2) if min(header.width, header.height) >= n * enough), 1)  # turbo is fast at these
    least = (-(-header.height // factor), -(-header.width // factor))
    pixels = _turbo(data, "RGB", least, strict=True) if header.components != 4 else None
    if pixels is None:
        pixels = _mended_jpeg(data, header, least)
    return _picture(pixels, header.width, header.height, _orientation(header.exif))


def _turbo(data: bytes, space: str, least: tuple[int, int], *, strict: bool) -> Pixels | None:
    """Decode with libjpeg-turbo. Return None if it gives up, or, if `strict`, has anything to remark."""
    try:
        array: Pixels = simplejpeg.decode_jpeg(data, space, min_height=least[0], min_width=least[1], strict=strict)
    except ValueError:
        return None
    return array


def _mended_jpeg(data: bytes, header: _JpegHeader, least: tuple[int, int]) -> Pixels:
    """Decode what turbo does not take as it is: a file without an end marker, with slight damage, or of a rare kind.

    With an end marker the damage is as slight as the decoder finds it. Without one the file was cut, which is no loss
    only if every bit of its scans is there.
    """
    space = "CMYK" if header.components == 4 else "RGB"
    pixels = None
    if not data.endswith(b"\xff\xd9") and all(marker != _EOI for marker, _, _ in _segments(data)):
        whole, data = _scans_are_whole(data), data + b"\xff\xd9"
        if not whole or (pixels := _turbo(data, space, least, strict=True)) is None:
            raise Rejected("truncated", f"the JPEG of {header.width}x{header.height} pixels ends inside its scan data")
    elif space == "RGB":
        pixels = _turbo(data, space, least, strict=False)
    if pixels is None or space == "CMYK":  # odd sampling, or inks, whose conversion is Pillow's
        pixels, _ = _pillow(data, "jpeg", header.width * header.height)
    return pixels


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end of its segment's content) of a JPEG, as far as the end marker or the end of the data.

    Segments are skipped by their length, so that the thumbnail in the EXIF data ends nothing.
    """
    position = 2
    while match := _MARKER.search(data, position):
        marker, start = match[1][0], match.end()
        if marker in (0x01, 0xD8, _EOI):
            position = start
        else:
            position = start + max(2, int.from_bytes(data[start : start + 2], "big"))
            start += 2
        yield marker, start, position
        if marker == _EOI:
            return


def _jpeg_header(data: bytes, max_pixels: int) -> _JpegHeader:
    """Read a JPEG's segments up to its first scan."""
    frame: tuple[int, int, int] | None = None
    exif = b""
    for marker, start, end in _segments(data):
        if marker in _FRAMES and end <= len(data) and end - start >= 6:
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 1, start + 3))
            frame = (width, height, data[start + 5])
            _check_size(width, height, max_pixels)
            if marker not in _READABLE_FRAMES or data[start] != 8:
                raise Rejected("unsupported", f"a JPEG of type SOF{marker - 0xC0} with {data[start]} bits a sample")
        elif marker == _APP1 and not exif and data.startswith(b"Exif\0\0", start):
            exif = data[start:end]
        elif marker in (_SOS, _EOI):
            if frame is None or marker == _EOI:
                raise Rejected("corrupt", "the JPEG has no frame header, or no scan")
            return _JpegHeader(*frame, exif)
    raise Rejected("corrupt" if data.endswith(b"\xff\xd9") else "truncated", "the JPEG ends inside its header")


def _scans_are_whole(data: bytes) -> bool:
    """Tell whether the scans bring each coefficient of each component to its last bit.

    libjpeg is content with a progressive file that ends between two scans. Read from their headers (ITU-T T.81, B.2).
    """
    missing: dict[int, set[int]] = {}
    progressive = False
    for marker, start, end in _segments(data):
        content = data[start:end]
        if end > len(data):
            return False
        if marker in _FRAMES:
            progressive = marker in _PROGRESSIVE
            missing = {content[at]: set(range(64)) for at in range(6, 6 + 3 * content[5], 3)}
        elif marker == _SOS:
            names_end = 1 + 2 * content[0]
            first, last, bits = content[names_end : names_end + 3] if progressive else (0, 63, 0)
            if bits & 0x0F == 0:
                for component in content[1:names_end:2]:
                    missing[component] -= set(range(first, last + 1))
    return not any(missing.values())


def _pillow(data: bytes, kind: str, max_pixels: int) -> tuple[Pixels, int]:
    """Return the pixels (H, W, 3) as they lie in the file, and the orientation that is still to be applied."""
    if kind == "webp" and data[12:16] == b"VP8X" and len(data) >= 30:  # Pillow takes memory for the canvas on opening
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        _check_size(width, height, max_pixels)
    with Image.open(io.BytesIO(data), formats=[_READERS[kind]]) as image:
        _check_size(image.width, image.height, max_pixels)
        image.load()  # turns a TIFF upright; PNG may have its EXIF data behind the pixels
        exif = image.info.get("exif") if kind in ("png", "webp") else None
        return _rgb(image, kind), _orientation(exif or b"")


def _rgb(image: Image.Image, kind: str) -> Pixels:
    """Apply the table at the top of this module."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "pnm"):  # PNM: 16 bits in the mode for 32
        grey = ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif image.mode in ("I", "F"):
        grey = _stretch(np.asarray(image))
    else:
        image.info.pop("transparency", None)
        if image.mode == "LAB":
            raise Rejected("unsupported", "CIELAB colours are not read in this version")
        return np.array(image.convert("RGB"))
    return np.repeat(grey[:, :, None], 3, axis=2)


def _stretch(values: Pixels) -> Pixels:
    """Map the least..greatest finite value to 0..255.

    >>> _stretch(np.array([-1.0, np.nan, 0.0, 1.0, np.inf])).tolist()
    [0, 0, 128, 255, 255]
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if low == high:
        return np.zeros(values.shape, np.uint8)
    share = np.nan_to_num((values.astype(np.float64) - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(share * 255).astype(np.uint8)


def _refusal(data: bytes, kind: str, error: Exception) -> Rejected:
    """Translate what a decoder raised. The decoders name neither their format nor a reason that could be relied on."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in text:
        return Rejected("out_of_memory", f"{kind}: {text}")
    early = ("truncated", "not enough image data", "EOF")
    if isinstance(error, EOFError) or any(word in text for word in early) or _ends_early(data, kind):
        return Rejected("truncated", f"{kind}: the file ends early ({text})")
    return Rejected("corrupt", f"{kind}: {text}")


def _ends_early(data: bytes, kind: str) -> bool:
    """Tell whether the file is shorter than its own structure says, or lacks the end that its format has."""
    if kind in ("webp", "bmp"):
        start, base = (4, 8) if kind == "webp" else (2, 0)
        return len(data) < base + int.from_bytes(data[start : start + 4], "little")
    if kind in ("png", "gif"):
        return b"IEND" not in data if kind == "png" else b";" not in data[-16:]
    if kind != "tiff":
        return False
    directory = _number(data, 4, 4)
    if directory + 2 + 12 * _number(data, directory, 2) > len(data):
        return True
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
        tags = image.tag_v2  # type: ignore[attr-defined]
        places = (zip(tags.get(at, ()), tags.get(size, ()), strict=False) for at, size in ((273, 279), (324, 325)))
        return any(start + size > len(data) for pairs in places for start, size in pairs)  # strips, tiles
    return False

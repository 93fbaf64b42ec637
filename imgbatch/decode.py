"""Bytes of an image file become RGB pixels, or a reject that says why not.

The bytes alone decide the type; names play no part. JPEG goes through libjpeg-turbo (simplejpeg), everything else through
Pillow, of which only the first frame or page is read. What the file holds becomes 8-bit RGB like this:

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

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import simplejpeg

# Registered here because Pillow does so at the first file that asks for one, and several threads may ask at once.
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

if TYPE_CHECKING:
    import torch

    Pixels = np.ndarray[Any, np.dtype[Any]]

_READERS = {
    "jpeg": JpegImagePlugin.JpegImageFile.format,
    "png": PngImagePlugin.PngImageFile.format,
    "webp": WebPImagePlugin.WebPImageFile.format,
    "gif": GifImagePlugin.GifImageFile.format,
    "bmp": BmpImagePlugin.BmpImageFile.format,
    "tiff": TiffImagePlugin.TiffImageFile.format,
    "pnm": PpmImagePlugin.PpmImageFile.format,
}
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
    ("exr", re.compile(rb"v/1\1")),
    ("pam", re.compile(rb"P7\n")),
]

# The limit is `max_pixels`, checked on every header below; Pillow's own would warn or refuse before it.
Image.MAX_IMAGE_PIXELS = None
_HUSHED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither a stuffed byte (FF00) nor a restart (FFD0 to FFD7)
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xCA}
_READABLE_FRAMES = {0xC0, 0xC1, 0xC9} | _PROGRESSIVE


class Rejected(Exception):
    """The bytes give no picture. `reason` is one word of the closed list of DESIGN.md; the message tells the rest."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Picture:
    """Upright pixels, and the size of the original."""

    pixels: torch.Tensor
    """uint8 (3, H, W), RGB, strided channels-last (the layout in which torchvision resizes fastest)."""
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
        data: the whole file.
        max_pixels: a picture with more is refused from its header, before memory is taken for it.
        short_side: what the caller will shrink the shorter side to. A JPEG may then be decoded at 1/2, 1/4 or 1/8, as long
            as twice that side is left, so that the caller's own filter still does the shrinking that can be seen.

    Raises:
        Rejected: empty, not_an_image, unsupported, too_large, truncated, corrupt or out_of_memory. Nothing else is raised,
            whatever the bytes.
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
        return _decode_jpeg(data, max_pixels, short_side) if kind == "jpeg" else _decode_other(data, kind, max_pixels)
    except Rejected:
        raise
    except Exception as error:
        raise _refusal(data, kind, error) from error


def _hush_pillow() -> None:
    """Keep Pillow's remarks on odd metadata off the log; they are none on the pixels.

    `catch_warnings` is not safe among threads, hence a filter for the whole process. It is looked for at each call,
    because whoever sets filters later (a test runner, a worker's start-up) would otherwise stand before it.
    """
    if list(warnings.filters[:1]) != [_HUSHED]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise Rejected("corrupt", f"the header says {width}x{height} pixels")
    if width * height > max_pixels:
        raise Rejected("too_large", f"{width}x{height} pixels are more than decode.max_pixels={max_pixels}")


def _picture(pixels: Pixels, width: int, height: int, orientation: int) -> Picture:
    """Turn (H, W, 3) as it lies in the file upright. `width` and `height` are those in the file's header."""
    import torch

    if orientation >= 5:
        pixels, width, height = pixels.swapaxes(0, 1), height, width
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return Picture(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), width, height)


def _orientation(exif: bytes) -> int:
    """Return the orientation (1 to 8) that EXIF data names; 1 where it names none, or one that does not exist.

    Only slices, which never raise, and no Pillow, which reads every tag: most photos of a camera come through here.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = "<" if tiff[:2] == b"II" else ">"

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], "little" if order == "<" else "big")

    first = number(4, 4) + 2
    for entry in range(first, min(first + 12 * number(first - 2, 2), len(tiff)), 12):
        if number(entry, 2) == 0x0112:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


# ---- JPEG


class _JpegHeader(NamedTuple):
    width: int
    height: int
    components: int
    exif: bytes


def _decode_jpeg(data: bytes, max_pixels: int, short_side: int | None) -> Picture:
    header = _jpeg_header(data, max_pixels)
    factor = _reduction(min(header.width, header.height), short_side)
    least = (-(-header.height // factor), -(-header.width // factor))
    pixels = None
    if header.components != 4:
        pixels = _turbo(data, "RGB", least, strict=True)
    if pixels is None:  # not flawless, or nothing for turbo
        pixels = _mended_jpeg(data, header, least)
    return _picture(pixels, header.width, header.height, _orientation(header.exif))


def _reduction(side: int, wanted: int | None) -> int:
    """Return the greatest of 8, 4, 2 that leaves twice the side that is wanted, else 1.

    libjpeg-turbo can scale by any eighth, but has fast code for these alone.
    """
    return next((factor for factor in (8, 4, 2) if wanted and side >= 2 * wanted * factor), 1)


def _turbo(data: bytes, space: str, least: tuple[int, int], *, strict: bool) -> Pixels | None:
    """Decode with libjpeg-turbo. Return None if it gives up, or, if `strict`, has anything to remark."""
    try:
        array: Pixels = simplejpeg.decode_jpeg(
            data, colorspace=space, min_height=least[0], min_width=least[1], strict=strict
        )
    except ValueError as error:
        if "memory" in str(error):
            raise MemoryError(str(error)) from error
        return None
    return array


def _mended_jpeg(data: bytes, header: _JpegHeader, least: tuple[int, int]) -> Pixels:
    """Decode what turbo does not take as it is: a file without an end marker, with slight damage, or of a rare kind.

    With an end marker the damage is as slight as the decoder finds it. Without one the file was cut, and only if every bit
    of its scans is there was it cut behind them.
    """
    space = "CMYK" if header.components == 4 else "RGB"
    pixels = None
    if not any(marker == _EOI for marker, _, _ in _segments(data)):
        data += b"\xff\xd9"
        if not _scans_are_whole(data) or (pixels := _turbo(data, space, least, strict=True)) is None:
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
    raise Rejected("truncated", "the JPEG ends inside its header")


def _scans_are_whole(data: bytes) -> bool:
    """Tell whether the scans bring each coefficient of each component to its last bit.

    libjpeg is content with a progressive file that ends between two scans. Read from the headers of frame and scans
    (ITU-T T.81, B.2.2 and B.2.3).
    """
    missing: dict[int, set[int]] = {}
    progressive = False
    for marker, start, end in _segments(data):
        content = data[start:end]
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


# ---- everything else


def _decode_other(data: bytes, kind: str, max_pixels: int) -> Picture:
    pixels, exif = _pillow(data, kind, max_pixels)
    height, width = pixels.shape[:2]
    # Pillow turns TIFF upright itself; GIF, BMP and PNM have no EXIF data.
    return _picture(pixels, width, height, _orientation(exif) if kind in ("png", "webp") else 1)


def _pillow(data: bytes, kind: str, max_pixels: int) -> tuple[Pixels, bytes]:
    """Return the pixels (H, W, 3) and the raw EXIF data."""
    if kind == "webp" and data[12:16] == b"VP8X" and len(data) >= 30:  # Pillow takes memory for the canvas on opening
        _check_size(*(1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27)), max_pixels)
    with Image.open(io.BytesIO(data), formats=[_READERS[kind]]) as image:
        _check_size(image.width, image.height, max_pixels)
        image.load()
        exif = image.info.get("exif", b"")
        return _rgb(image, kind), exif if isinstance(exif, bytes) else b""


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


# ---- why it failed


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
    """Tell whether the file is shorter than its own structure says."""
    if kind == "webp":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "bmp":
        return len(data) < int.from_bytes(data[2:6], "little")
    if kind == "png":
        return b"IEND" not in data
    if kind == "gif":
        return b";" not in data[-16:]
    return kind == "tiff" and _tiff_ends_early(data)


def _tiff_ends_early(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=[_READERS["tiff"]]) as image:
            tags = image.tag_v2  # type: ignore[attr-defined]
        strips, tiles = (zip(tags.get(at, ()), tags.get(size, ()), strict=False) for at, size in ((273, 279), (324, 325)))
        return any(start + size > len(data) for start, size in (*strips, *tiles))
    except Exception:  # noqa: BLE001 (it failed before, that is why we are here; what is left is the place of its directory)
        order = data[:2] == b"II"
        start = int.from_bytes(data[4:8], "little" if order else "big")
        count = int.from_bytes(data[start : start + 2], "little" if order else "big")
        return start + 2 + 12 * count > len(data)

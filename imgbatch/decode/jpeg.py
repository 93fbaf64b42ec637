"""Values: JPEG through libjpeg-turbo, which distinguishes a truncated file from one that only lacks its end marker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import simplejpeg

from imgbatch.decode import pillow
from imgbatch.decode.exif import orientation
from imgbatch.decode.picture import Picture, Pixels, Rejected, check_size, upright

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither a stuffed byte (FF00) nor a restart (FFD0 to FFD7)
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_FRAMES, _PROGRESSIVE = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}, {0xC2, 0xCA}
_READABLE_FRAMES = {0xC0, 0xC1, 0xC9} | _PROGRESSIVE


class Header(NamedTuple):
    """The facts of a JPEG before its first scan. `frame`: the marker of the frame, which defines the kind of coding."""

    width: int
    height: int
    components: int
    bits: int
    frame: int
    exif: bytes


def decode(data: bytes, max_pixels: int, short_side: int | None) -> Picture:
    """Decode a JPEG, at a reduced scale if `short_side` allows it."""
    header = read_header(data, max_pixels)
    if header.frame not in _READABLE_FRAMES or header.bits != 8:
        raise Rejected("unsupported", f"a JPEG of type SOF{header.frame - 0xC0} with {header.bits} bits a sample")
    min_side = 2 * short_side if short_side else max_pixels
    # libjpeg-turbo is fast at these factors.
    factor = next((n for n in (8, 4, 2) if min(header.width, header.height) >= n * min_side), 1)
    minimum = (-(-header.height // factor), -(-header.width // factor))
    pixels = _turbo(data, "RGB", minimum, strict=True) if header.components != 4 else None
    if pixels is None:
        pixels = _decode_damaged(data, header, minimum)
    return upright(pixels, header.width, header.height, orientation(header.exif))


def _turbo(data: bytes, space: str, minimum: tuple[int, int], *, strict: bool) -> Pixels | None:
    """Decode with libjpeg-turbo. Return None if it fails, or, if `strict`, gives a warning."""
    try:
        array: Pixels = simplejpeg.decode_jpeg(data, space, min_height=minimum[0], min_width=minimum[1], strict=strict)
    except ValueError:
        return None
    return array


def _decode_damaged(data: bytes, header: Header, minimum: tuple[int, int]) -> Pixels:
    """Decode a file that libjpeg-turbo refuses: without an end marker, slightly damaged, or of a rare kind.

    With an end marker, the decoder decides whether the damage is slight. Without one the file was truncated, and is accepted
    only if its scans are complete to the last bit.
    """
    space = "CMYK" if header.components == 4 else "RGB"
    pixels = None
    if not data.endswith(b"\xff\xd9") and all(marker != _EOI for marker, _, _ in _segments(data)):
        complete, data = _scans_are_complete(data), data + b"\xff\xd9"
        if not complete or (pixels := _turbo(data, space, minimum, strict=True)) is None:
            raise Rejected("truncated", f"the JPEG of {header.width}x{header.height} pixels ends inside its scan data")
    elif space == "RGB":
        pixels = _turbo(data, space, minimum, strict=False)
    if pixels is None or space == "CMYK":  # rare sampling, or CMYK, which Pillow converts
        pixels, _ = pillow.read(data, "jpeg", header.width * header.height)
    return pixels


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end of its segment's content) of a JPEG, as far as the end marker or the end of the data.

    Segments are skipped by their length, so that the end marker of a thumbnail in the EXIF data is ignored.
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


def read_header(data: bytes, max_pixels: int) -> Header:
    """Read a JPEG's segments up to its first scan.

    Raises:
        Rejected: too_large, truncated or corrupt.
    """
    frame: tuple[int, int, int, int, int] | None = None
    exif = b""
    for marker, start, end in _segments(data):
        if marker in _FRAMES and end <= len(data) and end - start >= 6:
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 1, start + 3))
            frame = (width, height, data[start + 5], data[start], marker)
            check_size(width, height, max_pixels)
        elif marker == _APP1 and not exif and data.startswith(b"Exif\0\0", start):
            exif = data[start:end]
        elif marker in (_SOS, _EOI):
            if frame is None or marker == _EOI:
                raise Rejected("corrupt", "the JPEG has no frame header, or no scan")
            return Header(*frame, exif)
    raise Rejected("corrupt" if data.endswith(b"\xff\xd9") else "truncated", "the JPEG ends inside its header")


def _scans_are_complete(data: bytes) -> bool:
    """Return whether the scans contain each coefficient of each component down to its last bit.

    libjpeg accepts a progressive file that ends between two scans, so their headers are read here (ITU-T T.81, B.2).
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

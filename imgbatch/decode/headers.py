"""Values: checks of headers before a decoder opens the file, which may allocate memory for the picture."""

from __future__ import annotations

import re
from collections.abc import Iterator

from imgbatch.decode.picture import Rejected, check_size

_PAINTING = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf"}
_CODESTREAM = b"\xff\x4f\xff\x51"
_TILE_PART, _TILE_DATA, _END = b"\xff\x90", b"\xff\x93", b"\xff\xd9"
_CODING, _CODING_OF_COMPONENT = b"\xff\x52", b"\xff\x53"
_SIZE_BOX = re.compile(rb"\0\0\0\x14ispe....(.{8})", re.S)
_MAX_LAYERS = 100
_MAX_BLOCKS = 100_000  # of a GIF before its first picture; Pillow keeps comments in memory
_MAX_TILES = 16_384  # of a JPEG 2000; its decoder allocates about 10 kB for each when it has read the header


def check_gif(data: bytes) -> None:
    """Reject a GIF with too many comments and other blocks before its first picture.

    Raises:
        Rejected: corrupt.
    """
    flags = data[10] if len(data) > 10 else 0
    at = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    inside = False  # whether the position is in an extension, where each block has a length
    for _ in range(_MAX_BLOCKS):
        if at >= len(data) or (not inside and data[at] in b",;"):
            return
        if inside:
            inside, at = data[at] > 0, at + 1 + data[at]
        else:
            inside = data[at] == ord("!")
            at += 2 if inside else 1
    raise Rejected("corrupt", f"the GIF has more than {_MAX_BLOCKS} blocks before its first picture")


def check_webp(data: bytes, max_pixels: int) -> None:
    """Check the canvas of a WebP against the limit (RFC 9649; RFC 6386, 9.1).

    Raises:
        Rejected: too_large or corrupt.
    """
    if data[12:16] == b"VP8X" and len(data) >= 30:
        check_size(1 + _little(data, 24, 3), 1 + _little(data, 27, 3), max_pixels)
    elif data[12:16] == b"VP8L" and len(data) >= 25:
        bits = _little(data, 21, 4)
        check_size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), max_pixels)
    elif data[12:16] == b"VP8 " and len(data) >= 30:
        check_size(_little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF, max_pixels)


def check_boxes(data: bytes, max_pixels: int) -> None:
    """Check every size in an AVIF or HEIC against the limit: of the picture, its tiles, and the uncropped picture.

    If the coded picture is larger than declared, libheif fails, and libavif fails above 268 million pixels (ISO/IEC 23008-12).

    Raises:
        Rejected: too_large or corrupt.
    """
    start, end = next(((start, end) for name, start, end in _boxes(data) if name == b"meta"), (0, 0))
    for match in _SIZE_BOX.finditer(data, start, end):
        check_size(_big(match[1], 0, 4), _big(match[1], 4, 4), max_pixels)


def check_jp2(data: bytes, max_pixels: int) -> int:
    """Check size, components and tiles of a JPEG 2000's codestream against the limits (ITU-T T.800, A.5.1).

    Returns:
        The start of the codestream; the length of the data if there is none.

    Raises:
        Rejected: too_large, unsupported or corrupt.
    """
    start = 0
    if not data.startswith(_CODESTREAM):
        start = next((start for name, start, _ in _boxes(data) if name == b"jp2c"), len(data))
    if not data.startswith(_CODESTREAM, start) or len(data) < start + 42:
        return len(data)  # the decoder will report the error
    right, bottom, left, top, *tile = (_big(data, start + at, 4) for at in range(8, 40, 4))
    tile_width, tile_height, tile_left, tile_top = tile
    components = _big(data, start + 40, 2)
    check_size(right - left, bottom - top, max_pixels)
    if components > 4:
        raise Rejected("unsupported", f"a JPEG 2000 of {components} components; 1 to 4 are read")
    if not tile_width or not tile_height or tile_left > left or tile_top > top:
        raise Rejected("corrupt", "the JPEG 2000 header has tiles that do not cover the picture")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > _MAX_TILES:
        raise Rejected("unsupported", f"a JPEG 2000 of {tiles} tiles; up to {_MAX_TILES} are read")
    _check_pieces(data, start)
    return start


def painting_chunks(data: bytes) -> bytes:
    """Return a PNG with only the chunks that determine its pixels and its orientation.

    Texts and profiles, which may decompress to any size, later frames, and transparency, since alpha is dropped, are omitted.
    """
    chunks, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + _big(data, at, 4)  # length, name, content, checksum
        name = data[at + 4 : at + 8]
        if name in _PAINTING or end > len(data):
            chunks.append(data[at:end])
        if name == b"IEND":
            break
        at = end
    return b"".join(chunks)


def ends_early(data: bytes) -> bool:
    """Return whether a file of boxes (AVIF, HEIC, JPEG 2000) or a bare codestream is shorter than the lengths in it."""
    if data.startswith(_CODESTREAM):
        return not _is_complete(data, 0)
    boxes = list(_boxes(data))
    if not any(name in (b"mdat", b"idat", b"jp2c") for name, _, _ in boxes) or boxes[-1][2] > len(data):
        return True
    return any(not _is_complete(data, start) for name, start, _ in boxes if name == b"jp2c")


def _is_complete(data: bytes, start: int) -> bool:
    """Return whether a JPEG 2000's codestream is complete up to its end marker."""
    return any(marker == _END for marker, _ in _segments(data, start))


def _segments(data: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    """Yield marker and position of each segment in the headers of a JPEG 2000 and its tile-parts (ITU-T T.800, A.2 to A.4)."""
    at, part_end = start + 2, 0
    while at + 2 <= len(data):
        marker = data[at : at + 2]
        yield marker, at
        if marker == _TILE_PART:  # of length 0: up to the end marker
            part_end = at + (_big(data, at + 6, 4) or data.rfind(_END, at) - at)
        if marker == _END or (marker == _TILE_DATA and part_end <= at):
            return
        at = part_end if marker == _TILE_DATA else at + 2 + max(2, _big(data, at + 2, 2))


def _check_pieces(data: bytes, start: int) -> None:
    """Reject a JPEG 2000 in pieces so small that their overhead of some hundred bytes each exhausts memory (A.6.1, A.6.2)."""
    for marker, at in _segments(data, start):
        if marker not in (_CODING, _CODING_OF_COMPONENT):
            continue
        style, first = (data[at + 4 : at + 5], at + 9) if marker == _CODING else (data[at + 5 : at + 6], at + 6)
        levels, width, height = (data[first : first + 3] + bytes(3))[:3]
        precincts = data[first + 5 : first + 6 + levels] if style and style[0] & 1 else b""
        layers = _big(data, at + 6, 2) if marker == _CODING else 1
        small = (width & 15) + (height & 15) < 4 or any(min(size & 15, size >> 4) < 4 for size in precincts)
        if small or layers > _MAX_LAYERS:
            raise Rejected(
                "unsupported", f"a JPEG 2000 with precincts or code-blocks under 16x16, or over {_MAX_LAYERS} layers"
            )


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each top-level box's content (ISO base media and JPEG 2000 alike)."""
    at = 0
    while at + 8 <= len(data):
        length, head = _big(data, at, 4), 8
        if length == 1:
            length, head = _big(data, at + 8, 8), 16
        end = at + max(length, head) if length else len(data)
        yield data[at + 4 : at + 8], at + head, end
        at = end


def _little(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _big(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")

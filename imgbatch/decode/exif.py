"""Values: the orientation in EXIF data."""

from __future__ import annotations


def orientation(exif: bytes) -> int:
    """Return the orientation in EXIF data, 1 to 8; 1 if there is none, or an invalid one."""
    # Only slices, which never raise; Pillow would read every tag of every photo.
    tiff = exif.removeprefix(b"Exif\0\0")
    first = number(tiff, 4, 4) + 2
    for entry in range(first, min(first + 12 * number(tiff, first - 2, 2), len(tiff)), 12):
        if number(tiff, entry, 2) == 0x0112:
            value = number(tiff, entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def number(tiff: bytes, start: int, size: int) -> int:
    """Return an unsigned integer of a TIFF, in its byte order; bytes beyond the end are omitted."""
    return int.from_bytes(tiff[start : start + size], "little" if tiff[:2] == b"II" else "big")

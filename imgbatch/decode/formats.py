"""Values: detection of image formats by their first bytes."""

from __future__ import annotations

import re

_MAGIC = [
    ("jpeg", re.compile(rb"\xff\xd8\xff")),
    ("png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("webp", re.compile(rb"RIFF.{4}WEBP", re.S)),
    ("gif", re.compile(rb"GIF8[79]a")),
    ("bmp", re.compile(rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.S)),  # "BM" alone also begins texts
    ("tiff", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("pnm", re.compile(rb"P[1-6][\s#]")),
    ("avif", re.compile(rb".{4}ftyp(avi[fs]|m(if|sf)1.{4}(.{4}){0,15}?avi[fs])", re.S)),  # or a compatible brand
    ("heic", re.compile(rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.S)),
    ("jp2", re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ("jxl", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    ("dicom", re.compile(rb".{128}DICM", re.S)),
    ("psd", re.compile(rb"8BPS")),
    ("ico", re.compile(rb"\0\0[\1\2]\0[^\0]\0")),
    # The root element, after a prolog that may have a doctype with an internal subset in brackets.
    ("svg", re.compile(
        rb"(\xef\xbb\xbf)?\s*+(?>(<\?xml[^>]{0,1000}+>|<!--.{0,1000}?-->|<!DOCTYPE\s+svg[^>\[]{0,1000}+"
        rb"(\[.{0,1000}?\]\s*+)?>)\s*+){0,20}+<svg", re.S
    )),
]  # fmt: skip


def sniff(data: bytes) -> str | None:
    """Return the name of the image format of these bytes; None if it is unknown.

    >>> sniff(b"GIF89a..."), sniff(b"%PDF-1.7")
    ('gif', None)
    """
    return next((kind for kind, magic in _MAGIC if magic.match(data)), None)

"""Values: descriptions of files that are no images: a web page, a Git LFS pointer, an archive, a video.

The descriptions are used in messages only.
"""

from __future__ import annotations

import codecs
import re

_INSPECTED = 2_048
_SHOWN = 60

_POINTERS = [
    (
        re.compile(rb"version https://git-lfs"),
        "a Git LFS pointer, not the file itself: fetch it with git lfs pull",
    ),
    (
        re.compile(rb"(\.\./)*+(\.git)?/annex/objects/"),
        "a git-annex pointer, not the file itself: fetch it with git annex get",
    ),
]
_ARCHIVES = [
    (re.compile(rb"PK\x05\x06"), "an empty zip archive"),
    (re.compile(rb"PK\x03\x04"), "a zip archive"),
    (re.compile(rb"\x1f\x8b"), "gzip data"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "bzip2 data"),
    (re.compile(rb"\xfd7zXZ\0"), "xz data"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd data"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive"),
    (re.compile(rb"Rar!\x1a\x07"), "a RAR archive"),
    (re.compile(rb".{257}ustar", re.S), "a tar archive"),
]
_MAGIC = [
    *_POINTERS,
    *_ARCHIVES,
    (re.compile(rb"%PDF-"), "a PDF document"),
    (re.compile(rb"%!PS"), "a PostScript document"),
    (re.compile(rb"PAR1"), "a Parquet file"),
    (re.compile(rb"\x89HDF\r\n"), "an HDF5 file"),
    (re.compile(rb"\x93NUMPY"), "a NumPy array"),
    (re.compile(rb"SQLite format 3\0"), "an SQLite database"),
    (re.compile(rb"\xd0\xcf\x11\xe0"), "an Office document, or Windows' Thumbs.db"),
    (re.compile(rb".{4}(ftyp|moov|mdat)", re.S), "a video or audio file (MP4 or QuickTime)"),
    (re.compile(rb"\x1aE\xdf\xa3"), "a video (Matroska or WebM)"),
    (re.compile(rb"RIFF.{4}AVI ", re.S), "a video (AVI)"),
    (re.compile(rb"RIFF.{4}WAVE|ID3|fLaC|OggS", re.S), "an audio file"),
]

# Groups are atomic, so that a text of many comments does not cause exponential backtracking.
_BEFORE = r"\s*+(?>(?:<!--.*?-->|<\?xml[^>]*+>)\s*+)*+"
_HTML = re.compile(_BEFORE + r"<(?:!doctype\s+html|html|head|body|title|script|meta)\b", re.I | re.S)
_XML = re.compile(_BEFORE + r"<(?:!doctype\s+)?([a-z_][\w.:-]*)", re.I | re.S)
_CODE = re.compile(r"<code>\s*+([^<]{1,60})</code>", re.I)
_JSON = re.compile(r"\s*+(?:\{\s*+[\"}]|\[\s*+[\[{\"\]\d-])")
_CONTROLS = re.compile(r"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")


def pointer(data: bytes) -> str | None:
    """Describe a pointer of Git LFS or git-annex, and how to fetch the file; None for other files."""
    return next((name for magic, name in _POINTERS if magic.match(data)), None)


def archive(data: bytes) -> str | None:
    """Describe an archive or compressed data; None for other files."""
    return next((name for magic, name in _ARCHIVES if magic.match(data)), None)


def describe_placeholder(data: bytes) -> str | None:
    """Describe the content that is in place of a file if a download failed: a pointer, or a page or error of a server.

    >>> describe_placeholder(b"version https://git-lfs.github.com/spec/v1")
    'a Git LFS pointer, not the file itself: fetch it with git lfs pull'
    >>> describe_placeholder(b"uri,label"), describe_placeholder(b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>')
    (None, 'an XML error document, as stores return it (NoSuchKey)')
    """
    return pointer(data) or _page(_decoded(data[:_INSPECTED]))


def describe_content(data: bytes) -> str:
    """Describe the content of a file that is no image.

    >>> describe_content(b"<!DOCTYPE html><html>Please log in"), describe_content(b"%PDF-1.7")
    ('an HTML page (an error page or a login page?)', 'a PDF document')
    >>> describe_content(b"not found"), describe_content(b"\\x01\\x02")
    ("a text that begins with 'not found'", "no image format begins with b'\\\\x01\\\\x02'")
    """
    return describe_known(data) or f"no image format begins with {data[:16]!r}"


def describe_known(data: bytes) -> str | None:
    """Describe the content of a file of a known kind; None for others."""
    start = data[:_INSPECTED]
    for magic, name in _MAGIC:
        if magic.match(start):
            return name
    if data and not data.strip(b"\0"):
        return "only zero bytes: the file was not written completely"
    return _text(_decoded(start))


def _decoded(start: bytes) -> str:
    """Return the text of the first bytes, which may end within a character; other bytes become replacement characters."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return start.decode("utf-16", "ignore")
    return start.decode("utf-8-sig", "replace").rstrip("\ufffd")


def _page(text: str) -> str | None:
    """Describe a page or an error of a server."""
    if _HTML.match(text):  # in any encoding, since the tags are ASCII
        return "an HTML page (an error page or a login page?)"
    root, code = _XML.match(text), _CODE.search(text)
    if root and (code or "error" in root[1].lower()):
        return f"an XML error document, as stores return it{f' ({code[1].strip()})' if code else ''}"
    return None


def _text(text: str) -> str | None:
    """Describe a text; None for binary data."""
    if page := _page(text):
        return page
    if root := _XML.match(text):
        return f"an XML document ({_shown(root[1])})"
    if _CONTROLS.search(text) or not text.strip():
        return None
    kind = "a JSON document" if _JSON.match(text) else "a text"
    return f"{kind} that begins with {_shown(' '.join(text.split()))}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")

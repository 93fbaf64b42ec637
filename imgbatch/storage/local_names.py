"""Effects: the names of local files as text, and messages for names that cannot be opened."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from imgbatch.errors import BadPath, NotFound

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Errors of a broken link: its target does not exist, or is the link itself."""

_ENCODINGS = {"Shift-JIS": "cp932", "Windows-1252": "cp1252", "DOS": "cp437"}
"""Encodings of names that are not UTF-8: old Japanese and western systems, and zip files."""

_ESCAPE = re.compile(r"\\x([89a-f][0-9a-f])")


def readable(name: bytes) -> str:
    r"""Return a name as text. Bytes that are not UTF-8 become escapes, as in `caf\xe9.jpg`; `explained` recognises them.

    >>> readable("é.jpg".encode("latin-1"))
    '\\xe9.jpg'
    """
    return name.decode("utf-8", "backslashreplace")


@contextmanager
def explained(operation: str, path: str) -> Iterator[None]:
    """Explain why a path cannot be opened, if it is a broken link or its name is not UTF-8.

    Raises:
        NotFound: it is a broken link.
        BadPath: its name is not UTF-8.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*MISSING, errno.ENAMETOOLONG):  # escapes make a name longer
            raise
        if os.path.islink(path):
            raise NotFound(f"{operation} {path}: a link to {_target(path)}, which is not there") from error
        # `readable` wrote the bytes as escapes. Python's file API takes them as lone surrogates.
        original = _ESCAPE.sub(lambda escape: chr(0xDC00 + int(escape[1], 16)), path)
        if original != path and os.path.lexists(original):
            raise BadPath(f"{operation} {path}: {_not_utf8(original)}") from error
        raise


def _target(path: str) -> str:
    with suppress(OSError):
        return readable(os.readlink(os.fsencode(path)))
    return "somewhere"


def _not_utf8(path: str) -> str:
    """Return the message for a path that is not UTF-8, with what its name reads like in other encodings."""
    parts = os.fsencode(path).split(b"/")
    at = next(at for at, part in enumerate(parts) if _decoded(part, "utf-8") is None)
    folder, name = b"/".join(parts[:at]) or b"/", parts[at]
    decoded = {title: _decoded(name, code) for title, code in _ENCODINGS.items()}
    guesses = {title: text for title, text in decoded.items() if text is not None and text.isprintable()}
    examples = ", ".join(f"{text!r} in {title}" for title, text in guesses.items())
    code = _ENCODINGS[next(iter(guesses))] if guesses else "ENCODING"
    return (
        f"the name {name!r}{f' ({examples})' if examples else ''} is not UTF-8, so that no table can hold it: rename it, for "
        f"example with convmv -f {code} -t utf8 -r --notest {readable(folder)}"
    )


def _decoded(name: bytes, encoding: str) -> str | None:
    with suppress(UnicodeDecodeError):
        return name.decode(encoding)
    return None

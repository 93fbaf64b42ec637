"""Effects: URIs as text: schemes, absolute and joined URIs, and local paths that do not exist.

A URI has the form that `fsspec.url_to_fs` accepts and is not percent-encoded. A local URI is an absolute path without
`file://`.
"""

from __future__ import annotations

import os
import re

from imgbatch.errors import closest

_PROTOCOL = re.compile(r"([A-Za-z0-9+.-]+(?:::[A-Za-z0-9+.-]+)*)://")


def split_scheme(uri: str) -> tuple[str, str]:
    """Return the scheme and the part after `://`; an empty scheme for a path.

    >>> split_scheme("s3://b/x"), split_scheme("/data/x")
    (('s3', 'b/x'), ('', '/data/x'))
    """
    match = _PROTOCOL.match(uri)
    return (match[1], uri[match.end() :]) if match else ("", uri)


def scheme(uri: str) -> str:
    """Return the part before `://`; `file` for a local path.

    >>> scheme("s3://b/x"), scheme("/data/x"), scheme("simplecache::s3://b/x")
    ('s3', 'file', 'simplecache::s3')
    """
    return "file" if is_local(uri) else split_scheme(uri)[0]


def is_local(uri: str) -> bool:
    """Return whether a URI refers to this machine's file system."""
    return split_scheme(uri)[0] in ("", "file", "local")


def absolute(uri: str) -> str:
    """Return a URI as the tables have it: local paths absolute and without a scheme, no slash at the end.

    >>> absolute("s3://bucket/photos/"), absolute("file:///data/a.jpg")
    ('s3://bucket/photos', '/data/a.jpg')
    """
    protocol, rest = split_scheme(uri)
    if is_local(uri):
        return os.path.abspath(os.path.expanduser(rest))
    return f"{protocol}://{rest.rstrip('/')}"


def missing_path(uri: str) -> str | None:
    """Return the message for a local path that does not exist, with a near miss; None if it exists or is not local.

    Object stores have no folders, so that only a listing shows whether something lies below a name.
    """
    if not is_local(uri) or os.path.lexists(path := absolute(uri)):
        return None
    parent, name = os.path.split(path)
    if not os.path.isdir(parent):
        above = parent
        while above != os.path.dirname(above) and not os.path.isdir(above):
            above = os.path.dirname(above)
        return f"{path} does not exist; of its path only {above} exists"
    try:
        match = closest(name, sorted(os.listdir(parent)))
    except OSError:  # the folder may not be listed; the message does not need the near miss
        match = None
    return f"{path} does not exist" + (f"; did you mean {os.path.join(parent, match)}?" if match is not None else "")


def join(folder: str, name: str) -> str:
    """Return the URI of `name` in `folder`; a name that is a URI or an absolute path is returned as it is.

    >>> join("s3://b/lists", "cats/1.jpg"), join("/data", "/other/2.jpg"), join("s3://b/lists", "../3.jpg")
    ('s3://b/lists/cats/1.jpg', '/other/2.jpg', 's3://b/3.jpg')
    """
    if split_scheme(name)[0] or name.startswith("/"):
        return absolute(name)
    protocol, base = split_scheme(folder)
    path = f"{base.rstrip('/')}/{name}"
    if not protocol:
        return os.path.abspath(path)
    if {".", ".."} & set(name.split("/")):  # only then: in an object store a//b and a/b are different keys
        path = os.path.normpath(path)
    return f"{protocol}://{path}"

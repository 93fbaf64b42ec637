"""Values: masking of secrets in everything that is logged, reported or recorded."""

from __future__ import annotations

import re

# What is before the @ of a URI of Azure, without a colon, is the container's name.
_AZURE = "".join(rf"(?<!\b{scheme})" for scheme in ("az", "abfs", "abfss", "wasb", "wasbs"))
_USER = re.compile(rf"{_AZURE}://[^/@\s\"]+@|://[^/@\s\":]+:[^/@\s\"]*@")
_SIGNATURE = re.compile(
    r"([?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|sig|AWSAccessKeyId|token)=)[^&\s\"]+",
    re.I,
)


def masked(text: str) -> str:
    """Return a text with the passwords and signatures of its URIs masked.

    >>> masked("GET https://me:secret@host/a.jpg?X-Amz-Signature=0123&x=1 failed")
    'GET https://***@host/a.jpg?X-Amz-Signature=***&x=1 failed'
    >>> masked("abfs://photos@me.dfs.core.windows.net/a.jpg")
    'abfs://photos@me.dfs.core.windows.net/a.jpg'
    """
    return _SIGNATURE.sub(r"\1***", _USER.sub("://***@", text))

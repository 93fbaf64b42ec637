"""Values: what differs between the services that obstore reads and writes: S3, Google Cloud Storage, Azure Blob Storage."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from imgbatch.errors import ConfigError, did_you_mean
from imgbatch.storage.base import STORE_LISTING, unquote_etag

CODES_WITHOUT_SUPPORT = frozenset({301, 307, 400, 403, 405, 501})
"""HTTP statuses of S3 servers that do not support conditional deletion, or signed URLs."""


class Entry(NamedTuple):
    """One object of a listing."""

    key: str
    size: int
    etag: str | None
    last_modified: datetime | None


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to a listing request."""

    objects: pa.RecordBatch
    """As `STORE_LISTING`, without the empty objects that mark folders."""
    folders: list[str]
    """Folders directly below, without the slash at their end; only where they were requested."""
    next_page: str | None
    """The token of the next page."""

    @classmethod
    def of(cls, entries: Iterable[Entry], folders: Iterable[str] = (), next_page: str | None = None) -> Page:
        """Build a page; entries whose names end in a slash mark folders and are omitted."""
        objects = [entry for entry in entries if not entry.key.endswith("/")]
        columns = [
            pa.array([entry.key for entry in objects], pa.string()),
            pa.array([entry.size for entry in objects], pa.int64()),
            pa.array([unquote_etag(entry.etag) for entry in objects], pa.string()),
            pa.array([entry.last_modified for entry in objects], STORE_LISTING.field(3).type),
        ]
        return cls(
            pa.record_batch(columns, schema=STORE_LISTING), [name.removesuffix("/") for name in folders], next_page
        )


class Bucket(Protocol):
    """One bucket or container: obstore's client for it, and the requests that obstore cannot make."""

    name: str
    """How messages name it, such as `s3://photos`."""

    store: Any
    """obstore's store."""

    sorted_listing: bool
    """Whether keys are listed in order, so that a listing can resume after a key."""

    codes_without_support: Collection[int]
    """HTTP statuses of `delete` that mean that this server has no conditional deletion."""

    def page(self, prefix: str, *, after: str = "", token: str | None = None, folders: bool = False) -> Page:
        """List one page of the keys that begin with `prefix`, whatever characters they contain.

        Args:
            after: list only keys after this one.
            token: `next_page` of the page before.
            folders: list only what is directly below the prefix, and the folders there.
        """

    def delete(self, path: str, tag: Tag | None) -> int:
        """Remove an object, with a tag only that version of it; return the HTTP status."""


class Tag(NamedTuple):
    """What identifies a version of an object: S3 and Azure compare the ETag, Google Cloud Storage the generation.

    >>> Tag('"abc"', "17").text, Tag.of('generation=17;"abc"'), Tag.of('"abc"')
    ('generation=17;"abc"', Tag(etag='"abc"', version='17'), Tag(etag='"abc"', version=None))
    """

    etag: str | None
    version: str | None = None

    @property
    def text(self) -> str | None:
        """The tag as callers of `Store` hold it."""
        return f"generation={self.version};{self.etag or ''}" if self.version else self.etag

    @classmethod
    def of(cls, text: str) -> Tag:
        """Parse a tag from its `text`."""
        if match := re.fullmatch(r"generation=([^;]+);(.*)", text, re.DOTALL):
            return cls(match[2] or None, match[1])
        return cls(text)

    @property
    def update_mode(self) -> dict[str, str]:
        """The tag as obstore takes it."""
        return {name: value for name, value in (("e_tag", self.etag), ("version", self.version)) if value}


def require_known(scheme: str, options: Mapping[str, Any], supported: Collection[str]) -> None:
    """Refuse options that a store does not have.

    Raises:
        ConfigError: naming the first of them.
    """
    for name in options:
        if name not in supported:
            hint = did_you_mean(name, supported) or f"; its options are: {', '.join(sorted(supported))}."
            raise ConfigError(
                f"storage.options: {scheme}:// has no option {name!r}{hint} Options of one store go into "
                "storage.options.s3, .gs or .az"
            )


def as_text(value: Any) -> Any:
    """Return an option as obstore takes it: `--set storage.options.key=123` gives a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def client_options(endpoint: str, timeout_s: float) -> dict[str, Any]:
    """Return obstore's options of the HTTP client."""
    return {
        "timeout": f"{timeout_s}s",
        "connect_timeout": f"{min(timeout_s, 10.0)}s",
        "allow_http": endpoint.startswith("http://"),
    }

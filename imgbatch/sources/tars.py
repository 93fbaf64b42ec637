"""Images that are members of tars (WebDataset shards): read as a stream, in the order in which they stand, never unpacked.

A member's URI is `TAR#NAME`. Its name up to the first dot is its key; `.cls`, `.json` and `.txt` members of the same key
travel along. Which members a tar has is known once it is read to its end: only the pass that labels them reads it.
"""

from __future__ import annotations

import re
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa

from imgbatch.listing import Found
from imgbatch.rejects import Refusal
from imgbatch.schema import CARRIED, LISTING, TAR, with_carried
from imgbatch.sources.names import candidate_pattern
from imgbatch.storage import Meta, Stores

SUFFIXES = (".tar", ".tar.gz", ".tgz")
SIDECARS = ("cls", "json", "txt")
CARRIED_FIELDS = pa.schema([(CARRIED + name, pa.string()) for name in SIDECARS])

# What `tarfile` raises for a block of zeros, for nothing, and for less than a header; it does not name them in public.
_EndMark, _EmptyHeader, _TruncatedHeader = (
    getattr(tarfile, name) for name in ("EOFHeaderError", "EmptyHeaderError", "TruncatedHeaderError")
)

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MOST_SIDECAR_BYTES = 1 << 20
_BUFFER = 1 << 16


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a tar."""

    name: str
    offset: int
    """Where its header begins."""
    group: int
    """Where the header of the first member of its key begins: a reader that comes again may start there."""
    content: bytes | Refusal
    sidecars: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class End:
    """The end of a tar, or the tear."""

    offset: int
    ignored: int
    """Members that are neither images nor sidecars, nor folders."""
    tear: Refusal | None = None


def listed(uri: str, meta: Meta) -> Iterator[Found]:
    """Yield a tar as one row, in place of its members."""
    row = {"uri": uri, "size": meta.size, "etag": meta.etag, "last_modified": meta.last_modified}
    yield in_place_of_members(pa.RecordBatch.from_pylist([row], schema=LISTING))


def in_place_of_members(objects: pa.RecordBatch) -> Found:
    """Return tars as rows in place of their members, with the columns that these are going to carry."""
    columns = {name: objects[name] for name in objects.schema.names}
    columns["container"] = pa.repeat(TAR, len(objects))
    columns |= {entry.name: pa.nulls(len(objects), entry.type) for entry in CARRIED_FIELDS}
    return Found(pa.record_batch(columns, schema=with_carried(LISTING, CARRIED_FIELDS)))


class _Header(tarfile.TarInfo):
    """A header that tells the tar what it found in place of another one: `tarfile` keeps silent about most tears."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ended_by = error
            raise


@dataclass
class Tar:
    """One tar, to be read once from a position on."""

    stores: Stores
    uri: str
    meta: Meta
    suffixes: str
    max_bytes: int
    _key: str | None = None
    _group: int = 0
    _images: list[tuple[str, int, bytes | Refusal]] = field(default_factory=list)
    _sidecars: dict[str, str] = field(default_factory=dict)
    _ignored: int = 0

    def members(self, group: int = 0, through: int = -1) -> Iterator[Member | End]:
        """Yield the images behind the one whose header begins at `through`, and the end; reading begins at `group`.

        Raises:
            StoreError: the store stayed away, or the tar is another than the one that was listed.
        """
        packed = not self.uri.lower().endswith(".tar")  # no position within it can be asked for
        base = 0 if packed else group
        candidate = re.compile(candidate_pattern(self.suffixes) or "")
        tar: Any = None
        tear: Refusal | None = None
        with self.stores.stream(self.uri, self.meta, base) as file:
            try:
                mode: Any = "r|gz" if packed else "r|"
                # Names that are no UTF-8 stay distinct, and can stand in a table.
                tar = tarfile.open(  # noqa: SIM115 - of the stream nothing has to be closed
                    fileobj=file, mode=mode, tarinfo=_Header, bufsize=_BUFFER, errors="backslashreplace"
                )
                while (info := _next(tar)) is not None:
                    tar.members.clear()  # a tar of a million members would keep them all
                    yield from self._take(tar, info, base, candidate, through)
                if not isinstance(getattr(tar, "ended_by", None), _EndMark):
                    tear = _torn(getattr(tar, "ended_by", None))
            except (tarfile.TarError, zlib.error, EOFError) as error:
                tear = _torn(error)
        yield from self._flush(through)
        yield End(base + (tar.offset if tar is not None else 0), self._ignored, tear)

    def _take(
        self, tar: tarfile.TarFile, info: tarfile.TarInfo, base: int, candidate: re.Pattern[str], through: int
    ) -> Iterator[Member]:
        found = _KEY.fullmatch(info.name)
        key = found[1] if found else None
        if key is None or key != self._key:
            yield from self._flush(through)
            self._key, self._group, self._sidecars = key, base + info.offset, {}
        if found and found[2].lower() in SIDECARS and info.isreg() and info.size <= _MOST_SIDECAR_BYTES:
            text = cast(Any, tar.extractfile(info)).read().decode("utf-8", "replace")
            self._sidecars[CARRIED + found[2].lower()] = text.strip()
        elif candidate.search(info.name) and not info.isdir():
            self._images.append((info.name, base + info.offset, self._content(tar, info)))
        elif not info.isdir():
            self._ignored += 1

    def _content(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | Refusal:
        if info.issym() or info.islnk():
            return Refusal("fetch", "unsupported", f"a link to {info.linkname[:200]}: links in tars are not followed")
        if not info.isreg() or info.issparse():
            return Refusal("fetch", "unsupported", "not a plain file")
        if info.size > self.max_bytes:
            return Refusal("fetch", "too_large", f"{info.size} bytes are more than fetch.max_bytes={self.max_bytes}")
        data: bytes = cast(Any, tar.extractfile(info)).read()
        if len(data) < info.size:
            raise tarfile.ReadError(f"unexpected end of data in {info.name}")
        return data

    def _flush(self, through: int) -> Iterator[Member]:
        """Yield the images of the key that has ended: now their sidecars are known."""
        for name, offset, content in self._images:
            if offset > through:
                yield Member(name, offset, self._group, content, self._sidecars)
        self._images = []


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return the next member; of headers that make no sense `tarfile` raises whatever it stumbles over."""
    try:
        return tar.next()
    except (ValueError, LookupError, ArithmeticError, RecursionError, struct.error) as error:
        raise tarfile.ReadError(f"a header that makes no sense: {error}") from error


def _torn(error: Exception | None) -> Refusal:
    text = str(error)
    short = isinstance(error, EOFError | _EmptyHeader | _TruncatedHeader) or "end of" in text
    message = f"the tar is torn ({text or 'it ends without an end mark'}): its members up to here were read"
    return Refusal("list", "truncated" if short else "corrupt", message)

"""Effects: tars read as a stream of images with their sidecars, in the order of the members, and never unpacked.

The name of a member up to its first dot is its key. `.cls`, `.json` and `.txt` members are sidecars of the images with the same
key. If another archive follows the end mark of the first one (`cat a.tar b.tar`), it is read too.
"""

from __future__ import annotations

import codecs
import posixpath
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import pyarrow as pa

from imgbatch.decode.other_kinds import archive, describe_known
from imgbatch.errors import InputError
from imgbatch.rejects import Refusal
from imgbatch.schema import CARRIED
from imgbatch.sources.patterns import Candidates, is_junk, is_no_image
from imgbatch.storage.forward import ForwardReader, gunzip, peek, read_chunks
from imgbatch.storage.stores import Meta, Stores

Result = TypeVar("Result")

SIDECARS = ("cls", "json", "txt")
CARRIED_FIELDS = pa.schema([(CARRIED + name, pa.string()) for name in SIDECARS])

# `tarfile` raises these for a block of zeros, for no data, and for less than a header. They are not part of its public API.
_EndMark, _EmptyHeader, _TruncatedHeader = (
    getattr(tarfile, name) for name in ("EOFHeaderError", "EmptyHeaderError", "TruncatedHeaderError")
)

_GZIP, _USTAR, _BLOCK = b"\x1f\x8b", b"ustar", 512

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MAX_SIDECAR_BYTES = 1 << 20

MAX_COLLECTED_BYTES = 256 << 20
"""Maximum memory for the keys and texts that `collect` keeps: about 600,000 short ones."""
_BYTES_OF_A_KEY, _BYTES_OF_A_TEXT = 350, 60  # the overhead of Python's objects


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a tar."""

    name: str
    offset: int
    """The position of its header."""
    resume_offset: int
    """The position of the header of the first member with its key: a reader that resumes must start there to have the
    sidecars, which may come before the image."""
    content: bytes | Refusal
    sidecars: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class End:
    """The end of a tar, or the place from which it cannot be read."""

    offset: int
    ignored: int
    """Number of members that are neither images, sidecars nor folders."""
    damage: Refusal | None = None
    """Why the tar cannot be read to its end."""
    unpaired: int = 0
    """Number of sidecars that are not next to an image with their key."""
    unpaired_example: str = ""
    """The name of one of them."""
    sidecars: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """With `collect`: the texts of the unpaired sidecars by key, in the columns of `Member.sidecars`."""


def key_of(name: str) -> str | None:
    """Return the key that an image and its sidecars share: the path and the name up to its first dot; None without a dot.

    >>> key_of("./a/x.left.jpg"), key_of("a/x.cls"), key_of("a/nosuffix")
    ('a/x', 'a/x', None)
    """
    match = _KEY.fullmatch(posixpath.normpath(name))
    return match[1] if match else None


class _Header(tarfile.TarInfo):
    """A header that records in the tar why no header could be read. `tarfile` itself treats most damage as the end."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ended_by = error
            raise


@dataclass
class TarReader:
    """One tar, which can be read once, from a position on."""

    stores: Stores
    uri: str
    meta: Meta
    suffixes: str
    max_bytes: int
    collect: bool = False
    """Keep the sidecars that are not next to an image with their key, and return them with the end."""
    wanted: Collection[str] | None = None
    """The names of the images to read, whatever `suffixes` says; None: all."""
    _key: str | None = None
    _key_offset: int = 0
    _images: list[tuple[str, int, bytes | Refusal]] = field(default_factory=list)
    _sidecars: dict[str, str] = field(default_factory=dict)
    _sidecar_names: list[str] = field(default_factory=list)
    _ignored: int = 0
    _unpaired: int = 0
    _unpaired_example: str = ""
    _collected: dict[str, dict[str, str]] = field(default_factory=dict)
    _collected_bytes: int = 0

    def __post_init__(self) -> None:
        self._candidates: Candidates | Collection[str] = (
            Candidates(self.suffixes) if self.wanted is None else self.wanted
        )

    def members(self, resume_offset: int = 0, last_offset: int = -1) -> Iterator[Member | End]:
        """Yield images, and then the end.

        Args:
            resume_offset: the position of a header, from which the tar is read.
            last_offset: images whose header is at this position or before it are skipped.

        Raises:
            StoreError: the store stayed unreachable, or the tar has changed since it was listed.
            InputError: with `collect`: the sidecars exceed MAX_COLLECTED_BYTES.
        """
        # The first bytes decide, not the name. A position within compressed data cannot be requested, so a compressed tar is
        # read from its beginning again.
        start = 0 if resume_offset and self._begins() == _GZIP else resume_offset
        tar: tarfile.TarFile | None = None
        with self.stores.stream(self.uri, self.meta, start) as stream:
            head, chunks = peek(read_chunks(stream.read), _BLOCK)
            compressed = not start and head.startswith(_GZIP)
            file = ForwardReader(chunks, start)
            damage: Refusal | None = None
            try:
                if compressed:
                    head, chunks = peek(gunzip(chunks), _BLOCK)
                    file = ForwardReader(chunks)
                is_first, more = True, True
                while more:  # an archive each
                    began, tar, count = file.tell(), _archive(file), 0
                    while _ended_by(tar) is None and (info := _next(tar)) is not None:
                        cast(Any, tar).members.clear()  # `tarfile` keeps all members; there may be millions
                        count += 1
                        yield from self._take(file, info, last_offset)
                    ended_by = _ended_by(tar)
                    if not isinstance(ended_by, _EndMark):
                        head = head if is_first and not start and not count else b""
                        follows = not is_first and not count
                        damage = self._not_a_tar(file, began, compressed) if follows else _damage(ended_by, head)
                        break
                    is_first, more = False, file.skip_zeros()
            except (tarfile.TarError, zlib.error, EOFError) as error:
                damage = _damage(error, b"" if start or tar is not None else head)
        yield from self._flush(last_offset)
        offset = start if tar is None else tar.offset
        yield End(offset, self._ignored, damage, self._unpaired, self._unpaired_example, self._collected)

    def _begins(self) -> bytes:
        """Return the first bytes. This takes a request, which is made only when a run resumes within a tar."""
        return self.stores.call(
            "read", self.uri, lambda store, path: store.read_range(path, 0, len(_GZIP), self.meta.etag)
        )

    def _take(self, file: ForwardReader, info: tarfile.TarInfo, last_offset: int) -> Iterator[Member]:
        """Add a member to the images and sidecars of its key; yield those of the key before, if the key has changed."""
        if info.isdir():
            return
        if is_junk(info.name):  # such as ._x.jpg, which macOS writes between x.jpg and x.cls
            self._ignored += 1
            return
        match = _KEY.fullmatch(posixpath.normpath(info.name))
        key = match[1] if match else None
        if key is None or key != self._key:
            yield from self._flush(last_offset)
            self._key, self._key_offset = key, info.offset
        is_file = info.isreg() and not info.issparse()
        if match and match[2].lower() in SIDECARS and is_file and info.size <= _MAX_SIDECAR_BYTES:
            self._sidecars[CARRIED + match[2].lower()] = _text(_content(file, info))
            self._sidecar_names.append(info.name)
        elif is_file and info.name.lower().endswith(".cls") and info.size <= _MAX_SIDECAR_BYTES:
            self._add_loose_label(info.name, _text(_content(file, info)))
        elif info.name in self._candidates:
            self._images.append((info.name, info.offset, self._image(file, info)))
        else:
            self._ignored += 1

    def _image(self, file: ForwardReader, info: tarfile.TarInfo) -> bytes | Refusal:
        if info.issym() or info.islnk():
            return Refusal("fetch", "unsupported", f"a link to {info.linkname[:200]}: links in tars are not followed")
        if not info.isreg() or info.issparse():
            return Refusal("fetch", "unsupported", "not a plain file")
        if info.size > self.max_bytes:
            return Refusal("fetch", "too_large", f"{info.size} bytes are more than fetch.max_bytes={self.max_bytes}")
        return _content(file, info)

    def _flush(self, last_offset: int) -> Iterator[Member]:
        """Yield the images of a key whose members have all been read, with their sidecars."""
        for name, offset, content in self._images:
            if offset > last_offset:
                yield Member(name, offset, self._key_offset, content, self._sidecars)
        if self._sidecar_names and not self._images:
            self._add_unpaired(self._key or "")
        self._images, self._sidecars, self._sidecar_names = [], {}, []

    def _add_unpaired(self, key: str) -> None:
        """Count the sidecars of a key without an image."""
        if is_no_image(key):  # README.txt
            self._ignored += len(self._sidecar_names)
            return
        self._unpaired += len(self._sidecar_names)
        self._unpaired_example = self._unpaired_example or self._sidecar_names[0]
        if self.collect:
            self._collect(key, self._sidecars)

    def _add_loose_label(self, name: str, text: str) -> None:
        """Count a `.cls` that is no sidecar, since its name has other dots: `x.001.cls`."""
        self._unpaired += 1
        self._unpaired_example = self._unpaired_example or name
        if self.collect:
            self._collect(posixpath.normpath(name)[: -len(".cls")], {CARRIED + "cls": text})

    def _collect(self, key: str, sidecars: Mapping[str, str]) -> None:
        texts = self._collected.setdefault(key, {})
        for column, text in sidecars.items():
            if texts.setdefault(column, text) != text and column != CARRIED + "txt":
                raise InputError(
                    f"{self.uri} has two members {key}.{column.removeprefix(CARRIED)} that differ: {texts[column][:80]!r} and "
                    f"{text[:80]!r}. Remove one of them"
                )
        self._collected_bytes += (
            _BYTES_OF_A_KEY + len(key) + sum(len(text) + _BYTES_OF_A_TEXT for text in sidecars.values())
        )
        if self._collected_bytes > MAX_COLLECTED_BYTES:
            raise InputError(
                f"{self.uri}: more than {len(self._collected) - 1:,} images are not next to their sidecars, such as "
                f"{self._unpaired_example}, which takes more than {MAX_COLLECTED_BYTES >> 20} MB of memory. Write the tar in "
                "the order of the names (tar --sort=name)"
            )

    def _not_a_tar(self, file: ForwardReader, began: int, compressed: bool) -> Refusal:
        """Return the damage of a tar after whose end mark something else follows."""
        size = self.meta.size
        if compressed or size is None:
            while file.read(1 << 20):
                pass
            size = file.tell()
        message = (
            f"the {size - began:,} bytes after the end mark of the tar are not a tar: its members before them were read"
        )
        return Refusal("list", "corrupt", message)


def _archive(file: ForwardReader) -> tarfile.TarFile:
    """Open the archive that begins at the current position."""
    # Names that are not UTF-8 stay distinct, and are valid text for tables.
    return _checked(lambda: tarfile.TarFile(fileobj=cast(Any, file), tarinfo=_Header, errors="backslashreplace"))


def _ended_by(tar: tarfile.TarFile) -> Exception | None:
    """Return why no further header could be read, None if one may follow. Opening an archive already reads a header."""
    return getattr(tar, "ended_by", None)


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return the next member."""
    return _checked(tar.next)


def _checked(read: Callable[[], Result]) -> Result:
    """Call a method of `tarfile`, which raises all kinds of exceptions for invalid headers.

    Raises:
        ReadError: in place of them.
    """
    try:
        return read()
    except (ValueError, LookupError, ArithmeticError, RecursionError, struct.error) as error:
        raise tarfile.ReadError(f"an invalid header: {error}") from error


def _content(file: ForwardReader, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) < info.size:
        raise tarfile.ReadError(f"unexpected end of data in {info.name}")
    return data


def _text(data: bytes) -> str:
    """Decode a sidecar: UTF-8, or UTF-16 with a byte order mark, as editors and PowerShell on Windows write it."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").strip()
    return data.decode("utf-8-sig", "replace").strip()


def _damage(error: Exception | None, head: bytes = b"") -> Refusal:
    """Return the damage of a tar that does not end with an end mark.

    Args:
        head: the first bytes of the object, if it has no member.
    """
    kind = describe_known(head)
    if head and kind and _USTAR not in head[:_BLOCK]:
        if archive(head):
            kind += "; of archives only tars are read, plain or compressed with gzip. Pack the images as a tar"
        return Refusal("list", "unsupported" if archive(head) else "corrupt", f"the object is no tar, but {kind}")
    text = str(error)
    is_truncated = isinstance(error, EOFError | _EmptyHeader | _TruncatedHeader) or "end of" in text
    message = f"the tar is damaged ({text or 'it ends without an end mark'}): its members up to here were read"
    return Refusal("list", "truncated" if is_truncated else "corrupt", message)

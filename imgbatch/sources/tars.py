"""Effects: images that are members of tars (WebDataset shards): read as a stream, in the order in which they stand,
never unpacked.

A member's URI is `TAR#NAME`. Its name up to the first dot is its key; `.cls`, `.json` and `.txt` members of the same key
travel along. Which members a tar has is known once it is read to its end: only the pass that labels them reads it. An archive
that follows the end mark of the one before it (`cat a.tar b.tar`) is read as well.
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

from imgbatch.decode.other_kinds import archive, named
from imgbatch.errors import InputError
from imgbatch.rejects import Refusal
from imgbatch.schema import CARRIED, LISTING, TAR, with_carried
from imgbatch.sources.base import ListingBatch
from imgbatch.sources.patterns import Candidates, is_junk, is_no_image
from imgbatch.storage.forward import Forward, looked_at, plain, unpacked
from imgbatch.storage.stores import Meta, Stores

Result = TypeVar("Result")

SUFFIXES = (".tar", ".tar.gz", ".tgz")
SIDECARS = ("cls", "json", "txt")
CARRIED_FIELDS = pa.schema([(CARRIED + name, pa.string()) for name in SIDECARS])

# What `tarfile` raises for a block of zeros, for nothing, and for less than a header; it does not name them in public.
_EndMark, _EmptyHeader, _TruncatedHeader = (
    getattr(tarfile, name) for name in ("EOFHeaderError", "EmptyHeaderError", "TruncatedHeaderError")
)

_GZIP, _USTAR, _BLOCK = b"\x1f\x8b", b"ustar", 512

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MOST_SIDECAR_BYTES = 1 << 20

MOST_COLLECTED_BYTES = 256 << 20
"""Of the keys and texts of a tar's sidecars, as Python keeps them, with `collect`: some 600,000 short ones."""
_BYTES_OF_A_KEY, _BYTES_OF_A_TEXT = 350, 60


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a tar."""

    name: str
    offset: int
    """Where its header begins."""
    resume_offset: int
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
    unpaired: int = 0
    """Sidecars that do not lie beside an image of their key."""
    unpaired_example: str = ""
    """The name of one of them."""
    sidecars: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """With `collect`: their texts by key, in the columns that `Member.sidecars` has."""


def key_of(name: str) -> str | None:
    """Return what an image and its sidecars have in common: the path, and the name up to its first dot; None: it has none.

    >>> key_of("./a/x.left.jpg"), key_of("a/x.cls"), key_of("a/nosuffix")
    ('a/x', 'a/x', None)
    """
    found = _KEY.fullmatch(posixpath.normpath(name))
    return found[1] if found else None


def read_sidecars(stores: Stores, uri: str, suffixes: str) -> Mapping[str, Mapping[str, str]]:
    """Return the sidecars of a tar that do not lie beside their image, by key; see `Tar.collect`.

    Raises:
        StoreError: the tar cannot be read.
        InputError: they are more than memory is given for.
    """
    _, end = _members_without_content(stores, uri, suffixes, None)
    return end.sidecars if end is not None else {}


def loose_label(uri: str, sidecars: Mapping[str, Mapping[str, str]], keys: Collection[str | None]) -> str | None:
    """Return what to say of a tar's `.cls` members that have no image of their key; None: there are none.

    Args:
        sidecars: those that do not lie beside their image, by key.
        keys: of all images.
    """
    loose = next((key for key, texts in sidecars.items() if CARRIED + "cls" in texts and key not in keys), None)
    return None if loose is None else f"{uri}#{loose}.cls may say a label, and there is no image of its key"


def read_members(stores: Stores, uri: str, suffixes: str, *, most: int) -> tuple[pa.Table, bool]:
    """Return the first images of a tar, and whether these are all.

    The table has `uri`, the texts of their sidecars in `cls` and `json`, and in `loose` what is wrong with others. Sidecars
    that do not lie beside their image are known if the images are all.
    """
    found, end = _members_without_content(stores, uri, suffixes, most)
    elsewhere = end.sidecars if end is not None else {}
    rows: list[dict[str, str | None]] = []
    for member in found:
        said = {**elsewhere.get(key_of(member.name) or "", {}), **member.sidecars}
        rows.append({"uri": f"{uri}#{member.name}", **{kind: said.get(CARRIED + kind) for kind in ("cls", "json")}})
    if rows:
        rows[0]["loose"] = loose_label(uri, elsewhere, {key_of(member.name) for member in found})
    schema = pa.schema([(name, pa.string()) for name in ("uri", "cls", "json", "loose")])
    return pa.Table.from_pylist(rows, schema=schema), end is not None


def _members_without_content(
    stores: Stores, uri: str, suffixes: str, most: int | None
) -> tuple[list[Member], End | None]:
    """Return up to `most` images of a tar, and its end if it was reached; None: none of the images, but the end."""
    meta = stores.call("look at", uri, lambda store, path: store.head(path))
    found: list[Member] = []
    for member in Tar(stores, uri, meta, suffixes, max_bytes=-1, collect=True).members():
        if isinstance(member, End):
            return found, member
        if most is not None:
            found.append(member)
            if len(found) == most:
                break
    return found, None


def listed(uri: str, meta: Meta) -> Iterator[ListingBatch]:
    """Yield a tar as one row, in place of its members."""
    row = {"uri": uri, "size": meta.size, "etag": meta.etag, "last_modified": meta.last_modified}
    yield in_place_of_members(pa.RecordBatch.from_pylist([row], schema=LISTING))


def in_place_of_members(objects: pa.RecordBatch) -> ListingBatch:
    """Return tars as rows in place of their members, with the columns that these are going to carry."""
    columns = {name: objects[name] for name in objects.schema.names}
    columns["container"] = pa.repeat(TAR, len(objects))
    columns |= {entry.name: pa.nulls(len(objects), entry.type) for entry in CARRIED_FIELDS}
    return ListingBatch(pa.record_batch(columns, schema=with_carried(LISTING, CARRIED_FIELDS)))


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
    collect: bool = False
    """Remember the sidecars that do not lie beside an image of their key, for whoever has read all of them."""
    wanted: Collection[str] | None = None
    """The names of the images that are read, whatever `suffixes` says; None: all."""
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
        """Yield the images behind the one whose header begins at `last_offset`, and the end; reading begins at `resume_offset`.

        Raises:
            StoreError: the store stayed away, or the tar is another than the one that was listed.
            InputError: with `collect`: more sidecars are to be remembered than memory is given for.
        """
        # The bytes decide, not the name. Within gzip data no position can be asked for.
        start = 0 if resume_offset and self._begins() == _GZIP else resume_offset
        tar: tarfile.TarFile | None = None
        with self.stores.stream(self.uri, self.meta, start) as stream:
            head, chunks = looked_at(plain(stream.read), _BLOCK)
            packed = not start and head.startswith(_GZIP)
            file = Forward(chunks, start)
            tear: Refusal | None = None
            try:
                if packed:
                    head, chunks = looked_at(unpacked(chunks), _BLOCK)
                    file = Forward(chunks)
                follows, more = False, True
                while more:
                    began, tar, found = file.tell(), _archive(file), 0
                    while _ended_by(tar) is None and (info := _next(tar)) is not None:
                        cast(Any, tar).members.clear()  # a tar of a million members would keep them all
                        found += 1
                        yield from self._take(file, info, last_offset)
                    ended_by = _ended_by(tar)
                    if not isinstance(ended_by, _EndMark):
                        head = b"" if start or follows or found else head
                        tear = self._no_tar(file, began, packed) if follows and not found else _torn(ended_by, head)
                        break
                    follows, more = True, file.skip_zeros()
            except (tarfile.TarError, zlib.error, EOFError) as error:
                tear = _torn(error, b"" if start or tar is not None else head)
        yield from self._flush(last_offset)
        offset = start if tar is None else tar.offset
        yield End(offset, self._ignored, tear, self._unpaired, self._unpaired_example, self._collected)

    def _begins(self) -> bytes:
        """Return the first bytes: one request more where a run resumes within a tar."""
        return self.stores.call(
            "read", self.uri, lambda store, path: store.read_range(path, 0, len(_GZIP), self.meta.etag)
        )

    def _take(self, file: Forward, info: tarfile.TarInfo, last_offset: int) -> Iterator[Member]:
        if info.isdir():
            return
        if is_junk(info.name):  # such as ._x.jpg, which macOS writes between x.jpg and x.cls
            self._ignored += 1
            return
        found = _KEY.fullmatch(posixpath.normpath(info.name))
        key = found[1] if found else None
        if key is None or key != self._key:
            yield from self._flush(last_offset)
            self._key, self._key_offset = key, info.offset
        plain_file = info.isreg() and not info.issparse()
        if found and found[2].lower() in SIDECARS and plain_file and info.size <= _MOST_SIDECAR_BYTES:
            self._sidecars[CARRIED + found[2].lower()] = _text(_content(file, info))
            self._sidecar_names.append(info.name)
        elif plain_file and info.name.lower().endswith(".cls") and info.size <= _MOST_SIDECAR_BYTES:
            self._leave_loose_label(info.name, _text(_content(file, info)))
        elif info.name in self._candidates:
            self._images.append((info.name, info.offset, self._image(file, info)))
        else:
            self._ignored += 1

    def _image(self, file: Forward, info: tarfile.TarInfo) -> bytes | Refusal:
        if info.issym() or info.islnk():
            return Refusal("fetch", "unsupported", f"a link to {info.linkname[:200]}: links in tars are not followed")
        if not info.isreg() or info.issparse():
            return Refusal("fetch", "unsupported", "not a plain file")
        if info.size > self.max_bytes:
            return Refusal("fetch", "too_large", f"{info.size} bytes are more than fetch.max_bytes={self.max_bytes}")
        return _content(file, info)

    def _flush(self, last_offset: int) -> Iterator[Member]:
        """Yield the images of the key that has ended: now the sidecars beside them are known."""
        for name, offset, content in self._images:
            if offset > last_offset:
                yield Member(name, offset, self._key_offset, content, self._sidecars)
        if self._sidecar_names and not self._images:
            self._leave_unpaired(self._key or "")
        self._images, self._sidecars, self._sidecar_names = [], {}, []

    def _leave_unpaired(self, key: str) -> None:
        """Count the sidecars of a key that has ended without an image."""
        if is_no_image(key):  # README.txt
            self._ignored += len(self._sidecar_names)
            return
        self._unpaired += len(self._sidecar_names)
        self._unpaired_example = self._unpaired_example or self._sidecar_names[0]
        if self.collect:
            self._remember(key, self._sidecars)

    def _leave_loose_label(self, name: str, text: str) -> None:
        """Count a `.cls` that no image can have as its own, since its name has other dots: `x.001.cls`."""
        self._unpaired += 1
        self._unpaired_example = self._unpaired_example or name
        if self.collect:
            self._remember(posixpath.normpath(name)[: -len(".cls")], {CARRIED + "cls": text})

    def _remember(self, key: str, sidecars: Mapping[str, str]) -> None:
        texts = self._collected.setdefault(key, {})
        for column, text in sidecars.items():
            if texts.setdefault(column, text) != text and column != CARRIED + "txt":
                raise InputError(
                    f"{self.uri} has two members {key}.{column.removeprefix(CARRIED)} that differ: {texts[column][:80]!r} and "
                    f"{text[:80]!r}; take one of them out"
                )
        self._collected_bytes += (
            _BYTES_OF_A_KEY + len(key) + sum(len(text) + _BYTES_OF_A_TEXT for text in sidecars.values())
        )
        if self._collected_bytes > MOST_COLLECTED_BYTES:
            raise InputError(
                f"{self.uri}: more than {len(self._collected) - 1:,} images do not lie beside their sidecars, such as "
                f"{self._unpaired_example}, which takes more than {MOST_COLLECTED_BYTES >> 20} MB of memory: write the tar in "
                "the order of its names (tar --sort=name), so that they do"
            )

    def _no_tar(self, file: Forward, began: int, packed: bool) -> Refusal:
        """Say that something follows the end mark that is no tar."""
        size = self.meta.size
        if packed or size is None:
            while file.read(1 << 20):
                pass
            size = file.tell()
        message = (
            f"the {size - began:,} bytes after the end mark of the tar are not a tar: its members before them were read"
        )
        return Refusal("list", "corrupt", message)


def _archive(file: Forward) -> tarfile.TarFile:
    """Return the archive that begins here."""
    # Names that are no UTF-8 stay distinct, and can stand in a table.
    return _sensible(lambda: tarfile.TarFile(fileobj=cast(Any, file), tarinfo=_Header, errors="backslashreplace"))


def _ended_by(tar: tarfile.TarFile) -> Exception | None:
    """Return what was found in place of another header; opening an archive reads its first one."""
    return getattr(tar, "ended_by", None)


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Return the next member."""
    return _sensible(tar.next)


def _sensible(read: Callable[[], Result]) -> Result:
    """Return what `tarfile` reads; of headers that make no sense it raises whatever it stumbles over."""
    try:
        return read()
    except (ValueError, LookupError, ArithmeticError, RecursionError, struct.error) as error:
        raise tarfile.ReadError(f"a header that makes no sense: {error}") from error


def _content(file: Forward, info: tarfile.TarInfo) -> bytes:
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) < info.size:
        raise tarfile.ReadError(f"unexpected end of data in {info.name}")
    return data


def _text(data: bytes) -> str:
    """Return the text of a sidecar, without the byte order mark that Windows' editors and PowerShell begin it with."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").strip()
    return data.decode("utf-8-sig", "replace").strip()


def _torn(error: Exception | None, head: bytes = b"") -> Refusal:
    """Return what to say of the end of a tar that is none.

    Args:
        head: how the object begins, if no member was found in it.
    """
    kind = named(head)
    if head and kind and _USTAR not in head[:_BLOCK]:
        if archive(head):
            kind += "; of archives only tars are read, plain or compressed with gzip: pack it so"
        return Refusal("list", "unsupported" if archive(head) else "corrupt", f"the object is no tar, but {kind}")
    text = str(error)
    short = isinstance(error, EOFError | _EmptyHeader | _TruncatedHeader) or "end of" in text
    message = f"the tar is torn ({text or 'it ends without an end mark'}): its members up to here were read"
    return Refusal("list", "truncated" if short else "corrupt", message)

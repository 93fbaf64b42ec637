"""Effects: images that are members of tars (WebDataset shards): read as a stream, in the order in which they stand,
never unpacked.

A member's URI is `TAR#NAME`. Its name up to the first dot is its key; `.cls`, `.json` and `.txt` members of the same key
travel along. Which members a tar has is known once it is read to its end: only the pass that labels them reads it. An archive
that follows the end mark of the one before it (`cat a.tar b.tar`) is read as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import pyarrow as pa

from imgbatch.schema import CARRIED, LISTING, TAR, with_carried
from imgbatch.sources.base import ListingBatch
from imgbatch.sources.tar_reader import CARRIED_FIELDS, End, Member, TarReader, key_of
from imgbatch.storage.stores import Meta, Stores

SUFFIXES = (".tar", ".tar.gz", ".tgz")


def read_sidecars(stores: Stores, uri: str, suffixes: str) -> Mapping[str, Mapping[str, str]]:
    """Return the sidecars of a tar that do not lie beside their image, by key; see `TarReader.collect`.

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
    for member in TarReader(stores, uri, meta, suffixes, max_bytes=-1, collect=True).members():
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

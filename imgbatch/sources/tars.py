"""Effects: tars of images (WebDataset shards) as a source: how they are listed, and what their sidecars say.

A member's URI is `TAR#NAME`. A listing has one row for each tar, in place of its members: only reading a tar to its end shows
which members it has, and only the pass that labels them does so.
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
    """Return the sidecars of a tar that are not next to their image, by key; see `TarReader.collect`.

    Raises:
        StoreError: the tar cannot be read.
        InputError: they exceed MAX_COLLECTED_BYTES.
    """
    _, end = _members_without_content(stores, uri, suffixes, None)
    return end.sidecars if end is not None else {}


def loose_label(uri: str, sidecars: Mapping[str, Mapping[str, str]], keys: Collection[str | None]) -> str | None:
    """Return a message about a `.cls` member that has no image with its key; None if there is none.

    Args:
        sidecars: those that are not next to their image, by key.
        keys: the keys of all images.
    """
    loose = next((key for key, texts in sidecars.items() if CARRIED + "cls" in texts and key not in keys), None)
    return None if loose is None else f"{uri}#{loose}.cls may hold a label, but no image has its key"


def read_members(stores: Stores, uri: str, suffixes: str, *, max_images: int) -> tuple[pa.Table, bool]:
    """Return the first images of a tar without their content, and whether these are all.

    The table has `uri`, the texts of the sidecars in `cls` and `json`, and in `loose` the message of `loose_label`. Sidecars
    that are not next to their image are included only if the tar was read to its end.
    """
    members, end = _members_without_content(stores, uri, suffixes, max_images)
    unpaired = end.sidecars if end is not None else {}
    rows: list[dict[str, str | None]] = []
    for member in members:
        texts = {**unpaired.get(key_of(member.name) or "", {}), **member.sidecars}
        rows.append({"uri": f"{uri}#{member.name}", **{kind: texts.get(CARRIED + kind) for kind in ("cls", "json")}})
    if rows:
        rows[0]["loose"] = loose_label(uri, unpaired, {key_of(member.name) for member in members})
    schema = pa.schema([(name, pa.string()) for name in ("uri", "cls", "json", "loose")])
    return pa.Table.from_pylist(rows, schema=schema), end is not None


def _members_without_content(
    stores: Stores, uri: str, suffixes: str, max_images: int | None
) -> tuple[list[Member], End | None]:
    """Return up to `max_images` images of a tar, and its end if it was reached. With None: no images, but the end."""
    meta = stores.call("look at", uri, lambda store, path: store.head(path))
    members: list[Member] = []
    for member in TarReader(stores, uri, meta, suffixes, max_bytes=-1, collect=True).members():
        if isinstance(member, End):
            return members, member
        if max_images is not None:
            members.append(member)
            if len(members) == max_images:
                break
    return members, None


def list_tar(uri: str, meta: Meta) -> Iterator[ListingBatch]:
    """Yield one tar as a row, in place of its members."""
    row = {"uri": uri, "size": meta.size, "etag": meta.etag, "last_modified": meta.last_modified}
    yield tar_rows(pa.RecordBatch.from_pylist([row], schema=LISTING))


def tar_rows(objects: pa.RecordBatch) -> ListingBatch:
    """Return tars as rows in place of their members, with the columns that the members will carry."""
    columns = {name: objects[name] for name in objects.schema.names}
    columns["container"] = pa.repeat(TAR, len(objects))
    columns |= {entry.name: pa.nulls(len(objects), entry.type) for entry in CARRIED_FIELDS}
    return ListingBatch(pa.record_batch(columns, schema=with_carried(LISTING, CARRIED_FIELDS)))

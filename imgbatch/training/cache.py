"""Effects: the cache of prepared images: an operator writes them to a store as shards, once, and training reads the shards.

A shard is two objects: `NUMBER.npy`, an array with a row for each of some 64 images, and then `NUMBER.parquet`, a table of
these images, with their classes and the reasons why some could not be read. The array only counts if the table exists. So,
whenever a process is killed, the next run only prepares the images that are missing. The names of both contain a digest
of the table, and the table one of the array: a damaged shard does not count either. A tar is read again from its beginning,
unless `NUMBER.read` exists, which is written after the last image.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.concurrency.prefetch import prefetch_calls
from imgbatch.config.worker import ReadOptions
from imgbatch.errors import ClusterError, InputError, NotFound, StoreError
from imgbatch.inference.blocks import PIXELS, pixels_of
from imgbatch.inference.messages import received
from imgbatch.inference.worker import Sidecars, Work, Worker, errors_as_events
from imgbatch.schema import CARRIED, CONTENT_HASH, RESULTS, single_chunk
from imgbatch.sources import sidecars
from imgbatch.sources.labelled import GROUP, SPLIT, TRUTH
from imgbatch.sources.tar_reader import key_of
from imgbatch.sources.tars import loose_label
from imgbatch.storage.stores import Folder
from imgbatch.uri_index import hash_strings

if TYPE_CHECKING:
    from imgbatch.training.network import Features

_SHARD = 64
_DIGEST = b"sha256"  # in the metadata of a shard's rows: of the object of its array
_AT_ONCE = 8

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint64]

VERSION = 3
"""Version of the content of shards; those of other versions are built again."""

PROBLEM = "problem"
"""The column with the problem of the sidecars of a member of a tar; null: none."""

_TRUTHS = [pa.field(name, pa.string()) for name in (TRUTH, SPLIT, GROUP, PROBLEM)]
ROWS = pa.schema(
    [
        *(RESULTS.field(name) for name in ("index", "offset", "uri", "width", "height", "stage", "reason", "message")),
        RESULTS.field(CONTENT_HASH),
        *_TRUTHS,
    ]
)
"""The table of a shard; `reason` is null for an image that could be read. `offset`: of a member of a tar."""

_SEED = np.uint64(0x9E3779B97F4A7C15)

SIDECARS = ".sidecars"
"""Suffix of the object with those sidecars of a tar, by key, that are not next to their image."""

_KEPT_PROBLEMS = (sidecars.REFUSED, sidecars.NO_SPLIT)
"""Problems that are reported even if the member has a label."""

READ = ".read"
"""Suffix of the empty object that is written once a tar was read to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation(Work):
    """The work of the operator: the preprocessing of the model determines the pixels that are stored."""

    shards: Folder
    features: Callable[[], Features] | None = None
    """Loads a function from pixels to features, which are then stored in place of the pixels."""


class Prepare(Worker):
    """The operator: image numbers in, shards in the store and rows without pixels out."""

    def __init__(self, work: Preparation, *, isolated: bool = False) -> None:
        super().__init__(work, isolated=isolated)
        self._shards, self._load = work.shards, work.features
        self._features: Features | None = None

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Fetch, decode and store a block of image numbers."""
        yield from errors_as_events(self._prepare(block), self._work)

    def _prepare(self, block: pa.Table) -> Iterator[pa.Table]:
        for decoded in self.decoded(block, _SHARD):
            images, _, ends = received(decoded)
            if len(images):
                self._store(images)
            for end in ends:
                if end.whole:
                    self._shards.put(f"{end.number:09d}{READ}", b"")
            yield decoded.drop_columns([PIXELS])

    def sidecar_sink(self, number: int) -> Callable[[Sidecars], None]:
        """Return a function that stores the sidecars of a tar that are not next to their image, before its end is recorded."""

        def keep(sidecars: Sidecars) -> None:
            if sidecars:
                content = json.dumps(sidecars).encode()
                self._shards.put(f"{number:09d}{SIDECARS}", _sha256(content).encode() + b"\n" + content)

        return keep

    def _store(self, images: pa.Table) -> None:
        array: Array = pixels_of(images, self._work.model.preprocess)
        if self._load is not None:
            self._features = self._features or self._load()
            array = self._features(array)
        write(self._shards, array, with_sidecars(images, self._work.config.source))


def with_sidecars(images: pa.Table, config: ReadOptions) -> pa.Table:
    """Return ROWS of images with carried columns; of members of tars with the content of their sidecars."""
    columns = {name: images[name] for name in images.column_names if name in ROWS.names}
    texts = [
        images[CARRIED + kind].to_pylist() if CARRIED + kind in images.column_names else [None] * len(images)
        for kind in ("cls", "json")
    ]
    parsed = sidecars.read(texts[0], texts[1], config)
    values_of = {TRUTH: parsed.labels, SPLIT: parsed.splits, GROUP: parsed.groups, PROBLEM: parsed.problems}
    for name, values in values_of.items():
        columns[name] = pc.if_else(pc.is_valid(single_chunk(images["offset"])), values, None)
    return pa.table({name: columns[name] for name in ROWS.names}).cast(ROWS)


def with_late_sidecars(images: pa.Table, tars: pa.Array, shards: Folder, config: ReadOptions) -> pa.Table:
    """Return ROWS with the content of those sidecars that are not next to their image.

    Args:
        tars: the URI of the tar that each image is a member of, null if it is of none.

    Raises:
        InputError: a sidecar has another label than one next to the image.
        ClusterError: the stored sidecars are damaged; the next run reads the tar again.
    """
    names = [name for name in shards.names() if name.endswith(SIDECARS)]
    if not names:
        return images
    columns = {field.name: images[field.name].to_pylist() for field in _TRUTHS}
    for name in names:
        digest, _, content = shards.read(name).partition(b"\n")
        if _sha256(content).encode() != digest:
            raise _damaged(shards, name)
        late = json.loads(content)
        members = np.flatnonzero(images["index"].to_numpy() == int(name.removesuffix(SIDECARS)))
        uris, tars_of_members = (
            images["uri"].take(pa.array(members)).to_pylist(),
            tars.take(pa.array(members)).to_pylist(),
        )
        texts = [
            late.get(key_of(uri[len(tar or "") + 1 :]) or "", {})
            for uri, tar in zip(uris, tars_of_members, strict=True)
        ]
        cls, records = ([text.get(CARRIED + kind) for text in texts] for kind in ("cls", "json"))
        parsed = sidecars.read(cls, records, config)
        values_of = {TRUTH: parsed.labels, SPLIT: parsed.splits, GROUP: parsed.groups, PROBLEM: parsed.problems}
        for column, values in values_of.items():
            for at, uri, value in zip(members.tolist(), uris, values.to_pylist(), strict=True):
                before = columns[column][at]
                if column == TRUTH and value is not None and before not in (None, value):
                    raise InputError(
                        f"the sidecars of {uri} have the labels {before!r} and {value!r}: an image has one label"
                    )
                columns[column][at] = before if value is None else value
        for at in members.tolist():
            if columns[TRUTH][at] is not None and not (columns[PROBLEM][at] or "").startswith(_KEPT_PROBLEMS):
                columns[PROBLEM][at] = None
        keys = {key_of(uri[len(tar or "") + 1 :]) for uri, tar in zip(uris, tars_of_members, strict=True)}
        if len(members) and (loose := loose_label(tars_of_members[0] or "", late, keys)):
            columns[PROBLEM][int(members[0])] = columns[PROBLEM][int(members[0])] or loose
    for name, strings in columns.items():
        images = images.set_column(images.schema.get_field_index(name), name, pa.array(strings, pa.string()))
    return images


def keys_of(rows: pa.Table) -> Keys:
    """Return the key of each image in the shards, which is the same in every run.

    Args:
        rows: the columns `uri` and `offset`, since a tar may have two members of the same name.
    """
    offsets = single_chunk(rows["offset"]).fill_null(0).to_numpy().astype(np.uint64)
    keys: Keys = hash_strings(single_chunk(rows["uri"]), _SEED) ^ (offsets * _SEED)
    return keys


def write(shards: Folder, array: Array, rows: pa.Table) -> None:
    """Write a shard: row i of the array is the image of row i of the table."""
    # The first number is not enough for a name: images that are retried may start with the same one as the shard in which they
    # were rejected.
    digest = int(np.bitwise_xor.reduce(keys_of(rows)))
    content, table = io.BytesIO(), io.BytesIO()
    np.save(content, array)
    pq.write_table(rows.replace_schema_metadata({_DIGEST: _sha256(content.getvalue())}), table)
    name = f"{rows['index'][0].as_py():09d}-{digest:016x}-{_sha256(table.getvalue())[:16]}"
    shards.put(f"{name}.npy", content.getvalue())
    shards.put(f"{name}.parquet", table.getvalue())


def _damaged(folder: Folder, name: str) -> ClusterError:
    _discount(folder, name)
    return ClusterError(
        f"{folder.at(name)}, of images prepared for training, is damaged and no longer counts: run the same command again, "
        "which builds it again"
    )


def _discount(folder: Folder, name: str) -> None:
    """Delete an object, and the mark that its tar was read to the end, if it is of a tar."""
    for object_name in (f"{name[:9]}{READ}", name):
        with suppress(StoreError):
            folder.delete(object_name)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class Shard:
    """A complete shard."""

    name: str
    rows: pa.Table
    digest: str
    """SHA-256 of the object of its array, in hex."""


def shards(folder: Folder) -> Iterator[Shard]:
    """Yield the shards of a folder, without their arrays; those with damaged tables are deleted."""
    names = [name.removesuffix(".parquet") for name in folder.names() if name.endswith(".parquet")]

    def read(name: str) -> Shard | None:
        content = folder.read(f"{name}.parquet")
        if _sha256(content)[:16] != name.rpartition("-")[2]:
            log.warning("%s is damaged: its images are prepared again", folder.at(f"{name}.parquet"))
            _discount(folder, f"{name}.parquet")
            return None
        rows = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        return Shard(name, rows.replace_schema_metadata(), rows.schema.metadata[_DIGEST].decode())

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _, shard in prefetch_calls(pool, read, names, max_pending=4 * _AT_ONCE):
            if shard is not None:
                yield shard


def load(folder: Folder, keys: Keys, allocate: Callable[[tuple[int, ...], Any], Array]) -> Array:
    """Return the stored arrays of some images, in the order of their keys.

    Args:
        keys: see `keys_of`.
        allocate: creates the result from its shape and dtype: in memory, or mapped onto a file.

    Raises:
        ClusterError: one of the images is in no shard, could not be read, or its array is damaged: such a shard is deleted,
            so that the next run builds it again.
    """
    selected = []
    order = np.argsort(keys)
    is_present = np.zeros(len(keys), bool)
    for shard in shards(folder):
        shard_keys = keys_of(shard.rows)
        positions = np.searchsorted(keys, shard_keys, sorter=order)
        positions = order[np.minimum(positions, len(keys) - 1)]
        is_selected = (keys[positions] == shard_keys) & np.asarray(shard.rows["reason"].is_null())
        if is_selected.any():
            selected.append((shard, positions[is_selected], is_selected))
            is_present[positions[is_selected]] = True
    result: Array | None = None

    def read(item: tuple[Shard, Array, Mask]) -> Array:
        name = item[0].name
        try:
            content = folder.read(f"{name}.npy")
        except NotFound:
            content = b""
        if _sha256(content) != item[0].digest:
            _discount(folder, f"{name}.parquet")
            raise _damaged(folder, f"{name}.npy")
        array: Array = np.load(io.BytesIO(content), allow_pickle=False)[item[2]]
        return array

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for (_, positions, _), rows in prefetch_calls(pool, read, selected, max_pending=2 * _AT_ONCE):
            if result is None:
                result = allocate((len(keys), *rows.shape[1:]), rows.dtype)
            result[positions] = rows
    if result is None or not is_present.all():
        raise ClusterError(
            f"{np.count_nonzero(~is_present)} of {len(keys)} images are in no shard of {folder.uri}: shards were deleted "
            "or are damaged; run the same command again, which builds them again"
        )
    return result


def on_disk(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return an array mapped onto a temporary file, so that it need not fit into memory."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)

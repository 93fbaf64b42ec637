"""Effects: images made ready for training, once: an operator writes shards of them into a store, from which training reads.

A shard is two objects: `NUMBER.npy`, an array with a row for each of some 64 images, and behind it `NUMBER.parquet`, which
says which images these are, what their class is and which could not be read. Without the second the first does not count; so
whoever is killed, and whenever, the next run makes only what is missing. The name of both has a digest of the second, which
has one of the first: a shard that is damaged does not count either. A tar is read again from its beginning, unless its
`NUMBER.read` says that it was read to its end.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from imgbatch.config.sections import SourceConfig
from imgbatch.errors import ClusterError, InputError, NotFound, StoreError
from imgbatch.inference.worker import PIXELS, Work, Worker, guarded, pixels_of
from imgbatch.schema import CARRIED, CONTENT_HASH, RESULTS, whole
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
"""Of what shards say; others are made again."""

PROBLEM = "problem"
"""The column that says what is wrong with the sidecars of a member of a tar; null: nothing."""

_TRUTHS = [pa.field(name, pa.string()) for name in (TRUTH, SPLIT, GROUP, PROBLEM)]
ROWS = pa.schema(
    [
        *(RESULTS.field(name) for name in ("index", "offset", "uri", "width", "height", "stage", "reason", "message")),
        RESULTS.field(CONTENT_HASH),
        *_TRUTHS,
    ]
)
"""What a shard says of its images; `reason` is null where an image could be read. `offset`: of a member of a tar."""

_SEED = np.uint64(0x9E3779B97F4A7C15)

SIDECARS = ".sidecars"
"""What the name of the object ends in that holds the sidecars of a tar that do not lie beside their image, by key."""

_KEPT_PROBLEMS = (sidecars.REFUSED, sidecars.NO_SPLIT)
"""Of members that have a label all the same."""

READ = ".read"
"""What the name of the object ends in that says that a tar was read to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation(Work):
    """What the operator has to know: the model's preprocessing gives the pixels that are kept."""

    shards: Folder
    features: Callable[[], Features] | None = None
    """Loads what turns pixels into features, which are then kept in their place."""


class Prepare(Worker):
    """The operator: image numbers in, shards in the store and rows without pixels out."""

    def __init__(self, work: Preparation, *, isolated: bool = False) -> None:
        super().__init__(work, isolated=isolated)
        self._shards, self._load = work.shards, work.features
        self._features: Features | None = None

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Fetch, decode and keep a block of image numbers."""
        yield from guarded(self._kept(block), self._work)

    def _kept(self, block: pa.Table) -> Iterator[pa.Table]:
        for found in self.decoded(block, _SHARD):
            numbers = found["index"].to_numpy()
            images = found.filter(pa.array(numbers >= 0))
            if len(images):
                self._keep(images)
            for told in found.filter(pa.array(numbers < 0))["message"].to_pylist():  # that a tar was read
                tar = json.loads(told)
                if tar["whole"]:
                    self._shards.put(f"{tar['number']:09d}{READ}", b"")
            yield found.drop_columns([PIXELS])

    def keeps_sidecars(self, number: int) -> Callable[[Mapping[str, Mapping[str, str]]], None]:
        """Keep the sidecars of a tar that do not lie beside their image, before the tar counts as read."""

        def keep(sidecars: Mapping[str, Mapping[str, str]]) -> None:
            if sidecars:
                content = json.dumps(sidecars).encode()
                self._shards.put(f"{number:09d}{SIDECARS}", _sha256(content).encode() + b"\n" + content)

        return keep

    def _keep(self, images: pa.Table) -> None:
        kept: Array = pixels_of(images, self._work.model.preprocess)
        if self._load is not None:
            self._features = self._features or self._load()
            kept = self._features(kept)
        write(self._shards, kept, told_of(images, self._work.config.source))


def told_of(images: pa.Table, config: SourceConfig) -> pa.Table:
    """Return ROWS of images with carried columns; of members of tars with what their sidecars say."""
    columns = {name: images[name] for name in images.column_names if name in ROWS.names}
    texts = [
        images[CARRIED + kind].to_pylist() if CARRIED + kind in images.column_names else [None] * len(images)
        for kind in ("cls", "json")
    ]
    said = sidecars.read(texts[0], texts[1], config)
    for name, values in ((TRUTH, said.labels), (SPLIT, said.splits), (GROUP, said.groups), (PROBLEM, said.problems)):
        columns[name] = pc.if_else(pc.is_valid(whole(images["offset"])), values, None)
    return pa.table({name: columns[name] for name in ROWS.names}).cast(ROWS)


def with_late_sidecars(images: pa.Table, tars: pa.Array, shards: Folder, config: SourceConfig) -> pa.Table:
    """Return ROWS with what sidecars say that do not lie beside their image.

    Args:
        tars: the URI of the tar that each image is a member of, null where it is of none.

    Raises:
        InputError: they say another label than those beside the image.
        ClusterError: they are damaged; the next run reads the tar again.
    """
    kept = [name for name in shards.names() if name.endswith(SIDECARS)]
    if not kept:
        return images
    columns = {field.name: images[field.name].to_pylist() for field in _TRUTHS}
    for name in kept:
        digest, _, content = shards.read(name).partition(b"\n")
        if _sha256(content).encode() != digest:
            raise _damaged(shards, name)
        late = json.loads(content)
        mine = np.flatnonzero(images["index"].to_numpy() == int(name.removesuffix(SIDECARS)))
        uris, here = images["uri"].take(pa.array(mine)).to_pylist(), tars.take(pa.array(mine)).to_pylist()
        texts = [late.get(key_of(uri[len(tar or "") + 1 :]) or "", {}) for uri, tar in zip(uris, here, strict=True)]
        cls, records = ([text.get(CARRIED + kind) for text in texts] for kind in ("cls", "json"))
        said = sidecars.read(cls, records, config)
        values = ((TRUTH, said.labels), (SPLIT, said.splits), (GROUP, said.groups), (PROBLEM, said.problems))
        for column, found in values:
            for at, uri, value in zip(mine.tolist(), uris, found.to_pylist(), strict=True):
                before = columns[column][at]
                if column == TRUTH and value is not None and before not in (None, value):
                    raise InputError(f"the sidecars of {uri} say {before!r} and {value!r}: an image has one label")
                columns[column][at] = before if value is None else value
        for at in mine.tolist():
            if columns[TRUTH][at] is not None and not (columns[PROBLEM][at] or "").startswith(_KEPT_PROBLEMS):
                columns[PROBLEM][at] = None
        keys = {key_of(uri[len(tar or "") + 1 :]) for uri, tar in zip(uris, here, strict=True)}
        if len(mine) and (loose := loose_label(here[0] or "", late, keys)):
            columns[PROBLEM][int(mine[0])] = columns[PROBLEM][int(mine[0])] or loose
    for name, values in columns.items():
        images = images.set_column(images.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return images


def keys_of(rows: pa.Table) -> Keys:
    """Return a number for each image by which its array is found again, in any run.

    Args:
        rows: the columns `uri` and `offset`, since a tar may have two members of one name.
    """
    offsets = whole(rows["offset"]).fill_null(0).to_numpy().astype(np.uint64)
    keys: Keys = hash_strings(whole(rows["uri"]), _SEED) ^ (offsets * _SEED)
    return keys


def write(shards: Folder, array: Array, rows: pa.Table) -> None:
    """Write a shard: row i of the array is the image of row i of the table."""
    # Images that are tried again may begin as the shard did that they were rejected in, and be others.
    which = int(np.bitwise_xor.reduce(keys_of(rows)))
    content, table = io.BytesIO(), io.BytesIO()
    np.save(content, array)
    pq.write_table(rows.replace_schema_metadata({_DIGEST: _sha256(content.getvalue())}), table)
    name = f"{rows['index'][0].as_py():09d}-{which:016x}-{_sha256(table.getvalue())[:16]}"
    shards.put(f"{name}.npy", content.getvalue())
    shards.put(f"{name}.parquet", table.getvalue())


def _damaged(folder: Folder, name: str) -> ClusterError:
    _discount(folder, name)
    return ClusterError(
        f"{folder.at(name)}, of images that were made ready for training, is damaged, and no longer counts: run the same "
        "command again, which makes it again"
    )


def _discount(folder: Folder, name: str) -> None:
    """Remove an object, and what says that its tar was read to the end, if it is of one."""
    for each in (f"{name[:9]}{READ}", name):
        with suppress(StoreError):
            folder.delete(each)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard that is whole."""

    name: str
    rows: pa.Table
    digest: str
    """SHA-256 of the object of its array, in hex."""


def shards(folder: Folder) -> Iterator[Shard]:
    """Yield the shards of a folder, without their arrays; those whose rows are damaged do not count."""
    names = [name.removesuffix(".parquet") for name in folder.names() if name.endswith(".parquet")]

    def read(name: str) -> Shard | None:
        content = folder.read(f"{name}.parquet")
        if _sha256(content)[:16] != name.rpartition("-")[2]:
            log.warning("%s is damaged: its images are made ready again", folder.at(f"{name}.parquet"))
            _discount(folder, f"{name}.parquet")
            return None
        rows = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        return Shard(name, rows.replace_schema_metadata(), rows.schema.metadata[_DIGEST].decode())

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _, shard in prefetch_calls(pool, read, names, max_pending=4 * _AT_ONCE):
            if shard is not None:
                yield shard


def load(folder: Folder, keys: Keys, room: Callable[[tuple[int, ...], Any], Array]) -> Array:
    """Return the kept arrays of some images, in the order of their keys.

    Args:
        keys: see `keys_of`.
        room: makes the array that is filled, from its shape and dtype: in memory, or mapped onto a file.

    Raises:
        ClusterError: one of the images is in no shard, could not be read, or its array is damaged: such a shard is removed,
            so that the next run makes it again.
    """
    wanted = []
    order = np.argsort(keys)
    there = np.zeros(len(keys), bool)
    for shard in shards(folder):
        held = keys_of(shard.rows)
        places = np.searchsorted(keys, held, sorter=order)
        places = order[np.minimum(places, len(keys) - 1)]
        found = (keys[places] == held) & np.asarray(shard.rows["reason"].is_null())
        if found.any():
            wanted.append((shard, places[found], found))
            there[places[found]] = True
    filled: Array | None = None

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
        for (_, places, _), rows in prefetch_calls(pool, read, wanted, max_pending=2 * _AT_ONCE):
            if filled is None:
                filled = room((len(keys), *rows.shape[1:]), rows.dtype)
            filled[places] = rows
    if filled is None or not there.all():
        raise ClusterError(
            f"{np.count_nonzero(~there)} of {len(keys)} images are in no shard of {folder.uri}: somebody has removed them, or "
            "they are damaged; run the same command again, which makes them again"
        )
    return filled


def on_disk(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return an array mapped onto a file that goes with the process: memory holds of it what there is room for."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)

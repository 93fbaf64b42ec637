"""Values: what tells a changed image: its size, its ETag, or its time where there is no ETag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.schema import single_chunk
from imgbatch.uri_index import Keys, hash_strings, uri_keys

VERSION_COLUMNS = ["uri", "size", "etag", "last_modified"]
UNKNOWN_SIZE = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Versions:
    """Keys, sizes and tags of images: what is compared to tell a changed image."""

    keys: Keys
    sizes: npt.NDArray[np.uint32]
    """What is left of sizes divided by 2^32 - 1, which no change of an image leaves as it is; UNKNOWN_SIZE: not known."""
    tags: npt.NDArray[np.uint64]
    """What tells versions of an image apart, 0: not known. Odd: a hash of the ETag. Even: the time, where there is no
    ETag. The one says nothing about the other: a manifest may give ETags of files, which have none."""

    @classmethod
    def of(cls, table: pa.Table | pa.RecordBatch, keys: Keys | None = None) -> Versions:
        """Read the versions off a table with the columns of a listing; `keys` are those of its URIs, if they are known."""
        uri, size, etag, moment = (single_chunk(table[name]) for name in VERSION_COLUMNS)
        tags = hash_strings(etag) | np.uint64(1)
        if etag.null_count:
            times = moment.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False).view(np.uint64)
            times = np.where(np.asarray(moment.is_null()), np.uint64(0), times << np.uint64(2) | np.uint64(2))
            tags = np.where(np.asarray(etag.is_null()), times, tags)
        sizes = size.fill_null(-1).to_numpy(zero_copy_only=False)
        sizes = np.where(sizes < 0, UNKNOWN_SIZE, sizes % UNKNOWN_SIZE).astype(np.uint32)
        return cls(uri_keys(uri) if keys is None else keys, sizes, tags)


def changed_since(
    size: npt.NDArray[Any], listed_size: npt.NDArray[Any], tag: npt.NDArray[Any], listed_tag: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Return which images are not what they were when their rows were made, as far as both versions are known."""
    alike_in_kind: npt.NDArray[np.bool_] = (tag ^ listed_tag) & 1 == 0
    return _differ(size, listed_size, UNKNOWN_SIZE) | (_differ(tag, listed_tag, 0) & alike_in_kind)


def _differ(left: npt.NDArray[Any], right: npt.NDArray[Any], unknown: int) -> npt.NDArray[np.bool_]:
    different: npt.NDArray[np.bool_] = (left != right) & (left != unknown) & (right != unknown)
    return different

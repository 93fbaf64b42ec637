"""Values: versions of images: the size, and the ETag or, without one, the time. An image has changed if they differ."""

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
    """Keys, sizes and tags of images, for the detection of changed images."""

    keys: Keys
    sizes: npt.NDArray[np.uint32]
    """Sizes modulo 2^32 - 1, in 32 bits: in practice each change of an image changes it. UNKNOWN_SIZE: unknown."""
    tags: npt.NDArray[np.uint64]
    """Odd: a hash of the ETag. Even: the time, if there is no ETag. 0: unknown. An odd and an even tag are not compared: a
    manifest may give an ETag for a file, while the store of that file has only times."""

    @classmethod
    def of(cls, table: pa.Table | pa.RecordBatch, keys: Keys | None = None) -> Versions:
        """Read the versions from a table with the columns of a listing; `keys` are those of its URIs, computed if None."""
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
    """Return which images have changed since their rows were written, as far as both versions are known."""
    same_kind: npt.NDArray[np.bool_] = (tag ^ listed_tag) & 1 == 0
    return _differ(size, listed_size, UNKNOWN_SIZE) | (_differ(tag, listed_tag, 0) & same_kind)


def _differ(left: npt.NDArray[Any], right: npt.NDArray[Any], unknown: int) -> npt.NDArray[np.bool_]:
    different: npt.NDArray[np.bool_] = (left != right) & (left != unknown) & (right != unknown)
    return different

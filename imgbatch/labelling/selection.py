"""Values: which rows are exported: those with the smallest margins, or a random sample. Rows arrive part by part.

The memory holds as many rows as are selected, with a factor, and none of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgbatch.labelling.columns import MARGIN
from imgbatch.schema import EMBEDDING, single_chunk
from imgbatch.uri_index import hash_strings

Floats = npt.NDArray[np.float64]

_POOL, _MAX_POOL = 10, 20_000
"""Rows from which diverse ones are chosen: this many times as many as are selected, up to a maximum."""


def margins(rows: pa.Table) -> Floats:
    """Return the keys of rows that put the most uncertain ones first: their margins; rows without one come last."""
    values: Floats = np.asarray(single_chunk(rows[MARGIN]).fill_null(np.inf), np.float64)
    return np.where(np.isnan(values), np.inf, values)


def random_keys(rows: pa.Table, seed: int) -> Floats:
    """Return keys that draw each row with the same probability. They depend on the URI and the seed alone, so that the same
    seed draws the same images again, in whatever order they lie in the tables."""
    odd = np.uint64(2 * seed + 1)
    return hash_strings(single_chunk(rows["uri"]), odd).astype(np.float64)


@dataclass
class Smallest:
    """The rows with the smallest keys; of equal keys, those that came first."""

    size: int
    seen: int = 0
    """The number of rows that were added."""
    _keys: Floats = field(default_factory=lambda: np.zeros(0))
    _rows: pa.Table | None = None
    _threshold: float = np.inf

    def candidates(self, keys: Floats) -> npt.NDArray[np.int64]:
        """Return the rows of a part that may be among the smallest, and count all of them."""
        self.seen += len(keys)
        chosen = np.flatnonzero(keys < self._threshold) if np.isfinite(self._threshold) else np.arange(len(keys))
        if len(chosen) > self.size:
            chosen = np.sort(chosen[np.argsort(keys[chosen], kind="stable")[: self.size]])
        return chosen

    def add(self, keys: Floats, rows: pa.Table) -> None:
        """Add rows that `candidates` returned."""
        if not len(rows):
            return
        self._rows = rows if self._rows is None else pa.concat_tables([self._rows, rows], promote_options="permissive")
        self._keys = np.concatenate([self._keys, keys])
        if len(self._keys) > 2 * self.size:
            self._compact()

    def rows(self) -> pa.Table | None:
        """Return the rows, smallest keys first; None without any."""
        if self._rows is None:
            return None
        order = np.argsort(self._keys, kind="stable")[: self.size]
        return self._rows.take(pa.array(order))

    def _compact(self) -> None:
        assert self._rows is not None
        smallest = np.sort(np.argsort(self._keys, kind="stable")[: self.size])
        self._keys, self._rows = self._keys[smallest], self._rows.take(pa.array(smallest)).combine_chunks()
        self._threshold = float(self._keys.max())


def pool_size(count: int) -> int:
    """Return from how many uncertain rows `count` diverse ones are chosen.

    >>> pool_size(100), pool_size(10_000), pool_size(50_000)
    (1000, 20000, 50000)
    """
    return max(count, min(_POOL * count, _MAX_POOL))


def diverse(rows: pa.Table, count: int) -> pa.Table:
    """Return `count` of the rows whose embeddings are far apart, in the order in which they were.

    Greedy k-centre: the first row is chosen, then again and again the one that is farthest from all chosen ones (Gonzalez,
    Clustering to minimize the maximum intercluster distance, 1985). The distance is that of the cosine.

    >>> numbers = pa.FixedSizeListArray.from_arrays(pa.array(np.float16([1, 0, 1, 0.01, 0, 1])), 2)
    >>> diverse(pa.table({"uri": ["a", "near a", "b"], "embedding": numbers}), 2)["uri"].to_pylist()
    ['a', 'b']
    """
    if len(rows) <= count:
        return rows
    vectors = _unit_vectors(rows)
    chosen = np.zeros(len(rows), bool)
    similarity = np.full(len(rows), -np.inf, np.float32)
    at = 0
    for _ in range(count):
        chosen[at] = True
        np.maximum(similarity, vectors @ vectors[at], out=similarity)
        at = int(np.argmin(np.where(chosen, np.inf, similarity)))
    return rows.filter(pa.array(chosen))


def _unit_vectors(rows: pa.Table) -> npt.NDArray[np.float32]:
    column = single_chunk(rows[EMBEDDING])
    flat = column.values.slice(column.offset * column.type.list_size, len(column) * column.type.list_size)
    vectors: npt.NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    return vectors

"""Values: sets of URIs in tens of bytes each: 128-bit keys in sorted numpy arrays, without a Python object per image."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Keys = npt.NDArray[np.uint64]
"""Shape (n, 2): two independent 64-bit hashes of each URI."""

# Random in every process, so that an attacker cannot prepare URIs that collide. Keys are never stored.
_SEEDS = (np.uint64(secrets.randbits(64) | 1), np.uint64(secrets.randbits(64) | 1))
_MAX_ROWS_OF_A_RUN = 1 << 18


def hash_strings(values: pa.Array, seed: np.uint64 = _SEEDS[0]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each string; 0 for null.

    Eight bytes at a time through the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, 2014), all strings in step.
    """
    values = values.cast(pa.large_string()) if not pa.types.is_large_string(values.type) else values
    count = len(values)
    offsets = np.frombuffer(values.buffers()[1], np.int64, count + 1, values.offset * 8)
    data = values.buffers()[2]
    # Words are read beyond the end of the last string: eight zeros follow it.
    raw = np.zeros(offsets[-1] - offsets[0] + 8, np.uint8)
    if data is not None and len(data):
        raw[:-8] = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]
    words = np.lib.stride_tricks.as_strided(raw[:8].view(np.uint64), (len(raw) - 7,), (1,))
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    hashes = _mix(lengths.astype(np.uint64) ^ seed)
    unfinished = np.flatnonzero(lengths > 0)
    position = 0
    while len(unfinished):
        remaining = lengths[unfinished] - position
        word = words[starts[unfinished] + position]
        short = remaining < 8
        word[short] &= (np.uint64(1) << (remaining[short] * 8).astype(np.uint64)) - np.uint64(1)
        hashes[unfinished] = _mix((hashes[unfinished] ^ word) * seed)
        position += 8
        unfinished = unfinished[remaining > 8]
    if values.null_count:
        hashes[np.asarray(values.is_null())] = 0
    return hashes


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uri_keys(uris: pa.Array) -> Keys:
    """Return the keys of URIs. Equal URIs have equal keys in one process; other processes have other keys.

    Two different URIs among a billion share a key with a probability of about 1e-21.
    """
    return np.stack([hash_strings(uris, seed) for seed in _SEEDS], axis=1)


def first_of_each(keys: Keys) -> npt.NDArray[np.bool_]:
    """Return a mask of the keys that did not occur before in the same array.

    >>> first_of_each(np.array([[1, 2], [3, 4], [1, 2]], np.uint64)).tolist()
    [True, True, False]
    """
    first = np.ones(len(keys), bool)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    repeated = np.all(keys[order][1:] == keys[order][:-1], axis=1)
    first[order[1:][repeated]] = False
    return first


class _Run:
    """Keys sorted by their first half, with their columns."""

    def __init__(self, keys: Keys, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        order = np.argsort(keys[:, 0], kind="stable")
        self.high, self.low = keys[order, 0], keys[order, 1]
        self.columns = {name: column[order] for name, column in columns.items()}

    def merge(self, other: _Run) -> None:
        """Add the keys of another run. Array by array, so that only one of them needs memory twice at a time."""
        self.high = np.concatenate([self.high, other.high])
        order = np.argsort(self.high, kind="stable")
        self.high = self.high[order]
        self.low = np.concatenate([self.low, other.low])[order]
        self.columns = {
            name: np.concatenate([column, other.columns[name]])[order] for name, column in self.columns.items()
        }

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Return the position of each key, -1 if it is not in the run."""
        candidates = np.searchsorted(self.high, keys[:, 0])
        positions = np.full(len(keys), -1, np.int64)
        unfinished = np.arange(len(keys))
        while len(unfinished):  # more than once only where two keys share a first half
            at = candidates[unfinished]
            alike = at < len(self.high)
            alike[alike] = self.high[at[alike]] == keys[unfinished[alike], 0]
            unfinished, at = unfinished[alike], at[alike]
            is_equal = self.low[at] == keys[unfinished, 1]
            positions[unfinished[is_equal]] = at[is_equal]
            unfinished = unfinished[~is_equal]
            candidates[unfinished] += 1
        return positions


@dataclass(frozen=True, slots=True)
class Match:
    """Those keys of a lookup that are in one run of an index, and access to their values."""

    rows: npt.NDArray[np.int64]
    """Their positions among the keys that were looked up."""
    _columns: Mapping[str, npt.NDArray[Any]]
    _positions: npt.NDArray[np.int64]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Return a copy of the values of a column, in the order of `rows`."""
        return self._columns[name][self._positions]

    def write(self, name: str, values: npt.ArrayLike, where: npt.NDArray[np.bool_] | None = None) -> None:
        """Write the values of a column into the index, in the order of `rows`; with a mask, those of the masked rows alone."""
        self._columns[name][self._positions if where is None else self._positions[where]] = values


def _read_only(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = column.view()
    view.flags.writeable = False
    return view


class UriIndex:
    """A growing set of URI keys with columns, in 16 bytes per key and the width of the columns.

    It consists of sorted runs. Runs of similar size are merged up to a quarter of a million rows, so that merging needs
    little additional memory.
    """

    def __init__(self, **columns: npt.DTypeLike) -> None:
        self._columns = columns
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return sum(len(run.high) for run in self._runs)

    def add(self, keys: Keys, **columns: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Add the keys that are not in the set; return a mask of them (of equal keys the first)."""
        is_new = first_of_each(keys)
        is_new &= ~self.contains(keys)
        if is_new.any():
            values = {name: np.asarray(columns[name], kind)[is_new] for name, kind in self._columns.items()}
            self._runs.append(_Run(keys[is_new], values))
            self._merge()
        return is_new

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return a mask of the keys that are in the set."""
        mask = np.zeros(len(keys), bool)
        for match in self.lookup(keys):
            mask[match.rows] = True
        return mask

    def lookup(self, keys: Keys) -> Iterator[Match]:
        """Yield the keys that are in the set, in one or more matches: none is in two of them."""
        order = np.argsort(keys[:, 0])  # searching in order stays in the processor's cache
        ordered = keys[order]
        for run in self._runs:
            positions = run.find(ordered)
            contained = np.flatnonzero(positions >= 0)
            if len(contained):
                yield Match(order[contained], run.columns, positions[contained])

    def columns(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """Yield one column, run by run, read-only."""
        for run in self._runs:
            yield _read_only(run.columns[name])

    def rows(self) -> Iterator[tuple[dict[str, npt.NDArray[Any]], Keys]]:
        """Yield (columns, keys), run by run, read-only."""
        for run in self._runs:
            columns = {name: _read_only(column) for name, column in run.columns.items()}
            yield columns, np.stack([run.high, run.low], axis=1)

    def _merge(self) -> None:
        while len(self._runs) > 1:
            older, newer = self._runs[-2], self._runs[-1]
            if len(older.high) > 2 * len(newer.high) or len(older.high) + len(newer.high) > _MAX_ROWS_OF_A_RUN:
                return
            older.merge(newer)
            del self._runs[-1]

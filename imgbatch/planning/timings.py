"""Values: the timings of a sample, from the notes of the workers that measured it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from imgbatch.planning.cost_model import Timings
from imgbatch.planning.strata import FORMATS, cell_of
from imgbatch.schema import PARQUET, TAR

if TYPE_CHECKING:
    from imgbatch.planning.measurement import Measured
    from imgbatch.planning.sample import Sample


def timings_of(measured: Measured, sample: Sample, *, split: bool) -> Timings:
    """Return the timings without the first batch of each worker, which belongs to its start.

    Args:
        split: images are prepared and classified by different workers, whose gaps are not known.
    """
    prepared, classified = _without_first(measured.prepared), _without_first(measured.classified)
    numbers = _concat((note["index"] for note in prepared), np.int64)
    return Timings(
        _cells(sample, numbers),
        _concat((note["bytes"] for note in prepared), np.float64),
        _concat((note["pixels"] for note in prepared), np.float64),
        _concat((note["prepare_s"] for note in prepared), np.float64),
        _pairs((note["waited_s"], len(note["index"])) for note in prepared),
        _pairs((note["ended"] - note["began"], note["rows"]) for note in classified),
        _pairs([] if split else _gaps(measured)),
    )


def _cells(sample: Sample, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the cells of images. The listing has no size of an image in a container: these are in one cell each."""
    cells = sample.cells[numbers] if len(numbers) else numbers
    sizes = cell_of(FORMATS[1], 0) - cell_of(FORMATS[0], 0)
    for container in (PARQUET, TAR):
        cell = cell_of(container, None)
        cells = np.where(cells // sizes == cell // sizes, cell, cells)
    return cells


def _without_first(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the notes of each worker in the order of time without its first one; all if none would remain."""
    rest = []
    for of_worker in _by_worker(notes).values():
        rest += of_worker[1:]
    return rest or notes


def _by_worker(notes: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    workers: dict[str, list[dict[str, Any]]] = {}
    for note in sorted(notes, key=lambda note: note["began"]):
        workers.setdefault(note["worker"], []).append(note)
    return workers


def _gaps(measured: Measured) -> Iterator[tuple[float, int]]:
    """Yield (seconds, images) for each batch but the first of a worker: the time in which the worker was idle before it."""
    for notes in _by_worker([*measured.prepared, *measured.classified]).values():
        batches, ended = 0, 0.0
        for note in notes:
            batches += "index" in note
            if batches > 1:  # the network is built before it classifies the first batch
                yield max(0.0, note["began"] - ended), len(note.get("index", ()))
            ended = note["ended"]


def _concat(parts: Iterable[Any], dtype: Any) -> np.ndarray[Any, Any]:
    arrays = [np.asarray(part, dtype) for part in parts]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _pairs(pairs: Iterable[tuple[float, int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([*pairs], np.float64).reshape(-1, 2)

"""Values: the cost model: seconds of a worker for each image, by stage, estimated from a sample with bootstrap draws.

The time to prepare an image (decode, resize) depends on its bytes and its pixels: for each format a line

    seconds = fixed + per_byte * bytes + per_pixel * pixels,    no coefficient below 0

is fitted to the sample. The sum over a cell of the listing (format and size class) is that of the line, from the number of
images and bytes that the listing counts, plus the mean difference between sample and line in this cell (a generalised
regression estimator; Särndal, Swensson and Wretman, Model Assisted Survey Sampling, 1992). Waiting for the store, the
network and the gaps between units cost the same for every image.

Each estimate has DRAWS + 1 values: the first is that of the sample, the others are those of bootstrap samples, drawn with
replacement within the cells, and from the batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imgbatch.planning.strata import SIZES

DRAWS = 400
Draws = npt.NDArray[np.float64]
_SHRINK = 3.0  # cells with few images in the sample take over only a part of their mean difference from the line
_MIN_FIT = 12


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the bounds between which 90 % of the draws are."""

    low: float
    mid: float
    high: float

    @classmethod
    def of(cls, draws: Draws) -> Interval:
        """Return the interval of draws; `mid` is their median."""
        low, mid, high = np.quantile(draws, [0.05, 0.5, 0.95])
        return cls(float(low), float(mid), float(high))

    def public(self) -> dict[str, float]:
        """Return the interval for JSON."""
        values = {"low": self.low, "mid": self.mid, "high": self.high}
        return {name: float(f"{value:.4g}") for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Timings:
    """What workers measured, without the first batch of each worker."""

    cells: npt.NDArray[np.int64]
    """The cell of each image of the sample."""
    bytes: npt.NDArray[np.float64]
    pixels: npt.NDArray[np.float64]
    prepare_s: npt.NDArray[np.float64]
    waits: npt.NDArray[np.float64]
    """(seconds, images) of each batch: the decoder waited for the store."""
    forward: npt.NDArray[np.float64]
    """(seconds, images) of each batch in the network."""
    gaps: npt.NDArray[np.float64]
    """(seconds, images) of each batch: the worker had nothing to do before it."""


@dataclass(frozen=True, slots=True)
class CellCount:
    """The images of a cell that will be labelled."""

    cell: int
    images: Draws
    """The number; a constant where the listing counts it."""
    bytes: float | None
    """Their bytes; None: unknown."""


@dataclass(frozen=True, slots=True)
class Line:
    """The line of a format."""

    fixed: float
    per_byte: float
    per_pixel: float

    def of(self, images: Draws | float, bytes: Draws | float, pixels: Draws | float) -> Draws:
        """Return the seconds of so many images, bytes and pixels."""
        return np.asarray(self.fixed * images + self.per_byte * bytes + self.per_pixel * pixels, np.float64)


@dataclass(frozen=True, slots=True)
class Costs:
    """The estimated seconds of workers. Each field has a value per draw."""

    prepare_s: Draws
    """Of all images together."""
    wait_s: Draws
    """Of one image, like the fields below."""
    forward_s: Draws
    gap_s: Draws
    images: Draws


def fit(bytes: Draws, pixels: Draws, seconds: Draws) -> Line:
    """Return the line of least squares without negative coefficients; with few images only their mean.

    >>> line = fit(np.array([1e5, 2e5] * 9), np.array([1e6, 1e6, 3e6] * 6), np.array([3e-3, 4e-3, 5e-3] * 6))
    >>> line.fixed >= 0 and line.per_byte >= 0 and line.per_pixel >= 0
    True
    """
    if len(seconds) < _MIN_FIT:
        return Line(float(seconds.mean()) if len(seconds) else 0.0, 0.0, 0.0)
    columns = np.stack([np.ones(len(seconds)), bytes, pixels], axis=1)
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-12)
    used = [0, 1, 2]
    solution = np.zeros(3)
    while used:
        values = np.linalg.lstsq(columns[:, used] / scale[used], seconds, rcond=1e-6)[0]
        if (values >= 0).all():
            solution[used] = values / scale[used]
            break
        used.pop(int(np.argmin(values)))
    return Line(*(float(value) for value in solution))


def estimate(timings: Timings, counts: Sequence[CellCount], seed: int = 0) -> Costs:
    """Return the cost of labelling the images that are counted."""
    random = np.random.default_rng(seed)
    images = np.sum([count.images for count in counts], axis=0) if counts else np.zeros(DRAWS + 1)
    order = np.argsort(timings.cells, kind="stable")
    prepare = np.zeros(DRAWS + 1)
    for draw in range(DRAWS + 1):
        rows = order if draw == 0 else _resample(timings.cells[order], order, random)
        prepare[draw] = _prepare(timings, rows, counts, draw)
    return Costs(
        prepare,
        _per_image(timings.waits, random),
        _per_image(timings.forward, random),
        _per_image(timings.gaps, random),
        images,
    )


def lines(timings: Timings) -> dict[int, Line]:
    """Return the line of each format, by its number, fitted to the whole sample."""
    formats = timings.cells // len(SIZES)
    return {
        format: fit(*(values[formats == format] for values in (timings.bytes, timings.pixels, timings.prepare_s)))
        for format in np.unique(formats).tolist()
    }


def _resample(
    cells: npt.NDArray[np.int64], order: npt.NDArray[np.int64], random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw as many images of each cell as it has, with replacement. `cells` is sorted, `order` has the images of it."""
    starts = np.searchsorted(cells, cells)
    sizes = np.searchsorted(cells, cells, side="right") - starts
    return order[starts + (random.random(len(cells)) * sizes).astype(np.int64)]


def _prepare(timings: Timings, rows: npt.NDArray[np.int64], counts: Sequence[CellCount], draw: int) -> float:
    """Return the seconds to prepare all images, estimated from the rows of one draw."""
    cells, bytes, pixels, seconds = (
        values[rows] for values in (timings.cells, timings.bytes, timings.pixels, timings.prepare_s)
    )
    formats = cells // len(SIZES)
    total, fitted = 0.0, {}
    for count in counts:
        format = count.cell // len(SIZES)
        of_format = formats == format
        if not of_format.any():
            of_format = np.ones(len(cells), bool)  # none of this format was measured: take the mean of all
        if format not in fitted:
            fitted[format] = fit(bytes[of_format], pixels[of_format], seconds[of_format])
        line, images = fitted[format], float(count.images[draw])
        in_cell = cells == count.cell if (cells == count.cell).any() else of_format
        measured = int(in_cell.sum())
        if not measured:
            continue
        mean_bytes = bytes[in_cell].mean()
        all_bytes = images * mean_bytes if count.bytes is None else count.bytes
        all_pixels = pixels[in_cell].sum() * (all_bytes / bytes[in_cell].sum() if mean_bytes else images / measured)
        difference = seconds[in_cell] - line.of(1.0, bytes[in_cell], pixels[in_cell])
        total += float(line.of(images, all_bytes, all_pixels))
        total += images * float(difference.mean()) * measured / (measured + _SHRINK)
    return max(0.0, total)


def _per_image(batches: npt.NDArray[np.float64], random: np.random.Generator) -> Draws:
    """Return seconds per image of (seconds, images) of batches: their ratio, in each draw from other batches."""
    if not len(batches):
        return np.zeros(DRAWS + 1)
    picks = np.concatenate([np.arange(len(batches))[None], random.integers(len(batches), size=(DRAWS, len(batches)))])
    seconds, images = batches[:, 0][picks].sum(axis=1), batches[:, 1][picks].sum(axis=1)
    return np.asarray(seconds / np.maximum(images, 1.0))


def stream_images(read: Sequence[tuple[int, int]], total_bytes: float, random: np.random.Generator) -> Draws:
    """Return the number of images in streams, from the streams of a sample.

    Args:
        read: (bytes, images) of the part of each stream that was read.
        total_bytes: the size of all streams.
    """
    if not read:
        return np.zeros(DRAWS + 1)
    parts = np.array(read, np.float64)
    picks = np.concatenate([np.arange(len(parts))[None], random.integers(len(parts), size=(DRAWS, len(parts)))])
    bytes, images = parts[:, 0][picks].sum(axis=1), parts[:, 1][picks].sum(axis=1)
    return np.asarray(total_bytes * images / np.maximum(bytes, 1.0))

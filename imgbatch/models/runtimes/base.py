"""Effects: what executes a network: OpenVINO on CPUs, torch on GPUs and wherever OpenVINO is not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
"""Shape (n, H, W, 3): RGB, not normalised."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The k best classes of each image: (n, k) int32 ids and float32 probabilities, best first."""

    ids: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float16] | None = None
    """(n, features): what the head saw, where that was asked for."""
    above: Prediction | None = None
    """With a taxonomy, the best node of each level above the labels, coarse to fine: (n, levels - 1)."""

    def first(self, n: int) -> Prediction:
        """Return the answers of the first n images."""
        embeddings = None if self.embeddings is None else self.embeddings[:n]
        return Prediction(self.ids[:n], self.scores[:n], embeddings, self.above and self.above.first(n))


def prediction(outputs: Sequence[npt.NDArray[Any]]) -> Prediction:
    """Return what a network gave: scores and ids, perhaps those of the levels above, and perhaps embeddings; copied."""
    scores, ids, *more = outputs
    embeddings = half(more.pop()) if len(more) % 2 else None
    return Prediction(
        np.array(ids, np.int32), np.array(scores, np.float32), embeddings, prediction(more) if more else None
    )


def joined(found: Sequence[Prediction]) -> Prediction:
    """Return the answers of several batches as one."""
    embeddings = [each.embeddings for each in found if each.embeddings is not None]
    above = [each.above for each in found if each.above is not None]
    return Prediction(
        np.concatenate([each.ids for each in found]),
        np.concatenate([each.scores for each in found]),
        np.concatenate(embeddings) if embeddings else None,
        joined(above) if above else None,
    )


class Runtime(Protocol):
    """A network that is ready to run in this process."""

    def __call__(self, pixels: Pixels) -> Prediction:
        """Return the best classes of n images, n ≥ 0."""

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits of n images, n ≥ 0: (n, labels)."""

    def facts(self) -> dict[str, Any]:
        """Return device, dtype, runtime and batch size, for the run's record."""


def half(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Return embeddings as tables hold them; what 16 bits cannot hold becomes the largest that they can."""
    most = float(np.finfo(np.float16).max)
    return features.clip(-most, most).astype(np.float16)


def in_batches(
    pixels: Pixels, batch_size: int, forward: Callable[[Pixels], Prediction], k: int, features: int | None = None
) -> Prediction:
    """Run `forward` on batches of exactly `batch_size` images, zeros where there are fewer.

    An image's answer then does not depend on its company.
    """
    none = None if features is None else np.zeros((0, features), np.float16)
    found = [Prediction(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), none)]
    found += [forward(batch).first(n) for batch, n in _batches(pixels, batch_size)]
    return joined(found)


def logits_in_batches(
    pixels: Pixels, batch_size: int, forward: Callable[[Pixels], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Run `forward`, which gives the logits of a batch, as `in_batches` does."""
    return np.concatenate([forward(batch)[:n] for batch, n in _batches(pixels, batch_size)])


def _batches(pixels: Pixels, batch_size: int) -> Iterator[tuple[Pixels, int]]:
    """Yield batches of exactly `batch_size` images, and how many of them are not padding."""
    for start in range(0, len(pixels), batch_size):
        batch = pixels[start : start + batch_size]
        n = len(batch)
        if n < batch_size:
            batch = np.concatenate([batch, np.zeros((batch_size - n, *batch.shape[1:]), np.uint8)])
        yield batch, n

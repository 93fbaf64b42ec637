"""Effects: the interface of runtimes, which execute a network: OpenVINO on CPUs, torch on GPUs and without OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
"""Shape (n, H, W, 3): RGB, not normalised."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The k best classes of each image: (n, k) int32 ids and float32 probabilities, best first."""

    ids: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float16] | None = None
    """(n, features): the input of the head, if embeddings were requested."""
    above: Prediction | None = None
    """With a taxonomy, the best node of each level above the labels, coarse to fine: (n, levels - 1)."""

    @classmethod
    def from_outputs(cls, outputs: Sequence[npt.NDArray[Any]]) -> Prediction:
        """Return the outputs of an `EndToEndModel` without its logits, copied.

        Args:
            outputs: scores and ids; with a taxonomy, scores and ids of the levels above; then perhaps embeddings.
        """
        scores, ids, *other_outputs = outputs
        embeddings = to_float16(other_outputs.pop()) if len(other_outputs) % 2 else None
        above = cls.from_outputs(other_outputs) if other_outputs else None
        return cls(np.array(ids, np.int32), np.array(scores, np.float32), embeddings, above)

    @classmethod
    def concat(cls, predictions: Sequence[Prediction]) -> Prediction:
        """Return the predictions of several batches as one."""
        embeddings = [batch.embeddings for batch in predictions if batch.embeddings is not None]
        above = [batch.above for batch in predictions if batch.above is not None]
        return cls(
            np.concatenate([batch.ids for batch in predictions]),
            np.concatenate([batch.scores for batch in predictions]),
            np.concatenate(embeddings) if embeddings else None,
            cls.concat(above) if above else None,
        )

    def first(self, n: int) -> Prediction:
        """Return the predictions of the first n images."""
        embeddings = None if self.embeddings is None else self.embeddings[:n]
        return Prediction(self.ids[:n], self.scores[:n], embeddings, self.above and self.above.first(n))


class Runtime(Protocol):
    """A network that is loaded in this process."""

    def __call__(self, pixels: Pixels) -> Prediction:
        """Return the best classes of n images, n ≥ 0."""

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits of n images, n ≥ 0: (n, labels)."""

    def facts(self) -> dict[str, Any]:
        """Return device, dtype, runtime and batch size for the run record."""


def to_float16(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Return embeddings as the tables store them. Values out of range are clipped to the largest of float16."""
    maximum = float(np.finfo(np.float16).max)
    return features.clip(-maximum, maximum).astype(np.float16)


def run_in_batches(
    pixels: Pixels, batch_size: int, forward: Callable[[Pixels], Prediction], k: int, features: int | None = None
) -> Prediction:
    """Run `forward` on batches of exactly `batch_size` images. The last batch is padded with zeros.

    With one batch size, the result of an image does not depend on the other images.
    """
    no_embeddings = None if features is None else np.zeros((0, features), np.float16)
    predictions = [Prediction(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), no_embeddings)]
    predictions += [forward(batch).first(n) for batch, n in _batches(pixels, batch_size)]
    return Prediction.concat(predictions)


def logits_of_batches(
    pixels: Pixels, batch_size: int, forward: Callable[[Pixels], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Run `forward`, which returns the logits of a batch, like `run_in_batches`."""
    return np.concatenate([forward(batch)[:n] for batch, n in _batches(pixels, batch_size)])


def _batches(pixels: Pixels, batch_size: int) -> Iterator[tuple[Pixels, int]]:
    """Yield batches of exactly `batch_size` images, each with the number of images that are not padding."""
    for start in range(0, len(pixels), batch_size):
        batch = pixels[start : start + batch_size]
        n = len(batch)
        if n < batch_size:
            batch = np.concatenate([batch, np.zeros((batch_size - n, *batch.shape[1:]), np.uint8)])
        yield batch, n

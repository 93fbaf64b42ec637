"""Values: the self-check of a worker: before its first image it runs its network on fixed images, and compares the logits.

The reference logits were computed by torch in 32 bits on the machine that started the run. They are sent with the model, so
that they do not depend on any file of the node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from imgbatch.models.model import Model

IMAGES = 2
VERSION = 1
"""The version of the fixed images: a reference is valid only for its version."""

TOLERANCE = {"float32": 0.05, "float16": 0.4, "bfloat16": 0.4}
"""The maximum difference of logits, relative to the spread of the reference's logits (root mean squares).

EfficientNet-Lite0 has 0.0000 in 32 bits and 0.05 to 0.06 in 16 (OpenVINO and torch, 2026-11-28); unrelated logits have 1 or
more. OpenVINO uses bfloat16 instead of float16 if the processor has no other 16-bit type.
"""

_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-7, "bfloat16": 2.0**-7}
_ROUNDINGS = 4  # of the largest logit: if all logits are almost equal, their differences are rounding errors

_FIELDS = ((2, 4, 8, 16, 32, 64), (3, 5))  # numbers of fields along a side, for each image

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class SelfCheckError(Exception):
    """The network gives wrong results on this node."""


def fixed_images(height: int, width: int) -> Pixels:
    """Return the fixed images, (2, height, width, 3): overlaid coloured fields of several sizes.

    They are made from the raw output of PCG64, which is the same in every version of NumPy.
    """
    generator, images = np.random.PCG64(18), np.zeros((IMAGES, height, width, 3), np.uint8)
    for image, scales in zip(images, _FIELDS, strict=True):
        total = np.zeros((height, width, 3), np.int32)
        for fields in scales:
            drawn = generator.random_raw(-(-fields * fields * 3 // 8)).astype("<u8").view(np.uint8)
            grid = drawn[: fields * fields * 3].reshape(fields, fields, 3).astype(np.int32) - 127
            rows, columns = (np.arange(side) * fields // side for side in (height, width))
            total += grid[rows][:, columns]
        image[:] = np.clip(total // 2 + 127, 0, 255)  # a mean would have little contrast
    return images


def to_bytes(logits: Logits) -> bytes:
    """Return logits as bytes, the form of the reference in a model."""
    return np.ascontiguousarray(logits, "<f4").tobytes()


def difference(logits: Logits, reference: Logits) -> float:
    """Return the difference between logits and reference, relative to the spread of the reference; the worst of all images.

    >>> difference(np.zeros((1, 2)), np.array([[-1.0, 1.0]]))
    1.0
    """
    distance, spread = _distance_and_spread(logits, reference)
    return float(np.max(distance / np.maximum(spread, np.finfo(np.float32).tiny)))


class LoadedNetwork(Protocol):
    """A loaded network, such as a `Runtime`."""

    def logits(self, pixels: Pixels) -> Logits:
        """Return the logits of n images."""

    def facts(self) -> dict[str, Any]:
        """Return its `dtype` and other facts."""


def run_check(model: Model, network: LoadedNetwork) -> None:
    """Run the network on the fixed images, in one forward pass, and compare its logits with the model's reference.

    Raises:
        SelfCheckError: the logits differ.
    """
    if model.logits is None:  # a model made by code, without a reference
        return
    reference = np.frombuffer(model.logits, "<f4").reshape(IMAGES, -1)
    logits = network.logits(fixed_images(model.preprocess.height, model.preprocess.width))
    dtype = str(network.facts()["dtype"])
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        numbers = "finite" if np.isfinite(logits).all() else "not finite"
        raise SelfCheckError(f"it returns {logits.shape[-1]} logits for the fixed images, {numbers} ({dtype})")
    distance, spread = _distance_and_spread(logits, reference)
    rounding = _ROUNDINGS * _ROUNDING[dtype] * np.abs(reference).max(1)
    if not (distance <= TOLERANCE[dtype] * spread + rounding).all():
        raise SelfCheckError(
            f"its logits for the fixed images differ from the model's by {difference(logits, reference):.2f} of their spread, "
            f"more than {TOLERANCE[dtype]} ({dtype})"
        )


def _distance_and_spread(logits: Logits, reference: Logits) -> tuple[Logits, Logits]:
    """Return for each image the root mean square of the difference, and of the reference around its mean."""
    centred = reference - reference.mean(1, keepdims=True)
    return np.sqrt(np.mean((logits - reference) ** 2, axis=1)), np.sqrt(np.mean(centred**2, axis=1))

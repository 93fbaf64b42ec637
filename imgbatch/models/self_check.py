"""Values: what a worker does before its first image: it has the network answer fixed pixels, and compares the logits
with those that
torch gave in 32 bits where the run was started.

No artifact of the node has a part in the reference: it travels with the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from imgbatch.models.model import Model

IMAGES = 2
VERSION = 1
"""Of the pixels: a reference for others is worth nothing."""

TOLERANCE = {"float32": 0.05, "float16": 0.4, "bfloat16": 0.4}
"""The largest difference between logits, relative to how far those of the reference lie apart (root mean squares).

EfficientNet-Lite0 has 0.0000 in 32 bits and 0.05 to 0.06 in 16 (OpenVINO and torch, 2026-11-28); what has nothing to do with
the reference has 1 and more. OpenVINO takes bfloat16 for float16 where the processor has no other type of 16 bits.
"""

_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-7, "bfloat16": 2.0**-7}
_ROUNDINGS = 4  # of the largest logits: where all lie close together, rounding is what tells them apart

_FIELDS = ((2, 4, 8, 16, 32, 64), (3, 5))  # along a side, of each image

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


class SelfCheckError(Exception):
    """The network does not answer as it should on this node."""


def fixed_images(height: int, width: int) -> Pixels:
    """Return the images that are shown, (2, height, width, 3): coloured fields over each other, small and large.

    Made of the raw output of PCG64, which is the same in every version of NumPy.
    """
    raw, found = np.random.PCG64(18), np.zeros((IMAGES, height, width, 3), np.uint8)
    for image, scales in zip(found, _FIELDS, strict=True):
        total = np.zeros((height, width, 3), np.int32)
        for fields in scales:
            drawn = raw.random_raw(-(-fields * fields * 3 // 8)).astype("<u8").view(np.uint8)
            grid = drawn[: fields * fields * 3].reshape(fields, fields, 3).astype(np.int32) - 127
            rows, columns = (np.arange(side) * fields // side for side in (height, width))
            total += grid[rows][:, columns]
        image[:] = np.clip(total // 2 + 127, 0, 255)  # a mean would lie in the middle, without contrast
    return found


def to_bytes(logits: Logits) -> bytes:
    """Return the reference as a model carries it."""
    return np.ascontiguousarray(logits, "<f4").tobytes()


def difference(found: Logits, reference: Logits) -> float:
    """Return how far the logits of an image are from the reference, relative to how far the reference's lie apart; the worst.

    >>> difference(np.zeros((1, 2)), np.array([[-1.0, 1.0]]))
    1.0
    """
    apart, scale = _apart(found, reference)
    return float(np.max(apart / np.maximum(scale, np.finfo(np.float32).tiny)))


class LoadedNetwork(Protocol):
    """A network that is loaded, such as a `Runtime`."""

    def logits(self, pixels: Pixels) -> Logits:
        """Return the logits of n images."""

    def facts(self) -> dict[str, Any]:
        """Return its `dtype`, and more."""


def run_check(model: Model, network: LoadedNetwork) -> None:
    """Have the network answer the fixed images: one forward pass.

    Raises:
        SelfCheckError: its logits are not those of the model.
    """
    if model.logits is None:  # a model that code has made, without a reference
        return
    reference = np.frombuffer(model.logits, "<f4").reshape(IMAGES, -1)
    found = network.logits(fixed_images(model.preprocess.height, model.preprocess.width))
    dtype = str(network.facts()["dtype"])
    if found.shape != reference.shape or not np.isfinite(found).all():
        numbers = "finite" if np.isfinite(found).all() else "not finite"
        raise SelfCheckError(f"it gives {found.shape[-1]} logits for the fixed images, {numbers} ({dtype})")
    apart, scale = _apart(found, reference)
    rounding = _ROUNDINGS * _ROUNDING[dtype] * np.abs(reference).max(1)
    if not (apart <= TOLERANCE[dtype] * scale + rounding).all():
        raise SelfCheckError(
            f"its logits of the fixed images differ from the model's by {difference(found, reference):.2f} of their spread, "
            f"{TOLERANCE[dtype]} is tolerated ({dtype})"
        )


def _apart(found: Logits, reference: Logits) -> tuple[Logits, Logits]:
    """Return for each image the root mean squares of the difference, and of the reference around its mean."""
    centred = reference - reference.mean(1, keepdims=True)
    return np.sqrt(np.mean((found - reference) ** 2, axis=1)), np.sqrt(np.mean(centred**2, axis=1))

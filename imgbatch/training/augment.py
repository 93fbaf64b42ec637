"""Values: what the network sees of an image in training: a random crop, jittered; drawn anew in every epoch from the
seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from imgbatch.config.training import TrainConfig

_RATIO = math.log(4 / 3)
_TRIES = 10


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a picture, in shares of its width and height."""

    left: float
    top: float
    width: float
    height: float


def random_box(aspect: float, least_area: float, draw: torch.Generator | None = None) -> Box:
    """Return a random part of a picture: least_area to all of its area, 3:4 to 4:3 in its own pixels.

    The distribution is that of torchvision's RandomResizedCrop. That one cannot be told that a picture was squashed.

    Args:
        aspect: width / height of the original.
    """
    for _ in range(_TRIES):
        area, ratio, left, top = torch.rand(4, generator=draw).tolist()
        area, ratio = least_area + (1 - least_area) * area, math.exp((2 * ratio - 1) * _RATIO)
        width, height = math.sqrt(area * ratio / aspect), math.sqrt(area / ratio * aspect)
        if width <= 1 and height <= 1:
            return Box(left * (1 - width), top * (1 - height), width, height)
    width, height = min(1.0, 4 / 3 / aspect), min(1.0, aspect * 4 / 3)
    return Box((1 - width) / 2, (1 - height) / 2, width, height)


class Rows(Protocol):
    """Pictures by their number: uint8 (S, S, 3)."""

    def __getitem__(self, i: int, /) -> npt.NDArray[np.uint8]: ...


class Chosen:
    """Some rows of an array, without a copy of them."""

    def __init__(self, array: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> None:
        self._array, self._places = array, places

    def __getitem__(self, i: int) -> npt.NDArray[np.uint8]:
        row: npt.NDArray[np.uint8] = self._array[self._places[i]]
        return row


class Views(Dataset[tuple[torch.Tensor, int]]):
    """Views of squashed pictures: uint8 (3, side, side), and the class."""

    def __init__(
        self,
        pixels: Rows,
        aspects: npt.NDArray[np.float32],
        classes: npt.NDArray[np.int64],
        keys: npt.NDArray[np.uint64],
        config: TrainConfig,
        *,
        flip: bool,
    ) -> None:
        """Take n pictures; their randomness comes from their `keys`."""
        self._pixels, self._aspects, self._classes, self._keys = pixels, aspects, classes, keys
        self._seed, self._side, self._least_area = config.seed, int(config.resolution or 0), config.min_crop_area
        self.flip = flip
        change = [v2.RandomHorizontalFlip()] if flip else []
        if config.color_jitter:
            change.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
        self._change: Any = v2.Compose(change) if change else v2.Identity()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        # The same view whichever process draws it, and however many there are.
        torch.manual_seed(hash((self._seed, self.epoch, int(self._keys[i]))) & 0x7FFF_FFFF)
        picture = torch.from_numpy(np.asarray(self._pixels[i])).permute(2, 0, 1)
        box, side = random_box(float(self._aspects[i]), self._least_area), picture.shape[-1]
        view = v2.functional.resized_crop(
            picture,
            top=round(box.top * side), left=round(box.left * side),
            height=max(1, round(box.height * side)), width=max(1, round(box.width * side)),
            size=[self._side, self._side], antialias=True,
        )  # fmt: skip
        return self._change(view), int(self._classes[i])

"""Values: augmentation: a random crop of each image, mirrored and jittered; derived from the seed, the epoch and the image."""

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
_MAX_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a picture, in fractions of its width and height."""

    left: float
    top: float
    width: float
    height: float


def random_box(aspect: float, min_area: float, generator: torch.Generator | None = None) -> Box:
    """Return a random part of a picture: `min_area` to all of its area, with an aspect of 3:4 to 4:3 in the original.

    The distribution is that of torchvision's RandomResizedCrop, which does not support pictures that were squashed.

    Args:
        aspect: width / height of the original.
    """
    for _ in range(_MAX_ATTEMPTS):
        area, ratio, left, top = torch.rand(4, generator=generator).tolist()
        area, ratio = min_area + (1 - min_area) * area, math.exp((2 * ratio - 1) * _RATIO)
        width, height = math.sqrt(area * ratio / aspect), math.sqrt(area / ratio * aspect)
        if width <= 1 and height <= 1:
            return Box(left * (1 - width), top * (1 - height), width, height)
    width, height = min(1.0, 4 / 3 / aspect), min(1.0, aspect * 4 / 3)
    return Box((1 - width) / 2, (1 - height) / 2, width, height)


class Pictures(Protocol):
    """Pictures by their number: uint8 (S, S, 3)."""

    def __getitem__(self, i: int, /) -> npt.NDArray[np.uint8]: ...


class ArraySubset:
    """Some rows of an array, without a copy of them."""

    def __init__(self, array: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64]) -> None:
        self._array, self._indices = array, indices

    def __getitem__(self, i: int) -> npt.NDArray[np.uint8]:
        row: npt.NDArray[np.uint8] = self._array[self._indices[i]]
        return row


class AugmentedDataset(Dataset[tuple[torch.Tensor, int]]):
    """Augmented crops of squashed pictures: uint8 (3, side, side), and the class."""

    def __init__(
        self,
        pixels: Pictures,
        aspects: npt.NDArray[np.float32],
        classes: npt.NDArray[np.int64],
        keys: npt.NDArray[np.uint64],
        config: TrainConfig,
        *,
        flip: bool,
    ) -> None:
        """Take n pictures; the augmentation of each is derived from its key."""
        self._pixels, self._aspects, self._classes, self._keys = pixels, aspects, classes, keys
        self._seed, self._side, self._min_area = config.seed, int(config.resolution or 0), config.min_crop_area
        self.flip = flip
        transforms = [v2.RandomHorizontalFlip()] if flip else []
        if config.color_jitter:
            transforms.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
        self._transform: Any = v2.Compose(transforms) if transforms else v2.Identity()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        # With this seed the crop does not depend on the process that draws it, or on the number of processes.
        torch.manual_seed(hash((self._seed, self.epoch, int(self._keys[i]))) & 0x7FFF_FFFF)
        picture = torch.from_numpy(np.asarray(self._pixels[i])).permute(2, 0, 1)
        box, side = random_box(float(self._aspects[i]), self._min_area), picture.shape[-1]
        crop = v2.functional.resized_crop(
            picture,
            top=round(box.top * side), left=round(box.left * side),
            height=max(1, round(box.height * side)), width=max(1, round(box.width * side)),
            size=[self._side, self._side], antialias=True,
        )  # fmt: skip
        return self._transform(crop), int(self._classes[i])

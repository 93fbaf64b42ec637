"""Values: the loss of fine-tuning, the order of its images, and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchvision.transforms import v2

from imgbatch.config.training import TrainConfig

Ints = npt.NDArray[np.int64]


class Loss:
    """The loss, the order of the images and their mixing, with the options for unbalanced classes and overconfidence."""

    def __init__(self, config: TrainConfig, classes: Ints, number: int, device: torch.device) -> None:
        counts = np.maximum(np.bincount(classes, minlength=number), 1)
        balanced = torch.from_numpy(len(classes) / (number * counts)).float()
        self._weight = balanced.to(device) if config.class_balancing == "weights" else None
        self._sampling = balanced[torch.from_numpy(classes)] if config.class_balancing == "sampling" else None
        self._smoothing = config.label_smoothing
        kinds = [(v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)]
        mixers = [kind(alpha=alpha, num_classes=number) for kind, alpha in kinds if alpha > 0]
        self._mixer: Any = v2.RandomChoice(mixers) if mixers else None

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, target, weight=self._weight, label_smoothing=self._smoothing)

    def mix(self, x: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch and its targets, mixed with `train.mixup` or `train.cutmix`."""
        mixed: tuple[torch.Tensor, torch.Tensor] = self._mixer(x, classes) if self._mixer else (x, classes)
        return mixed

    def order(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Return the order of n images in an epoch; with class_balancing=sampling some are repeated and others omitted."""
        if self._sampling is None:
            return torch.randperm(n, generator=generator)
        return torch.multinomial(self._sampling, n, replacement=True, generator=generator)


@dataclass(frozen=True)
class Cosine:
    """The factor of the learning rate at a step: rising to 1, then falling to 0 as half a cosine."""

    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))))

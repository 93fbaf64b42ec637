"""Effects: one fine-tuning: what all of its workers have to know, and what each knows of itself and the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from imgbatch.config.training import TrainConfig
from imgbatch.models.model import Model
from imgbatch.storage.stores import Folder
from imgbatch.training.cache import Keys

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Fit:
    """One fine-tuning: everything that a worker has to know."""

    base: Model
    config: TrainConfig
    """With every number set (`recipe.resolve`)."""
    number_of_classes: int
    run: Folder
    """Where the checkpoint and the result go."""
    pictures: Folder
    """Shards of squashed pictures, of all images."""
    inputs: Folder
    """Shards of pictures as the network's preprocessing gives them, of the held-out images."""
    keys: Keys
    """Of all images, by which their shards are searched, and from which the randomness of their views comes."""
    classes: Ints
    aspects: Floats
    """Width / height."""
    held: npt.NDArray[np.bool_]
    """Which of them are held out."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the workers this is, and how they talk; the defaults are those of one that is alone."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda net: net
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns what each worker gave, in the order of their ranks."""
    loaders: int = 0
    """Processes that draw views, beside this one."""
    tell: Callable[[dict[str, Any]], None] = lambda fact: None

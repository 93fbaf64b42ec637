"""Effects: one fine-tuning: the specification that all of its workers share, and the context of each worker."""

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
class FinetuneSpec:
    """One fine-tuning: the model, the images and the options; the same for all workers."""

    base: Model
    config: TrainConfig
    """With every number set (`defaults.resolve`)."""
    number_of_classes: int
    run: Folder
    """The folder of the checkpoint and the result."""
    pictures: Folder
    """Shards of squashed pictures, of all images."""
    inputs: Folder
    """Shards of the held-out images, with the preprocessing of the network."""
    keys: Keys
    """Of all images: their names in the shards. The random augmentation of an image is derived from its key."""
    classes: Ints
    aspects: Floats
    """Width / height."""
    held_out: npt.NDArray[np.bool_]
    """Which of the images are held out."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The rank of a worker, and its functions for communication; the defaults are those of a single worker."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    wrap: Callable[[nn.Module], nn.Module] = lambda net: net
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Returns the values of all workers, in the order of their ranks."""
    loader_processes: int = 0
    """Number of processes that augment images, beside this one."""
    report: Callable[[dict[str, Any]], None] = lambda fact: None
    """Takes reports of progress: a dictionary with a `kind` (step, epoch, resumed)."""

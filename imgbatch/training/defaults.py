"""Values: the defaults of fine-tuning, from the number of images and the input size of the network."""

from __future__ import annotations

import math
from dataclasses import replace

from imgbatch.config.training import TrainConfig

_REFERENCE_IMAGES = 2_900
"""Number of images for which 10 epochs of batches of 32 were good (docs/LOG.md)."""


def resolve(config: TrainConfig, images: int, input_size: int, *, fixed: bool, stages: int) -> TrainConfig:
    """Return the config with all numbers of fine-tuning set.

    Args:
        images: to train on.
        input_size: pixels of the shorter side of the network's input.
        fixed: the network supports that size only.
        stages: number of stages of the network, including stem and head. The first third of a pretrained one is frozen: edges
            and colours are the same for all images, and a third of the time is saved.

    >>> config = resolve(TrainConfig(), 2640, 224, fixed=False, stages=9)
    >>> config.epochs, config.batch_size, config.resolution, config.frozen_stages
    (10, 32, 192, 3)
    >>> small, large = (resolve(TrainConfig(), images, 224, fixed=False, stages=6) for images in (160, 10**6))
    >>> (small.epochs, small.batch_size), (large.epochs, large.batch_size)
    ((40, 8), (5, 64))
    """
    epochs = config.epochs or round(min(40.0, max(5.0, 10 * math.sqrt(_REFERENCE_IMAGES / images))))
    # A power of two, with at least some twenty steps in an epoch.
    batch_size = config.batch_size or 2 ** round(math.log2(min(64, max(8, images / 80))))
    smaller = max(32, round(input_size * 6 / 7 / 32) * 32)
    frozen = stages // 3 if config.pretrained else 0
    return replace(
        config,
        epochs=epochs,
        batch_size=batch_size,
        resolution=config.resolution or (input_size if fixed else min(input_size, smaller)),
        lr=config.lr * math.sqrt(batch_size / 32),
        frozen_stages=frozen if config.frozen_stages is None else config.frozen_stages,
    )


def cached_side(input_size: int) -> int:
    """Return the side to which pictures are squashed for training: larger than the input, since crops are enlarged.

    >>> cached_side(224)
    288
    """
    return round(input_size * 9 / 7)

"""Values: what a run leaves unset, by the number of its images and the size of the network's input."""

from __future__ import annotations

import math
from dataclasses import replace

from imgbatch.config.training import TrainConfig

_USUAL = 2_900
"""Images for which 10 epochs of batches of 32 were found good (docs/LOG.md)."""


def resolve(config: TrainConfig, images: int, input_size: int, *, fixed: bool, stages: int) -> TrainConfig:
    """Return the config with every number set that fine-tuning needs.

    Args:
        images: to train on.
        input_size: pixels of the shorter side of the network's input.
        fixed: the network takes that size alone.
        stages: how many the network has, stem and head among them. Of a pretrained one the first third keeps its weights:
            edges and colours are the same everywhere, and a third of the time is saved.

    >>> made = resolve(TrainConfig(), 2640, 224, fixed=False, stages=9)
    >>> made.epochs, made.batch_size, made.resolution, made.frozen_stages
    (10, 32, 192, 3)
    >>> few, many = (resolve(TrainConfig(), images, 224, fixed=False, stages=6) for images in (160, 10**6))
    >>> (few.epochs, few.batch_size), (many.epochs, many.batch_size)
    ((40, 8), (5, 64))
    """
    epochs = config.epochs or round(min(40.0, max(5.0, 10 * math.sqrt(_USUAL / images))))
    # A power of two, with some twenty steps in an epoch at least.
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

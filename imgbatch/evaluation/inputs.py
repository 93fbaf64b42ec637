"""Effects: the inputs of an evaluation: the images of one split, and the checks that every label is a class of the models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config.sections import SourceConfig
from imgbatch.evaluation.classes import Classes
from imgbatch.evaluation.ground_truth import GroundTruth
from imgbatch.evaluation.labelled_inputs import Relisted, relisted
from imgbatch.models.model import Model
from imgbatch.sources.base import Source, is_stream
from imgbatch.sources.split_words import SPLIT_NAMES
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal import console

log = logging.getLogger(__name__)


@contextmanager
def listed_split(
    stores: Stores, sources: Sequence[Source], config: SourceConfig, split: str | None, models: Sequence[Model]
) -> Iterator[Relisted]:
    """List the inputs, check the labels, and return a source of the images of one split.

    Args:
        split: train, val or test; None: all images.
        models: the labels must be classes of these models.

    Raises:
        InputError: a label is no class of a model, an image has none, or the inputs are ambiguous.
    """
    console.step("reading the true classes")
    with relisted(stores, sources, config, partial(is_of_split, split), splits=split is not None) as listed:
        require_classes(listed, models, split, config.label_is)
        yield listed


def is_of_split(split: str | None, rows: pa.Table, splits: npt.NDArray[np.int64]) -> pa.Array:
    """Return a mask of the images of a split, and of all tars, which may have members of any split."""
    if split is None:
        return pa.array(np.ones(len(rows), bool))
    return pc.or_(is_stream(rows), pa.array(splits == SPLIT_NAMES.index(split)))


def require_classes(listed: Relisted, models: Sequence[Model], split: str | None, label_is: str) -> None:
    """Log a summary of the inputs, and refuse labels that are not classes of all models.

    Raises:
        InputError: with the labels, or images without a label.
    """
    # Numbers refer to the first model; for the second model they are replaced by the names of these classes.
    numbered = models if label_is == "name" else models[:1]
    classes_of_models = [Classes(model.labels, model.name, label_is=label_is) for model in numbered]
    entries = 0
    for listing in listed.source.list_images():
        images = listing.batch.filter(pc.invert(is_stream(listing.batch)))
        entries += len(listing.batch)
        for classes in classes_of_models:
            if len(images):
                classes.truths(images)
    if not listed.resolver.tars:
        log_understood(listed)
    if not entries:
        log.warning("%s holds no image of the split %s", listed.source.uri, split)
    for classes in classes_of_models:
        classes.require_known()


def log_understood(listed: Relisted) -> None:
    """Log a summary of the inputs."""
    log.info("contents of the inputs:\n%s", "\n".join(listed.resolver.lines()))


def truths_of(listed: Relisted, model: Model, label_is: str) -> GroundTruth:
    """Return the true class of each listed image; members of tars are not listed yet."""
    return GroundTruth((listing.batch for listing in listed.source.list_images()), model.labels, label_is)


def add_members(truths: GroundTruth, output: Folder, listed: Relisted, split: str | None) -> None:
    """Add the members of tars, from the tables of an output, and log a summary of the inputs."""
    if listed.resolver.tars:
        truths.add_members(output, listed.resolver, split)
        log_understood(listed)

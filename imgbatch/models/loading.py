"""Effects: loading of a model by name or URI.

The driver reads the description of the model and does not import torch; the actors build the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from imgbatch.config.sections import ModelConfig
from imgbatch.errors import ModelError, NotFound, TooLarge, did_you_mean
from imgbatch.models.model import Model
from imgbatch.models.taxonomy import read as read_taxonomy
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute

_MAX_TAXONOMY = 16 << 20


def load(config: ModelConfig, stores: Stores, *, replaces_head: bool = False) -> Model:
    """Return the model of a name or URI, after all checks that need no image.

    Args:
        config: the section `model` of the config.
        stores: the stores of URIs.
        replaces_head: the model is the base of a training, which does not use its head; it may be one for sigmoids.

    Raises:
        ModelError: the model does not exist, its weights are not available, or its files contradict each other.
    """
    model = _select(config, stores, replaces_head=replaces_head)
    if config.taxonomy is None:
        return model
    try:
        content = stores.read(absolute(config.taxonomy), _MAX_TAXONOMY)[0]
    except (NotFound, TooLarge) as error:
        raise ModelError(f"model.taxonomy={config.taxonomy}: the taxonomy cannot be read: {error}") from error
    return replace(model, taxonomy=read_taxonomy(content, config.taxonomy, model.labels))


def _select(config: ModelConfig, stores: Stores, *, replaces_head: bool) -> Model:
    from imgbatch.models import builtin, directory, state_dict

    name = config.name
    if name in builtin.MODELS:
        _refuse(config, "weights", "architecture", "labels")
        return builtin.MODELS[name](config)
    if name.startswith(state_dict.ZOOS):
        _refuse(config, "architecture")
        return state_dict.read_from_zoo(name, config.weights, name, config, stores)
    if "/" in name or name.startswith("."):
        _refuse(config, "weights")
        if config.architecture or name.lower().endswith(state_dict.SUFFIXES):
            return state_dict.read(config, stores)
        return directory.read(name, stores, config, replaces_head=replaces_head)
    hint = did_you_mean(name, builtin.MODELS, cutoff=0.4) or f"; the built-in models are: {', '.join(builtin.MODELS)}."
    raise ModelError(
        f"unknown model {name!r}{hint} A network of timm is timm:{name}, one of torchvision torchvision:{name}, and a model "
        f"directory is given by its path or URI, e.g. ./{name}"
    )


@contextmanager
def share_weights(model: Model, folder: Folder | None) -> Iterator[Model]:
    """Yield a model that every node can build: weights on a disk of this machine are copied to a folder for the block.

    Weights in a store are not copied. Without a folder (a run on one machine), the model is yielded unchanged.
    """
    from imgbatch.models.directory import Network

    if folder is None or not isinstance(model.network, Network) or not model.network.is_local:
        yield model
        return
    with model.network.share_weights(folder) as network:
        yield replace(model, network=network)


def _refuse(config: ModelConfig, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) is not None:
            raise ModelError(f"model.{key} cannot be combined with --model {config.name}, which has its own; omit it")

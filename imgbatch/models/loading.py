"""Effects: the model of a name or URI.

The driver reads what a model says of itself and never imports torch for it; the network is built in the actors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from imgbatch.config.sections import ModelConfig
from imgbatch.errors import ModelError, NotFound, TooLarge
from imgbatch.models.model import Model
from imgbatch.models.taxonomy import read as read_taxonomy
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute

_MOST_TAXONOMY = 16 << 20


def load(chosen: ModelConfig, stores: Stores, *, replaces_head: bool = False) -> Model:
    """Return the model of a name or URI, checked as far as that is possible without an image.

    Args:
        chosen: the section `model` of the config.
        stores: where URIs lead to.
        replaces_head: the model is the base of a training, whose head is not used: it may be one for sigmoids.

    Raises:
        ModelError: there is no such model, its weights cannot be had, or it contradicts itself.
    """
    model = _found(chosen, stores, replaces_head=replaces_head)
    if chosen.taxonomy is None:
        return model
    try:
        content = stores.read(absolute(chosen.taxonomy), _MOST_TAXONOMY)[0]
    except (NotFound, TooLarge) as error:
        raise ModelError(f"model.taxonomy={chosen.taxonomy}: no taxonomy is there: {error}") from error
    return replace(model, taxonomy=read_taxonomy(content, chosen.taxonomy, model.labels))


def _found(chosen: ModelConfig, stores: Stores, *, replaces_head: bool) -> Model:
    from imgbatch.models import builtin, directory, state_dict

    name = chosen.name
    if name in builtin.MODELS:
        _refuse(chosen, "weights", "architecture", "labels")
        return builtin.MODELS[name](chosen)
    if name.startswith(state_dict.ZOOS):
        _refuse(chosen, "architecture")
        return state_dict.of_zoo(name, chosen.weights, name, chosen, stores)
    if "/" in name or name.startswith("."):
        _refuse(chosen, "weights")
        if chosen.architecture or name.lower().endswith(state_dict.SUFFIXES):
            return state_dict.read(chosen, stores)
        return directory.read(name, stores, chosen, replaces_head=replaces_head)
    close = difflib.get_close_matches(name, builtin.MODELS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(builtin.MODELS)};"
    raise ModelError(
        f"unknown model {name!r}; {hint} A network of timm is timm:{name}, one of torchvision torchvision:{name}, and a model "
        f"directory is given by its path or URI, e.g. ./{name}"
    )


@contextmanager
def shared(model: Model, place: Folder | None) -> Iterator[Model]:
    """Have a model that every node can build: weights on this machine's disk lie in the place meanwhile, a store's stay.

    With no place, the model is the same: there are no other nodes.
    """
    from imgbatch.models.directory import Network

    if place is None or not isinstance(model.network, Network) or not model.network.is_local:
        yield model
        return
    with model.network.shared(place) as network:
        yield replace(model, network=network)


def _refuse(chosen: ModelConfig, *keys: str) -> None:
    for key in keys:
        if getattr(chosen, key) is not None:
            raise ModelError(f"model.{key} does not go with --model {chosen.name}, which has its own: omit it")

"""Effects: networks by name, with the zoo's weights or a state dict of one's own: made into a model directory, once a
machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import imgbatch
from imgbatch.config.sections import ModelConfig
from imgbatch.errors import ModelError, NotFound
from imgbatch.models import builtin, child, description, directory, node_cache
from imgbatch.models.model import Model
from imgbatch.storage.stores import Stores
from imgbatch.storage.uris import absolute

log = logging.getLogger(__name__)

ZOOS = ("timm:", "torchvision:")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
_FETCH_S = 3600.0
_MADE = "made.json"


def read(chosen: ModelConfig, stores: Stores) -> Model:
    """Return the model of a state dict, whose network `model.architecture` names.

    Raises:
        ModelError: it names none, or the two do not fit.
    """
    if chosen.architecture is None:
        raise ModelError(
            f"{chosen.name} holds weights alone: say of which network with --set model.architecture=NAME (timm's name, or "
            "torchvision:NAME), and name its classes with --set model.labels=URI, one a line"
        )
    architecture = chosen.architecture if chosen.architecture.startswith(ZOOS) else f"timm:{chosen.architecture}"
    return of_zoo(architecture, chosen.name, absolute(chosen.name), chosen, stores)


def of_zoo(architecture: str, weights: str | None, name: str, chosen: ModelConfig, stores: Stores) -> Model:
    """Return the model of a zoo's network, `timm:NAME[.TAG]` or `torchvision:NAME[@WEIGHTS]`.

    Its directory is made in the node's cache by a process of its own, so that the driver needs neither library.

    Args:
        architecture: the network.
        weights: the URI of a state dict; None: the zoo's own.
        name: what messages call it.

    Raises:
        ModelError: there is no such network, its weights cannot be had, or they do not fit.
    """
    labels = builtin.own_labels(chosen, stores)
    if len(labels) == 1:
        raise description.one_class(name)
    if labels:
        description.warn_of_likeness(labels, f"model.labels={chosen.labels}")
    content = None if weights is None else _content(weights, stores)
    made_of = [
        architecture,
        None if content is None else hashlib.sha256(content).hexdigest(),
        labels,
        imgbatch.__version__,
    ]
    made_of += [version(package) for package in ("timm", "torchvision")]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]

    def make(path: Path) -> None:
        path.mkdir()
        own = path / f"own{Path(weights or '').suffix}"
        if content is not None:
            own.write_bytes(content)
        question = {
            "task": "make",
            "name": name,
            "architecture": architecture,
            "weights": None if content is None else str(own),
            "labels": list(labels) or None,
            "path": str(path),
            "weights_from": weights,
            "labels_from": f"model.labels={chosen.labels}",
        }
        found = child.ask(question, limit_s=_FETCH_S)
        own.unlink(missing_ok=True)
        (path / _MADE).write_text(json.dumps(found))

    path = node_cache.once(f"model-{key}", make)
    made = json.loads((path / _MADE).read_text())
    for note in made["notes"]:
        log.info("%s: %s", name, note)
    full = made["name"] if weights is None else absolute(weights)
    return directory.read(str(path), stores, replace(chosen, labels=None), name=full)


def _content(uri: str, stores: Stores) -> bytes:
    try:
        return stores.read(absolute(uri))[0]
    except NotFound as error:
        raise ModelError(f"there is no state dict {uri}: {error}") from error

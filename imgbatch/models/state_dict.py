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
from imgbatch.storage.stores import Stores, absolute

log = logging.getLogger(__name__)

ZOOS = ("timm:", "torchvision:")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
_FETCH_S = 3600.0
_MADE = "made.json"


def read(config: ModelConfig, stores: Stores) -> Model:
    """Return the model of a state dict, whose network `model.architecture` names.

    Raises:
        ModelError: it names none, or the two do not fit.
    """
    if config.architecture is None:
        raise ModelError(
            f"{config.name} holds weights alone: say of which network with --set model.architecture=NAME (timm's name, or "
            "torchvision:NAME), and name its classes with --set model.labels=URI, one a line"
        )
    architecture = config.architecture if config.architecture.startswith(ZOOS) else f"timm:{config.architecture}"
    return read_from_zoo(architecture, config.name, absolute(config.name), config, stores)


def read_from_zoo(architecture: str, weights: str | None, name: str, config: ModelConfig, stores: Stores) -> Model:
    """Return the model of a zoo's network, `timm:NAME[.TAG]` or `torchvision:NAME[@WEIGHTS]`.

    Its directory is made in the node's cache by a process of its own, so that the driver needs neither library.

    Args:
        architecture: the network.
        weights: the URI of a state dict; None: the zoo's own.
        name: what messages call it.

    Raises:
        ModelError: there is no such network, its weights cannot be had, or they do not fit.
    """
    labels = builtin.configured_labels(config, stores)
    if len(labels) == 1:
        raise description.one_class_error(name)
    if labels:
        description.warn_about_similar_labels(labels, f"model.labels={config.labels}")
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
            "labels_from": f"model.labels={config.labels}",
        }
        found = child.ask(question, limit_s=_FETCH_S)
        own.unlink(missing_ok=True)
        (path / _MADE).write_text(json.dumps(found))

    path = node_cache.get_or_make(f"model-{key}", make)
    made = json.loads((path / _MADE).read_text())
    for note in made["notes"]:
        log.info("%s: %s", name, note)
    full = made["name"] if weights is None else absolute(weights)
    return directory.read(str(path), stores, replace(config, labels=None), name=full)


def _content(uri: str, stores: Stores) -> bytes:
    try:
        return stores.read(absolute(uri))[0]
    except NotFound as error:
        raise ModelError(f"there is no state dict {uri}: {error}") from error

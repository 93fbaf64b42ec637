"""Effects: models from a zoo or from a state dict, converted to a model directory once per machine."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
_RESULT = "made.json"


def read(config: ModelConfig, stores: Stores) -> Model:
    """Return the model of a state dict and the network of `model.architecture`.

    Raises:
        ModelError: `model.architecture` is not set, or the state dict does not fit its network.
    """
    if config.architecture is None:
        raise ModelError(
            f"{config.name} has only weights: give the network with --set model.architecture=NAME (timm's name, or "
            "torchvision:NAME), and the names of its classes, one per line, with --set model.labels=URI"
        )
    architecture = config.architecture if config.architecture.startswith(ZOOS) else f"timm:{config.architecture}"
    return read_from_zoo(architecture, config.name, absolute(config.name), config, stores)


def read_from_zoo(architecture: str, weights: str | None, name: str, config: ModelConfig, stores: Stores) -> Model:
    """Return the model of a network of a zoo, `timm:NAME[.TAG]` or `torchvision:NAME[@WEIGHTS]`.

    A child process makes its directory in the node's cache, so that the driver needs neither library.

    Args:
        architecture: the network.
        weights: the URI of a state dict; None: the zoo's own weights.
        name: the name of the network in messages.

    Raises:
        ModelError: the network or its weights are not available, or the weights do not fit.
    """
    labels = builtin.configured_labels(config, stores)
    if len(labels) == 1:
        raise description.one_class_error(name)
    if labels:
        description.warn_about_similar_labels(labels, f"model.labels={config.labels}")
    content = None if weights is None else _content(weights, stores)
    task = {
        "task": "make",
        "name": name,
        "architecture": architecture,
        "labels": list(labels) or None,
        "weights_from": weights,
        "labels_from": f"model.labels={config.labels}",
    }
    path = node_cache.get_or_make(_cache_name(architecture, content, labels), partial(_make_directory, task, content))
    result = json.loads((path / _RESULT).read_text())
    for note in result["notes"]:
        log.info("%s: %s", name, note)
    full_name = result["name"] if weights is None else absolute(weights)
    return directory.read(str(path), stores, replace(config, labels=None), name=full_name)


def _cache_name(architecture: str, content: bytes | None, labels: Sequence[str]) -> str:
    """Return the name of the directory in the node's cache, which depends on everything it is made from."""
    digest = None if content is None else hashlib.sha256(content).hexdigest()
    parts = [architecture, digest, labels, imgbatch.__version__]
    parts += [version(package) for package in ("timm", "torchvision")]
    return f"model-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"


def _make_directory(task: Mapping[str, Any], content: bytes | None, path: Path) -> None:
    """Run the task that makes a directory, with the state dict `content` in a file beside it; None: the zoo's weights."""
    path.mkdir()
    state_dict = path / f"own{Path(task['weights_from'] or '').suffix}"
    if content is not None:
        state_dict.write_bytes(content)
    arguments = {"weights": None if content is None else str(state_dict), "path": str(path)}
    result = child.run_task({**task, **arguments}, limit_s=_FETCH_S)
    state_dict.unlink(missing_ok=True)
    (path / _RESULT).write_text(json.dumps(result))


def _content(uri: str, stores: Stores) -> bytes:
    try:
        return stores.read(absolute(uri))[0]
    except NotFound as error:
        raise ModelError(f"there is no state dict {uri}: {error}") from error

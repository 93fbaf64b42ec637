"""Model directories as timm and the Hugging Face hub write them: `config.json` and `model.safetensors`, in any store.

Beside them may lie a taxonomy, `taxonomy.csv` or `taxonomy.json`. A directory without one whose labels are ImageNet's own
has ImageNet's.

A process that builds the network reads the weights from a copy on its node, which the first one fetches: once a node,
and checked against the digest that the driver saw.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgbatch.errors import ModelError, NotFound
from imgbatch.models import Model, node_cache
from imgbatch.preprocess import Preprocess
from imgbatch.storage import Folder, Stores, absolute, is_local
from imgbatch.taxonomy import Taxonomy
from imgbatch.taxonomy import read as read_taxonomy

if TYPE_CHECKING:
    from torch import nn

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TAXONOMIES = ("taxonomy.csv", "taxonomy.json")


def read(uri: str, stores: Stores) -> Model:
    """Return the model of a directory.

    Raises:
        ModelError: a file is missing, is not what it should be, or labels and head do not agree.
    """
    folder = Folder(stores, absolute(uri))
    config = _config(folder)
    weights = _required(folder, _WEIGHTS)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + hashlib.sha256(weights).digest()).hexdigest()
    classes = _classes(folder, config)
    labels = _labels(folder, config, classes)
    return Model(
        name=folder.uri,
        digest=digest,
        labels=labels,
        preprocess=_preprocess(folder, config),
        taxonomy=_taxonomy(folder, labels),
        network=_Network(folder, config, classes, hashlib.sha256(weights).hexdigest()),
    )


def _required(folder: Folder, name: str) -> bytes:
    try:
        return folder.read(name)
    except NotFound as error:
        raise ModelError(
            f"{folder.uri} is no model directory: it has no {name}. timm writes one with timm.models.save_for_hf"
        ) from error


def _config(folder: Folder) -> dict[str, Any]:
    try:
        config = json.loads(_required(folder, _CONFIG))
    except ValueError as error:
        raise ModelError(f"{folder.at(_CONFIG)} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ModelError(f"{folder.at(_CONFIG)} names no 'architecture'")
    for section in ("pretrained_cfg", "model_args"):
        config[section] = config.get(section) or {}
        if not isinstance(config[section], dict):
            raise ModelError(f"{folder.at(_CONFIG)}: {section!r} is not an object")
    return config


def _classes(folder: Folder, config: Mapping[str, Any]) -> int:
    number = config.get("num_classes", config["pretrained_cfg"].get("num_classes"))
    if not isinstance(number, int) or number < 1:
        raise ModelError(
            f"{folder.at(_CONFIG)}: num_classes is {number!r}; a classifier needs a head of at least one class"
        )
    return number


def _labels(folder: Folder, config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    labels = config.get("label_names") or config["pretrained_cfg"].get("label_names")
    if labels is None and classes == 1000:  # as timm itself takes it
        from imgbatch.models.zoo import imagenet_labels

        return imagenet_labels()
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(f"{folder.at(_CONFIG)} has no 'label_names': add the {classes} names in the order of the head")
    if len(labels) != classes:
        raise ModelError(f"{folder.at(_CONFIG)}: {len(labels)} label_names for a head of {classes} classes")
    if len(set(labels)) != classes:
        double = next(label for label in labels if labels.count(label) > 1)
        raise ModelError(f"{folder.at(_CONFIG)}: label {double!r} stands for more than one class")
    return tuple(labels)


def _taxonomy(folder: Folder, labels: tuple[str, ...]) -> Taxonomy | None:
    for name in _TAXONOMIES:
        try:
            content = folder.read(name)
        except NotFound:
            continue
        return read_taxonomy(content, folder.at(name), labels)
    if len(labels) == 1000:
        from imgbatch.models import zoo

        return zoo.imagenet_taxonomy() if labels == zoo.imagenet_labels() else None
    return None


def _preprocess(folder: Folder, config: Mapping[str, Any]) -> Preprocess:
    try:
        return Preprocess.from_timm(config["pretrained_cfg"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder.at(_CONFIG)}: pretrained_cfg does not say how images are prepared: {error!r}"
        ) from error


class _Network:
    """Builds the network of a directory; travels to the actors without the weights."""

    def __init__(self, folder: Folder, config: Mapping[str, Any], classes: int, digest: str) -> None:
        self._folder, self._config, self._classes, self._digest = folder, config, classes, digest

    def __call__(self) -> nn.Module:
        import timm
        from safetensors.torch import load_file

        architecture = self._config["architecture"]
        try:
            # timm writes num_classes in both places
            arguments = {**self._config["model_args"], "num_classes": self._classes}
            net: nn.Module = timm.create_model(architecture, pretrained=False, **arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"{self._folder.uri}: timm cannot make {architecture!r}: {error}") from error
        weights = self._local_weights()
        try:
            net.load_state_dict(load_file(weights))
        except Exception as error:  # safetensors raises one of its own, torch a RuntimeError that lists the tensors
            raise ModelError(
                f"{self._folder.at(_WEIGHTS)} does not fit {architecture!r}: {str(error)[:600]}"
            ) from error
        return net

    def _local_weights(self) -> Path:
        """Return the weights as a file of this node, fetched at most once, and never half written."""
        if is_local(self._folder.uri) and Path(self._folder.uri, _WEIGHTS).is_file():
            path = Path(self._folder.uri, _WEIGHTS)
            self._check(path.read_bytes())
            return path

        def fetch(path: Path) -> None:
            content = self._folder.read(_WEIGHTS)
            self._check(content)
            path.write_bytes(content)

        path = node_cache.once(f"weights-{self._digest}.safetensors", fetch)
        self._check(path.read_bytes())
        return path

    def _check(self, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != self._digest:
            raise ModelError(
                f"{self._folder.at(_WEIGHTS)} is not what it was when the run started: start the run again"
            )

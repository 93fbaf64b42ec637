"""Effects: model directories as timm writes them: `config.json` and `model.safetensors`, in any store.

A directory may also contain a taxonomy, `taxonomy.csv` or `taxonomy.json`. Without one, a model with the labels of ImageNet
has the taxonomy of ImageNet.

A process that builds the network reads the weights from a copy on its node. The first process of the node fetches the copy
and compares it with the digest that the driver computed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import imgbatch
from imgbatch.config.sections import ModelConfig
from imgbatch.errors import ModelError, NotFound, StoreError, TooLarge
from imgbatch.models import builtin, child, description, imagenet, node_cache, self_check
from imgbatch.models.description import AS_GIVEN
from imgbatch.models.label_file import background_hint
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.taxonomy import Taxonomy
from imgbatch.models.taxonomy import read as read_taxonomy
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute, is_local, missing_path
from imgbatch.terminal.plurals import counted

__all__ = ["AS_GIVEN", "Network", "read", "to_files", "write", "write_directory"]

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

_CONFIG, _SAFE = "config.json", "model.safetensors"
_WEIGHTS = (_SAFE, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""The names of files of weights, in timm's order. From files of torch.save only tensors are read."""
_TAXONOMIES = ("taxonomy.csv", "taxonomy.json")
_MAX_CONFIG = 16 << 20  # bytes; 22,000 classes with a description each take 3 MB
_CHECK_S = 600.0


def read(
    uri: str,
    stores: Stores,
    overrides: ModelConfig,
    name: str | None = None,
    *,
    replaces_head: bool = False,
) -> Model:
    """Return the model of a directory after checking its labels, its tensors and its logits for a blank image.

    Args:
        uri: the directory.
        stores: the stores of URIs.
        overrides: labels and preprocessing that replace those of the directory.
        name: the name of the model; None: its URI.
        replaces_head: the head is not used, so that it may be one for sigmoids.

    Raises:
        ModelError: a file is missing or wrong, or labels, head and weights do not agree.
    """
    folder = Folder(stores, absolute(uri))
    where = folder.at(_CONFIG)
    config = description.parse(_read_required(folder, _CONFIG, _MAX_CONFIG), where)
    stated = _stated_preprocessing(folder, config)
    labels = _read_labels(config, overrides, stores, where, name, replaces_head=replaces_head)
    taxonomy = None if overrides.taxonomy else _taxonomy(folder, labels)
    file, weights, digest = _local_weights_of(folder)
    network = {key: config[key] for key in ("architecture", "model_args")} | {"pretrained_cfg": stated}
    task = {"description": network, "overrides": builtin.overrides(overrides), "classes": len(labels)}
    names = {"name": name or folder.uri, "where": where, "weights_name": name or folder.at(file)}
    facts = _check_network(task, {**names, "weights": str(weights)}, digest)
    description.warn_about_assumptions(config, stated, facts, overrides, where)
    for note in facts["notes"]:
        log.info("%s: %s", name or folder.uri, note)
    return Model(
        name=name or folder.uri,
        digest=hashlib.sha256(json.dumps(config, sort_keys=True).encode() + digest.encode()).hexdigest(),
        labels=labels,
        preprocess=Preprocess.from_timm(facts["data"]),
        taxonomy=taxonomy,
        network=Network(folder, config["architecture"], len(labels), facts["arguments"], digest, file),
        features=facts["features"],
        logits=base64.b64decode(facts["logits"]),
    )


def _stated_preprocessing(folder: Folder, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing that `config.json` states, or else that of transformers' file in the directory."""
    stated = description.preprocessing(config, folder.at(_CONFIG))
    if not stated:
        with suppress(NotFound):
            stated = description.from_processor(folder.read(description.PROCESSOR), folder.at(description.PROCESSOR))
    return stated


def _read_labels(
    config: Mapping[str, Any],
    overrides: ModelConfig,
    stores: Stores,
    where: str,
    name: str | None,
    *,
    replaces_head: bool,
) -> tuple[str, ...]:
    """Return one label for each class of the head, which must be a head for a softmax unless it is replaced."""
    classes = description.classes_of(config, where)
    if not replaces_head:
        description.require_softmax(config, where)
    labels = builtin.configured_labels(overrides, stores) or description.labels_of(config, where)
    if len(labels) != classes:
        source = f"model.labels={overrides.labels}" if overrides.labels else where
        raise ModelError(
            f"{source} has {counted(len(labels), 'name')}, and the network has {counted(classes, 'class', 'classes')}: give "
            f"one name per class, in the order of the head{background_hint(labels)}"
        )
    if classes == 1 and not replaces_head:
        raise description.one_class_error(name or where)
    if name is None:
        description.warn_about_similar_labels(labels, overrides.labels or where)
    return labels


def write(folder: Folder, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a directory: first the weights, then `config.json`, whose presence means that the directory is complete."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    folder.put(_SAFE, save(tensors, metadata={"format": "pt"}))
    folder.put(_CONFIG, json.dumps(config, indent=2).encode())


def write_directory(
    folder: Folder, net: nn.Module, labels: Sequence[str], pretrained_cfg: Mapping[str, Any] | None = None
) -> None:
    """Write a network of timm in the form that `read` and timm read.

    Args:
        folder: in any store.
        net: created by `timm.create_model`.
        labels: the names of its classes, in the order of the head.
        pretrained_cfg: the preprocessing where it differs from timm's own for the network: input_size, crop_pct,
            interpolation, mean, std.
    """
    for name, content in to_files(
        net, {"label_names": list(labels), "pretrained_cfg": dict(pretrained_cfg or {})}
    ).items():
        folder.put(name, content)


def to_files(
    net: nn.Module, model_config: Mapping[str, Any], data_config: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Return `model.safetensors` and `config.json` of a network of timm, in the form that timm and transformers read.

    Args:
        net: on the CPU.
        model_config: further content of `config.json`.
        data_config: the preprocessing; None: timm's own for the network.
    """
    import timm

    with tempfile.TemporaryDirectory() as folder:
        # timm writes the arguments of the network itself, so that it can create the same network again.
        timm.models.save_for_hf(
            net, folder, model_config=dict(model_config), data_config=data_config, safe_serialization=True
        )
        files = {name: Path(folder, name).read_bytes() for name in (_SAFE, _CONFIG)}
    config = json.loads(files[_CONFIG])
    config["model_args"].pop("num_classes", None)  # it is also at the top; transformers fails if it is there twice
    return files | {_CONFIG: json.dumps(config, indent=2).encode()}


class WeightsFolder(Protocol):
    """Where workers read the weights."""

    @property
    def uri(self) -> str:
        """The name of the folder."""

    def at(self, name: str) -> str:
        """Return the URI of a name in the folder."""

    def read(self, name: str) -> bytes:
        """Return the content of a file."""


@dataclass(frozen=True, slots=True)
class Network:
    """Builds the network of a directory. It is sent to the actors without the weights."""

    folder: WeightsFolder
    architecture: str
    classes: int
    arguments: Mapping[str, Any]
    digest: str
    """SHA-256 of the file of weights, in hex."""
    file: str = "model.safetensors"
    """The name of the weights in the folder."""

    def __call__(self) -> nn.Module:
        """Return the network with its weights.

        Raises:
            ModelError: the weights do not fit the network, or have changed since the run started.
        """
        from imgbatch.models import architectures, weights

        net = architectures.create(self.architecture, self.classes, self.arguments)
        where = self.folder.at(self.file)
        architectures.load_weights(net, weights.read(self._local_weights(), where)[0], where, self.architecture)
        return net

    @property
    def is_local(self) -> bool:
        """Whether the weights are on a disk of this machine."""
        return is_local(self.folder.uri)

    @contextmanager
    def share_weights(self, folder: Folder) -> Iterator[Network]:
        """Yield the same network with its weights copied to a folder, and delete the copy after the block."""
        folder.put(self.file, self.weights())
        try:
            yield replace(self, folder=folder)
        finally:
            with suppress(StoreError):  # an error of the block is more important
                folder.delete(self.file)

    def weights(self) -> bytes:
        """Return the content of the file of weights."""
        return self._local_weights().read_bytes()

    def _local_weights(self) -> Path:
        """Return the weights as a file of this node, which is fetched at most once and always complete."""
        path = Path(self.folder.uri, self.file)
        if not is_local(self.folder.uri) or not path.is_file():

            def fetch(path: Path) -> None:
                path.write_bytes(self.folder.read(self.file))

            path = node_cache.get_or_make(_cache_name(self.digest), fetch, sha256=self.digest)
        if node_cache.sha256_of(path) != self.digest:
            raise ModelError(f"{self.folder.at(self.file)} has changed since the run started; start the run again")
        return path


def _cache_name(digest: str) -> str:
    return f"weights-{digest}"


def _local_weights_of(folder: Folder) -> tuple[str, Path, str]:
    """Return the name of the weights, a file of this machine with them, and their digest.

    Weights of a store are saved in the node's cache for the actors.
    """
    if is_local(folder.uri):
        for name in _WEIGHTS:
            if (path := Path(folder.uri, name)).is_file():
                return name, path, node_cache.sha256_of(path)
    name, content = _read_weights(folder)
    digest = hashlib.sha256(content).hexdigest()

    def save(path: Path) -> None:
        path.write_bytes(content)

    return name, node_cache.get_or_make(_cache_name(digest), save, sha256=digest), digest


def _read_weights(folder: Folder) -> tuple[str, bytes]:
    """Return name and content of the weights of a directory. Of several files, read the one that timm prefers."""
    for name in _WEIGHTS:
        with suppress(NotFound):
            return name, folder.read(name)
    for name in _WEIGHTS[:2]:
        if folder.exists(f"{name}.index.json"):
            raise ModelError(
                f"{folder.uri}: its weights are in several files (see {name}.index.json): save them in one file"
            )
    return _SAFE, _read_required(folder, _SAFE)


def _read_required(folder: Folder, name: str, limit: int | None = None) -> bytes:
    try:
        return folder.stores.read(folder.at(name), limit)[0]
    except NotFound as error:
        if missing := missing_path(folder.uri):
            raise ModelError(f"no model directory: {missing}") from error
        raise ModelError(
            f"{folder.uri} is not a model directory: it has no {name}. timm.models.save_for_hf writes one. For a state dict "
            "(.safetensors, .pth), give the URI of the file and --set model.architecture=NAME"
        ) from error
    except TooLarge as error:
        raise ModelError(
            f"{folder.at(name)} is larger than {limit:,} bytes: it is not the description of a model"
        ) from error


def _taxonomy(folder: Folder, labels: tuple[str, ...]) -> Taxonomy | None:
    for name in _TAXONOMIES:
        try:
            content = folder.read(name)
        except NotFound:
            continue
        return read_taxonomy(content, folder.at(name), labels)
    return builtin.imagenet_taxonomy() if labels == imagenet.imagenet_labels() else None


def _check_network(task: Mapping[str, Any], arguments: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """Return the result of `pretrained.check_directory`, from a child process once per machine and model.

    Args:
        task: the arguments that the result depends on, besides the weights.
        arguments: the other arguments: the file of weights, and names for messages.
        digest: of the weights.
    """
    parts = [task, digest, imgbatch.__version__, self_check.VERSION]
    parts += [version(package) for package in ("timm", "torch", "torchvision")]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def check(path: Path) -> None:
        path.write_text(json.dumps(child.run_task({**task, **arguments, "task": "check"}, limit_s=_CHECK_S)))

    facts: dict[str, Any] = json.loads(node_cache.get_or_make(f"checked-{key}.json", check).read_text())
    return facts

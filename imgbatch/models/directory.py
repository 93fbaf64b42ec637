"""Effects: model directories as timm writes them: `config.json` and `model.safetensors`, in any store.

Beside them may lie a taxonomy, `taxonomy.csv` or `taxonomy.json`. A directory without one whose labels are ImageNet's own
has ImageNet's.

A process that builds the network reads the weights from a copy on its node, which the first one fetches: once a node,
and checked against the digest that the driver saw.
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
from typing import TYPE_CHECKING, Any

import imgbatch
from imgbatch.config.sections import ModelConfig
from imgbatch.errors import ModelError, NotFound, StoreError, TooLarge
from imgbatch.models import builtin, description, imagenet, node_cache, self_check
from imgbatch.models.child import ask
from imgbatch.models.description import AS_GIVEN
from imgbatch.models.label_file import hint_at_background
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.taxonomy import Taxonomy
from imgbatch.models.taxonomy import read as read_taxonomy
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute, is_local, missing_path
from imgbatch.terminal.plurals import counted

__all__ = ["AS_GIVEN", "Network", "read", "saved", "write", "write_directory"]

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)

_CONFIG, _SAFE = "config.json", "model.safetensors"
_WEIGHTS = (_SAFE, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Under which names weights are looked for, in timm's order. Those of torch.save are read as tensors alone."""
_TAXONOMIES = ("taxonomy.csv", "taxonomy.json")
_MOST_CONFIG = 16 << 20  # bytes; 22,000 classes with a description each take 3 MB
_CHECK_S = 600.0


def read(
    uri: str,
    stores: Stores,
    chosen: ModelConfig,
    name: str | None = None,
    *,
    replaces_head: bool = False,
) -> Model:
    """Return the model of a directory, checked: labels, tensors and the answer to a blank image.

    Args:
        uri: where the directory is.
        stores: where URIs lead to.
        chosen: labels and preprocessing in place of the directory's own.
        name: what the model is called; None: by its URI.
        replaces_head: the head is not used, so that it may be one for sigmoids.

    Raises:
        ModelError: a file is missing, is not what it should be, or labels, head and weights do not agree.
    """
    folder = Folder(stores, absolute(uri))
    where = folder.at(_CONFIG)
    config = description.parse(_required(folder, _CONFIG, _MOST_CONFIG), where)
    stated = description.preprocessing(config, where)
    if not stated:
        with suppress(NotFound):
            stated = description.of_processor(folder.read(description.PROCESSOR), folder.at(description.PROCESSOR))
    classes = description.classes_of(config, where)
    if not replaces_head:
        description.require_softmax(config, where)
    labels = builtin.own_labels(chosen, stores) or description.labels_of(config, where)
    _require_as_many(labels, classes, f"model.labels={chosen.labels}" if chosen.labels else where)
    if classes == 1 and not replaces_head:
        raise description.one_class(name or where)
    if name is None:
        description.warn_of_likeness(labels, chosen.labels or where)
    taxonomy = None if chosen.taxonomy else _taxonomy(folder, labels)
    file, weights, digest = _weights(folder)
    said = {"architecture": config["architecture"], "model_args": config["model_args"], "pretrained_cfg": stated}
    question = {"description": said, "choice": builtin.choice(chosen), "classes": classes}
    about = {"name": name or folder.uri, "weights": str(weights), "called": name or folder.at(file), "where": where}
    found = _checked(question, {**question, **about, "task": "check"}, digest)
    description.say_what_is_assumed(config, stated, found, chosen, where)
    for note in found["notes"]:
        log.info("%s: %s", name or folder.uri, note)
    return Model(
        name=name or folder.uri,
        digest=hashlib.sha256(json.dumps(config, sort_keys=True).encode() + digest.encode()).hexdigest(),
        labels=labels,
        preprocess=Preprocess.from_timm(found["data"]),
        taxonomy=taxonomy,
        network=Network(folder, config["architecture"], classes, found["arguments"], digest, file),
        features=found["features"],
        logits=base64.b64decode(found["logits"]),
    )


def _require_as_many(labels: Sequence[str], classes: int, where: str) -> None:
    if len(labels) != classes:
        hint = hint_at_background(labels)
        raise ModelError(
            f"{where} has {counted(len(labels), 'name')}, and the network has {counted(classes, 'class', 'classes')}: one name "
            f"a class is needed, in the order of the head{hint}"
        )


def write(folder: Folder, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a directory: the weights, and last the `config.json` that makes a directory of them."""
    from safetensors.torch import save

    apart = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    folder.put(_SAFE, save(apart, metadata={"format": "pt"}))
    folder.put(_CONFIG, json.dumps(config, indent=2).encode())


def write_directory(
    folder: Folder, net: nn.Module, labels: Sequence[str], pretrained_cfg: Mapping[str, Any] | None = None
) -> None:
    """Write a network of timm as `read` and timm read it.

    Args:
        folder: in any store.
        net: made by `timm.create_model`.
        labels: the names of its classes, in the order of the head.
        pretrained_cfg: how images were prepared for it, as far as it differs from what timm says of the network:
            input_size, crop_pct, interpolation, mean, std.
    """
    for name, content in saved(
        net, {"label_names": list(labels), "pretrained_cfg": dict(pretrained_cfg or {})}
    ).items():
        folder.put(name, content)


def saved(
    net: nn.Module, model_config: Mapping[str, Any], data_config: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """Return `model.safetensors` and `config.json` of a network of timm, as timm and transformers read them.

    Args:
        net: on the CPU.
        model_config: what `config.json` says besides what timm knows of the network.
        data_config: how images are to be prepared, in place of all that timm knows of that.
    """
    import timm

    with tempfile.TemporaryDirectory() as made:
        # timm itself says how the network was made, so that timm makes it again.
        timm.models.save_for_hf(
            net, made, model_config=dict(model_config), data_config=data_config, safe_serialization=True
        )
        files = {name: Path(made, name).read_bytes() for name in (_SAFE, _CONFIG)}
    config = json.loads(files[_CONFIG])
    config["model_args"].pop("num_classes", None)  # it stands above them, and given twice transformers stumbles over it
    return files | {_CONFIG: json.dumps(config, indent=2).encode()}


@dataclass(frozen=True, slots=True)
class Network:
    """Builds the network of a directory; travels to the actors without the weights."""

    folder: Folder
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
            ModelError: weights and network do not fit, or are not those of the start of the run.
        """
        from imgbatch.models import architectures, weights

        net = architectures.make(self.architecture, self.classes, self.arguments)
        where = self.folder.at(self.file)
        architectures.fill(net, weights.read(self._local_weights(), where)[0], where, self.architecture)
        return net

    @property
    def is_local(self) -> bool:
        """Whether the weights lie on this machine's disk."""
        return is_local(self.folder.uri)

    @contextmanager
    def shared(self, place: Folder) -> Iterator[Network]:
        """Have the same network with its weights copied to the place, for as long as the block lasts."""
        place.put(self.file, self._local_weights().read_bytes())
        try:
            yield replace(self, folder=place)
        finally:
            with suppress(StoreError):  # what went wrong before it is the error to tell
                place.delete(self.file)

    def _local_weights(self) -> Path:
        """Return the weights as a file of this node, fetched at most once, and never half written."""
        path = Path(self.folder.uri, self.file)
        if not is_local(self.folder.uri) or not path.is_file():

            def fetch(path: Path) -> None:
                path.write_bytes(self.folder.read(self.file))

            path = node_cache.once(_cached(self.digest), fetch, sha256=self.digest)
        if node_cache.sha256_of(path) != self.digest:
            raise ModelError(
                f"{self.folder.at(self.file)} is not what it was when the run started: start the run again"
            )
        return path


def _cached(digest: str) -> str:
    return f"weights-{digest}"


def _weights(folder: Folder) -> tuple[str, Path, str]:
    """Return the name of the weights, a file of this machine that holds them, and their digest.

    Those of a store are kept for the actors of this node.
    """
    if is_local(folder.uri):
        for name in _WEIGHTS:
            if (path := Path(folder.uri, name)).is_file():
                return name, path, node_cache.sha256_of(path)
    name, content = _first(folder)
    digest = hashlib.sha256(content).hexdigest()

    def keep(path: Path) -> None:
        path.write_bytes(content)

    return name, node_cache.once(_cached(digest), keep, sha256=digest), digest


def _first(folder: Folder) -> tuple[str, bytes]:
    """Return name and content of the weights of a directory; of several files the one that timm prefers."""
    for name in _WEIGHTS:
        with suppress(NotFound):
            return name, folder.read(name)
    for name in _WEIGHTS[:2]:
        if folder.exists(f"{name}.index.json"):
            raise ModelError(
                f"{folder.uri}: its weights lie in several files, {name}.index.json says: save them as one"
            )
    return _SAFE, _required(folder, _SAFE)


def _required(folder: Folder, name: str, limit: int | None = None) -> bytes:
    try:
        return folder.stores.read(folder.at(name), limit)[0]
    except NotFound as error:
        if missing := missing_path(folder.uri):
            raise ModelError(f"no model directory: {missing}") from error
        raise ModelError(
            f"{folder.uri} is no model directory: it has no {name}. timm writes one with timm.models.save_for_hf; a state "
            "dict (.safetensors, .pth) is given by its own URI, with --set model.architecture=NAME"
        ) from error
    except TooLarge as error:
        raise ModelError(f"{folder.at(name)} is larger than {limit} bytes: that is no model's description") from error


def _taxonomy(folder: Folder, labels: tuple[str, ...]) -> Taxonomy | None:
    for name in _TAXONOMIES:
        try:
            content = folder.read(name)
        except NotFound:
            continue
        return read_taxonomy(content, folder.at(name), labels)
    return builtin.imagenet_taxonomy() if labels == imagenet.imagenet_labels() else None


def _checked(question: Mapping[str, Any], asked: dict[str, Any], digest: str) -> dict[str, Any]:
    """Have the network built and asked, once a machine and model; return what `hubs.check_directory` does.

    Args:
        question: what the answer depends on, besides the weights.
        asked: the same, and how messages call things.
        digest: of the weights.
    """
    made_of = [question, digest, imgbatch.__version__, self_check.VERSION]
    made_of += [version(package) for package in ("timm", "torch", "torchvision")]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]

    def check(path: Path) -> None:
        path.write_text(json.dumps(ask(asked, limit_s=_CHECK_S)))

    found: dict[str, Any] = json.loads(node_cache.once(f"checked-{key}.json", check).read_text())
    return found

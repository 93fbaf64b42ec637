"""Model directories as timm writes them: `config.json` and `model.safetensors`, in any store.

Beside them may lie a taxonomy, `taxonomy.csv` or `taxonomy.json`. A directory without one whose labels are ImageNet's own
has ImageNet's.

A process that builds the network reads the weights from a copy on its node, which the first one fetches: once a node,
and checked against the digest that the driver saw.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgbatch.config import ModelConfig
from imgbatch.errors import ModelError, NotFound, StoreError, TooLarge
from imgbatch.models import Model, child, node_cache, zoo
from imgbatch.preprocess import Preprocess
from imgbatch.storage import Folder, Stores, absolute, is_local
from imgbatch.taxonomy import Taxonomy
from imgbatch.taxonomy import read as read_taxonomy

if TYPE_CHECKING:
    import torch
    from torch import nn

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
AS_GIVEN = "label_names_as_given"
"""Stands in `config.json` if `label_names` are to be shown as they are, WordNet ids too."""
_TAXONOMIES = ("taxonomy.csv", "taxonomy.json")
_MOST_CONFIG = 16 << 20  # bytes; 22,000 classes with a description each take 3 MB
_CHECK_S = 600.0
_TRANSFORMERS = (
    "it was written by transformers for a network of its own; only networks of timm and torchvision are read"
)


def read(
    uri: str, stores: Stores, chosen: ModelConfig, pulse: Callable[[], None] = lambda: None, name: str | None = None
) -> Model:
    """Return the model of a directory, checked: labels, tensors and the answer to a blank image.

    Args:
        uri: where the directory is.
        stores: where URIs lead to.
        chosen: labels, crop and size in place of the directory's own.
        pulse: called while the network is checked.
        name: what the model is called; None: by its URI.

    Raises:
        ModelError: a file is missing, is not what it should be, or labels, head and weights do not agree.
    """
    folder = Folder(stores, absolute(uri))
    config = _config(folder)
    weights, digest = _weights(folder)
    labels = zoo.own_labels(chosen, stores) or _labels(folder, config)
    classes = _classes(folder, config)
    if len(labels) != classes:
        where = chosen.labels or folder.at(_CONFIG)
        raise ModelError(f"{where}: {len(labels)} label_names for a head of {classes} classes")
    network = Network(folder, config["architecture"], classes, config["model_args"], digest)
    preprocess, taxonomy = _preprocess(folder, config, chosen), _taxonomy(folder, labels)
    return Model(
        name=name or folder.uri,
        digest=hashlib.sha256(json.dumps(config, sort_keys=True).encode() + digest.encode()).hexdigest(),
        labels=labels,
        preprocess=preprocess,
        taxonomy=taxonomy,
        network=network,
        features=_checked(network, weights, preprocess, name or folder.uri, pulse),
    )


def write(folder: Folder, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a directory: the weights, and last the `config.json` that makes a directory of them."""
    from safetensors.torch import save

    apart = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    folder.put(_WEIGHTS, save(apart, metadata={"format": "pt"}))
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
        files = {name: Path(made, name).read_bytes() for name in (_WEIGHTS, _CONFIG)}
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

    def __call__(self) -> nn.Module:
        """Return the network with its weights.

        Raises:
            ModelError: weights and network do not fit, or are not those of the start of the run.
        """
        from imgbatch.models import networks

        net = networks.make(self.architecture, self.classes, self.arguments)
        where = self.folder.at(_WEIGHTS)
        networks.fill(net, networks.read_state(self._local_weights(), where), where, self.architecture)
        return net

    @property
    def is_local(self) -> bool:
        """Whether the weights lie on this machine's disk."""
        return is_local(self.folder.uri)

    @contextmanager
    def shared(self, place: Folder) -> Iterator[Network]:
        """Have the same network with its weights copied to the place, for as long as the block lasts."""
        place.put(_WEIGHTS, self._local_weights().read_bytes())
        try:
            yield replace(self, folder=place)
        finally:
            with suppress(StoreError):  # what went wrong before it is the error to tell
                place.delete(_WEIGHTS)

    def _local_weights(self) -> Path:
        """Return the weights as a file of this node, fetched at most once, and never half written."""
        path = Path(self.folder.uri, _WEIGHTS)
        if not is_local(self.folder.uri) or not path.is_file():
            path = node_cache.once(_cached(self.digest), lambda path: _copy(self.folder, path))
        if _sha256(path) != self.digest:
            raise ModelError(f"{self.folder.at(_WEIGHTS)} is not what it was when the run started: start the run again")
        return path


def _cached(digest: str) -> str:
    return f"weights-{digest}.safetensors"


def _copy(folder: Folder, path: Path) -> None:
    path.write_bytes(folder.read(_WEIGHTS))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights(folder: Folder) -> tuple[Path, str]:
    """Return a file of this machine with the weights, and its digest; a store's are kept for the actors of this node."""
    if is_local(folder.uri) and (path := Path(folder.uri, _WEIGHTS)).is_file():
        return path, _sha256(path)
    content = _required(folder, _WEIGHTS)
    digest = hashlib.sha256(content).hexdigest()

    def keep(path: Path) -> None:
        path.write_bytes(content)

    return node_cache.once(_cached(digest), keep), digest


def _required(folder: Folder, name: str, limit: int | None = None) -> bytes:
    try:
        return folder.stores.read(folder.at(name), limit)[0]
    except NotFound as error:
        raise ModelError(
            f"{folder.uri} is no model directory: it has no {name}. timm writes one with timm.models.save_for_hf; a state "
            "dict (.safetensors, .pth) is given by its own URI, with --set model.architecture=NAME"
        ) from error
    except TooLarge as error:
        raise ModelError(f"{folder.at(name)} is larger than {limit} bytes: that is no model's description") from error


def _config(folder: Folder) -> dict[str, Any]:
    try:
        config = json.loads(_required(folder, _CONFIG, _MOST_CONFIG))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder.at(_CONFIG)} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        why = f": {_TRANSFORMERS}" if isinstance(config, dict) and "architectures" in config else ""
        raise ModelError(f"{folder.at(_CONFIG)} names no 'architecture'{why}")
    for section in ("pretrained_cfg", "model_args"):
        config[section] = config.get(section) or {}
        if not isinstance(config[section], dict):
            raise ModelError(f"{folder.at(_CONFIG)}: {section!r} is not an object")
    config["model_args"].pop("num_classes", None)  # which timm writes there as well
    for said in (config, config["pretrained_cfg"]):
        if "multi_label" in str(said.get("problem_type")):
            raise ModelError(
                f"{folder.uri} gives several labels to an image (problem_type): only one a picture is given"
            )
    return config


def _classes(folder: Folder, config: Mapping[str, Any]) -> int:
    number = config.get("num_classes", config["pretrained_cfg"].get("num_classes"))
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ModelError(
            f"{folder.at(_CONFIG)}: num_classes is {number!r}; a classifier needs a head of at least one class"
        )
    return number


def _labels(folder: Folder, config: Mapping[str, Any]) -> tuple[str, ...]:
    labels = config.get("label_names") or config["pretrained_cfg"].get("label_names")
    classes = _classes(folder, config)
    if labels is None and classes == 1000:  # as timm itself takes it
        return zoo.imagenet_labels()
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(
            f"{folder.at(_CONFIG)} has no 'label_names': add the {classes} names in the order of the head, or give a file "
            "with one a line as --set model.labels=URI"
        )
    # What somebody called classes while training stays; a hub's WordNet ids become words.
    return zoo.unique(tuple(labels) if config.get(AS_GIVEN) else zoo.readable(labels), folder.at(_CONFIG))


def _taxonomy(folder: Folder, labels: tuple[str, ...]) -> Taxonomy | None:
    for name in _TAXONOMIES:
        try:
            content = folder.read(name)
        except NotFound:
            continue
        return read_taxonomy(content, folder.at(name), labels)
    return zoo.imagenet_taxonomy() if labels == zoo.imagenet_labels() else None


def _preprocess(folder: Folder, config: Mapping[str, Any], chosen: ModelConfig) -> Preprocess:
    try:
        return Preprocess.from_timm(zoo.with_choice(config["pretrained_cfg"], chosen))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder.at(_CONFIG)}: pretrained_cfg does not say how images are prepared: {error!r}"
        ) from error


def _checked(
    network: Network, weights: Path, preprocess: Preprocess, name: str, pulse: Callable[[], None]
) -> int | None:
    """Have the network built and asked, once a machine and model; return how many features its head sees."""
    question = {
        "architecture": network.architecture,
        "classes": network.classes,
        "arguments": network.arguments,
        "size": [preprocess.height, preprocess.width],
    }
    made_of = [question, network.digest, *(version(package) for package in ("timm", "torch", "torchvision"))]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]

    def check(path: Path) -> None:
        asked = {"task": "check", "name": name, "weights": str(weights), **question}
        path.write_text(json.dumps(child.ask(asked, limit_s=_CHECK_S, pulse=pulse)))

    found = json.loads(node_cache.once(f"checked-{key}.json", check).read_text())["features"]
    return None if found is None else int(found)

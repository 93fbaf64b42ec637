"""Small networks with random weights, model directories of them, and how they are loaded in tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from imgbatch.config.sections import StorageConfig
from imgbatch.models import directory
from imgbatch.models.model import Model
from imgbatch.storage.stores import Folder, Stores

LABELS = ("a", "b", "c")
STORES = Stores(StorageConfig(), {})
BLANK = torch.rand((2, 3, 160, 160), generator=torch.Generator().manual_seed(0))

Load = Callable[..., Model]


def tiny(classes: int = 3, name: str = "test_resnet") -> nn.Module:
    """Return a small network of timm with random weights."""
    torch.manual_seed(classes)
    net: nn.Module = timm.create_model(name, num_classes=classes).eval()
    return net


def logits(net: nn.Module) -> torch.Tensor:
    """Return what a network answers."""
    with torch.inference_mode():
        answer: torch.Tensor = net(BLANK)
    return answer


def require_same_network(left: nn.Module, right: nn.Module) -> None:
    """Require that two networks give the same numbers, and that these are no zeros."""
    assert torch.equal(logits(left.eval()), logits(right.eval()))
    assert logits(left).std() > 0


def write(path: Path, net: nn.Module, labels: Sequence[str] = LABELS) -> Path:
    """Write a model directory on the disk."""
    directory.write_directory(Folder(STORES, str(path)), net, labels)
    return path

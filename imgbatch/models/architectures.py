"""Values: networks of timm and torchvision by name, and state dicts loaded into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from imgbatch.errors import ModelError, did_you_mean
from imgbatch.models import weights
from imgbatch.models.preprocess import ONE_CHANNEL
from imgbatch.models.weights import State

TORCHVISION = "torchvision:"
"""The prefix of architectures of torchvision; all others are of timm."""

# Arguments of timm.create_model that would fetch or load something. A model directory may not set them.
_FORBIDDEN_ARGUMENTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_SHOWN = 5


def create(architecture: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the network with random weights and a head of `classes`.

    Raises:
        ModelError: the network does not exist, or cannot be created with these arguments.
    """
    if forbidden := sorted(_FORBIDDEN_ARGUMENTS & arguments.keys()):
        raise ModelError(
            f"model_args of {architecture!r} may not have {', '.join(forbidden)}: remove the arguments that load files"
        )
    require_known(architecture)
    arguments = {**arguments, "num_classes": classes}  # timm writes num_classes in both places
    try:
        if architecture.startswith(TORCHVISION):
            import torchvision

            net: nn.Module = torchvision.models.get_model(architecture.removeprefix(TORCHVISION), **arguments)
        else:
            net = timm.create_model(architecture, pretrained=False, **arguments)
    except Exception as error:  # networks raise any error for wrong arguments
        raise ModelError(
            f"cannot create {architecture!r} with {arguments}: {str(error)[:300] or repr(error)}"
        ) from error
    return net.eval()


def require_known(architecture: str) -> None:
    """Raise ModelError if the library has no network of that name. The message suggests a similar one."""
    name = architecture.removeprefix(TORCHVISION)
    if architecture.startswith(TORCHVISION):
        import torchvision

        available, library = torchvision.models.list_models(module=torchvision.models), "torchvision"
    else:
        available, library = timm.list_models(), "timm"
        if "." not in name and timm.is_model(name):  # old names that timm accepts but does not list
            return
    if name not in available:
        raise ModelError(f"{library} has no network {name!r}{did_you_mean(name, available)}")


def load_weights(net: nn.Module, state: State, where: str, architecture: str) -> list[str]:
    """Load a state dict into the network; return notes about changes of its names.

    Raises:
        ModelError: tensors are missing, left over, or of another shape. The message names them.
    """
    state, notes = weights.match_names(net, state)
    expected = net.state_dict()
    reshaped = [name for name, value in expected.items() if name in state and state[name].shape != value.shape]
    missing, surplus = weights.differing_names(net, state)
    wrong = {
        "missing": missing,
        "left over": surplus,
        "of another shape": [
            f"{name} is {_shape(state[name])} instead of {_shape(expected[name])}" for name in reshaped
        ],
    }
    problems = [f"{len(names)} {kind}: {_shortened(names)}" for kind, names in wrong.items() if names]
    if problems:
        grey = any(state[name].ndim == 4 == expected[name].ndim and state[name].shape[1] == 1 for name in reshaped[:1])
        hint = f". {ONE_CHANNEL}" if grey and expected[reshaped[0]].shape[1] == 3 else ""
        raise ModelError(f"{where} does not fit {architecture!r}: {'; '.join(problems)}{hint}")
    # Not strict: buffers that have no effect at inference may be missing, and keep their initial values.
    net.load_state_dict({name: value for name, value in state.items() if name in expected}, strict=False)
    return notes


def classes_of(net: nn.Module, state: State, number: int) -> int | None:
    """Return the number of classes of a state dict if that is the only difference to the network; else None.

    Args:
        number: the number of classes of the network.
    """
    expected, named = net.state_dict(), weights.match_names(net, state)[0]
    if weights.differing_names(net, named) != ([], []):
        return None
    reshaped = [name for name, value in expected.items() if name in named and named[name].shape != value.shape]
    counts = {named[name].shape[0] if named[name].ndim else 0 for name in reshaped}
    of_head = all(
        expected[name].shape[:1] == (number,) and named[name].shape[1:] == expected[name].shape[1:] for name in reshaped
    )
    return int(counts.pop()) if of_head and len(counts) == 1 else None


def find_head(net: nn.Module, classes: int) -> nn.Linear | nn.Conv2d | None:
    """Return the layer that computes the logits; None if there is no such single layer."""
    named = getattr(net, "get_classifier", lambda: None)()
    layers = [named] if isinstance(named, nn.Linear | nn.Conv2d) else [*net.modules()]
    head = None
    for layer in layers:
        if classes == (getattr(layer, "out_features", None) or getattr(layer, "out_channels", None)):
            head = layer if isinstance(layer, nn.Linear | nn.Conv2d) else head
    return head


def require_logits(net: nn.Module, name: str, classes: int, blank: torch.Tensor) -> None:
    """Raise if the network does not return one finite logit per label for a blank image.

    Raises:
        ModelError: with the actual output.
    """
    side = "x".join(map(str, blank.shape[2:]))
    try:
        with torch.inference_mode():
            logits = net(blank)
    except Exception as error:  # networks raise any error for an unsupported size
        raise ModelError(
            f"{name} does not accept images of {side}: {str(error)[:300]} (see model.image_size)"
        ) from error
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, classes):
        raise ModelError(f"{name}: {shape[1:]} logits for {classes} labels")
    if not torch.isfinite(logits).all():
        raise ModelError(f"{name}: the logits of a blank image are not finite: the weights are damaged")


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _shortened(names: list[str]) -> str:
    suffix = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + suffix

"""Values: networks of timm and torchvision by their names, filled with state dicts that fit or are refused tensor by tensor."""

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
"""Prefix of an architecture that is torchvision's; all others are timm's."""

# Arguments of timm.create_model that would fetch or load something; a model directory has no business with them.
_NOT_OF_THE_NETWORK = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_SHOWN = 5


def make(architecture: str, classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the network with random weights and a head of `classes`.

    Raises:
        ModelError: there is no such network, or it cannot be made so.
    """
    if wrong := sorted(_NOT_OF_THE_NETWORK & arguments.keys()):
        raise ModelError(f"model_args of {architecture!r} may not have {', '.join(wrong)}: they load something else")
    require_known(architecture)
    arguments = {**arguments, "num_classes": classes}  # timm writes num_classes in both places
    try:
        if architecture.startswith(TORCHVISION):
            import torchvision

            net: nn.Module = torchvision.models.get_model(architecture.removeprefix(TORCHVISION), **arguments)
        else:
            net = timm.create_model(architecture, pretrained=False, **arguments)
    except Exception as error:  # whatever a network makes of arguments that it does not like
        raise ModelError(f"cannot make {architecture!r} with {arguments}: {str(error)[:300] or repr(error)}") from error
    return net.eval()


def require_known(architecture: str) -> None:
    """Raise ModelError if neither library has a network of that name; the message names the nearest."""
    name = architecture.removeprefix(TORCHVISION)
    if architecture.startswith(TORCHVISION):
        import torchvision

        known, library = torchvision.models.list_models(module=torchvision.models), "torchvision"
    else:
        known, library = timm.list_models(), "timm"
        if "." not in name and timm.is_model(name):  # also the names that timm no longer lists
            return
    if name not in known:
        raise ModelError(f"{library} has no network {name!r}{did_you_mean(name, known)}")


def fill(net: nn.Module, state: State, where: str, architecture: str) -> list[str]:
    """Load the tensors into the network; return notes of what was done so that their names fit.

    Raises:
        ModelError: naming those that are missing, left over, or of another shape.
    """
    state, notes = weights.fitted(net, state)
    wanted = net.state_dict()
    unlike = [name for name, value in wanted.items() if name in state and state[name].shape != value.shape]
    missing, surplus = weights.unlike(net, state)
    wrong = {
        "missing": missing,
        "left over": surplus,
        "of another shape": [f"{name} is {_shape(state[name])} instead of {_shape(wanted[name])}" for name in unlike],
    }
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in wrong.items() if names]
    if found:
        grey = any(state[name].ndim == 4 == wanted[name].ndim and state[name].shape[1] == 1 for name in unlike[:1])
        hint = f". {ONE_CHANNEL}" if grey and wanted[unlike[0]].shape[1] == 3 else ""
        raise ModelError(f"{where} does not fit {architecture!r}: {'; '.join(found)}{hint}")
    # Not strict: buffers that do not matter at inference keep the values that they were made with.
    net.load_state_dict({name: value for name, value in state.items() if name in wanted}, strict=False)
    return notes


def classes_of(net: nn.Module, state: State, number: int) -> int | None:
    """Return how many classes a state dict has, if that alone keeps it from fitting; None: something else does.

    Args:
        number: the classes of the network.
    """
    wanted, named = net.state_dict(), weights.fitted(net, state)[0]
    if weights.unlike(net, named) != ([], []):
        return None
    unlike = [name for name, value in wanted.items() if name in named and named[name].shape != value.shape]
    counts = {named[name].shape[0] if named[name].ndim else 0 for name in unlike}
    of_head = all(
        wanted[name].shape[:1] == (number,) and named[name].shape[1:] == wanted[name].shape[1:] for name in unlike
    )
    return int(counts.pop()) if of_head and len(counts) == 1 else None


def head(net: nn.Module, classes: int) -> nn.Linear | nn.Conv2d | None:
    """Return the layer that makes the logits, None where no single layer does."""
    named = getattr(net, "get_classifier", lambda: None)()
    layers = [named] if isinstance(named, nn.Linear | nn.Conv2d) else [*net.modules()]
    found = None
    for layer in layers:
        if classes == (getattr(layer, "out_features", None) or getattr(layer, "out_channels", None)):
            found = layer if isinstance(layer, nn.Linear | nn.Conv2d) else found
    return found


def check(net: nn.Module, name: str, classes: int, blank: torch.Tensor) -> None:
    """Refuse a network that does not answer a blank image with one finite score for each label.

    Raises:
        ModelError: saying what it answers.
    """
    side = "x".join(map(str, blank.shape[2:]))
    try:
        with torch.inference_mode():
            logits = net(blank)
    except Exception as error:  # whatever a network makes of a size that it does not like
        raise ModelError(f"{name} takes no images of {side}: {str(error)[:300]} (see model.image_size)") from error
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, classes):
        raise ModelError(f"{name}: {shape[1:]} logits for {classes} labels")
    if not torch.isfinite(logits).all():
        raise ModelError(f"{name}: the answer to a blank image is not finite: the weights are damaged")


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

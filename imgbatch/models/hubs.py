"""The public zoos: a network of timm or torchvision becomes a model directory, with its weights, labels and preprocessing.

Weights come from the hubs, through the libraries' own caches (HF_HOME, TORCH_HOME), or from a state dict of one's own.
Runs in a process of its own (see `child`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from imgbatch.config import StorageConfig
from imgbatch.errors import ModelError
from imgbatch.models import directory, networks, zoo
from imgbatch.models.networks import TORCHVISION, nearest
from imgbatch.storage import Folder, Stores

# Networks that torchvision makes otherwise for its weights than without them.
_ADAPTED = ("inception_v3", "googlenet")
_REMEDY = (
    "On a machine without internet fill the cache ({cache}) on one that has it, give a state dict with "
    "--set model.weights=URI, or a model directory as --model URI"
)


def make_directory(
    name: str, architecture: str, weights: str | None, labels: list[str] | None, path: str
) -> dict[str, Any]:
    """Write the model directory of a zoo's network into the folder `path`; return {"name": its full name}.

    Args:
        name: what messages call it.
        architecture: `timm:NAME[.TAG]` or `torchvision:NAME[@WEIGHTS]`.
        weights: a local state dict in place of the zoo's weights.
        labels: the names of the classes; None: the zoo's own.

    Raises:
        ModelError: there is no such network, its weights cannot be had, or they do not fit.
    """
    make = _of_torchvision if architecture.startswith(TORCHVISION) else _of_timm
    state = networks.read_state(Path(weights), name) if weights else None
    folder = Folder(Stores(StorageConfig(), {}), path)
    return {"name": make(folder, name, architecture.removeprefix("timm:"), state, labels)}


def check_directory(
    name: str, architecture: str, classes: int, arguments: dict[str, Any], weights: str, size: list[int]
) -> dict[str, Any]:
    """Build the network of a directory and show it a blank image; return {"features": width of what its head sees}.

    Raises:
        ModelError: keys, shapes or labels do not fit, or the answer is not finite.
    """
    net = networks.make(architecture, classes, arguments)
    networks.fill(net, networks.read_state(Path(weights), name), name, architecture)
    networks.check(net, name, classes, torch.zeros((1, 3, *size)))
    head = networks.head(net, classes)
    return {"features": None if head is None else head.weight.shape[1]}


def _of_timm(
    folder: Folder, name: str, architecture: str, state: networks.State | None, labels: list[str] | None
) -> str:
    plain, _, tag = architecture.partition(".")
    networks.require_known(plain)
    tags = [each.partition(".")[2] for each in timm.list_models(f"{plain}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ModelError(f"timm has no weights {tag!r} for {plain!r}{nearest(tag, tags)}; it has: {', '.join(tags)}")
    known = timm.get_pretrained_cfg(architecture)
    if known is None or (state is None and not known.has_weights):
        raise ModelError(f"timm has no weights for {plain!r}: give yours with --set model.weights=URI")
    if state is None:
        if not known.num_classes:
            raise ModelError(f"{name} gives features, not classes: it has no head, and cannot label")
        try:
            net = timm.create_model(architecture, pretrained=True)
        except Exception as error:  # of the hub's client, its HTTP library, the network, or a torn file
            raise _not_there(name, f"https://huggingface.co/{known.hf_hub_id}", "HF_HOME", error) from error
        names = labels or zoo.labels_of(known.num_classes, known.label_names)
    else:
        names = labels or zoo.labels_of(known.num_classes or 0, None)
        net = timm.create_model(architecture, pretrained=False, num_classes=len(names))
        networks.fill(net, state, name, architecture)
    _require_as_many(name, net.num_classes, names)
    directory.write_directory(folder, net, names)
    return f"timm:{plain}.{known.tag}" if known.tag else f"timm:{plain}"


def _of_torchvision(
    folder: Folder, name: str, architecture: str, state: networks.State | None, labels: list[str] | None
) -> str:
    plain, _, chosen = architecture.removeprefix(TORCHVISION).partition("@")
    networks.require_known(f"{TORCHVISION}{plain}")
    entries = torchvision.models.get_model_weights(plain)
    if chosen and chosen not in entries.__members__:
        there = ", ".join(entries.__members__)
        raise ModelError(
            f"torchvision has no weights {chosen!r} for {plain!r}{nearest(chosen, entries.__members__)}; it has: {there}"
        )
    entry = entries[chosen] if chosen else entries.DEFAULT
    if state is None:
        try:
            state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
        except Exception as error:  # of the network, or a torn file
            raise _not_there(name, entry.url, "TORCH_HOME", error) from error
        state = networks.with_todays_names(state)
    names = labels or list(zoo.labels_of(1000, None))
    arguments: dict[str, Any] = {}
    if plain in _ADAPTED:
        auxiliary = any(key.startswith(("AuxLogits.", "aux1.")) for key in state)
        arguments = {"transform_input": True, "aux_logits": auxiliary, "init_weights": False}
    net = networks.make(f"{TORCHVISION}{plain}", len(names), arguments)
    networks.fill(net, state, name, f"{TORCHVISION}{plain}")
    config = {
        "architecture": f"{TORCHVISION}{plain}",
        "num_classes": len(names),
        "label_names": names,
        "pretrained_cfg": _as_timm_says_it(entry.transforms()),
        "model_args": arguments,
    }
    directory.write(folder, net.state_dict(), config)
    return f"{TORCHVISION}{plain}@{entry.name}"


def _as_timm_says_it(transform: Any) -> Mapping[str, Any]:
    """Return torchvision's preset for classification as timm's `pretrained_cfg`."""
    (crop,), (side,) = transform.crop_size, transform.resize_size
    ratio = crop / side
    if math.floor(crop / ratio) != side:  # timm rounds down, and 1 / (1 / x) may be a little less than x
        ratio = crop / (side + 0.5)
    return {
        "input_size": [3, crop, crop],
        "crop_pct": ratio,
        "crop_mode": "center",
        "interpolation": transform.interpolation.value,
        "mean": list(transform.mean),
        "std": list(transform.std),
    }


def _require_as_many(name: str, classes: int, labels: Any) -> None:
    if len(labels) != classes:
        raise ModelError(f"{name}: {len(labels)} labels for a head of {classes} classes")


def _not_there(name: str, place: str, cache: str, error: Exception) -> ModelError:
    said = (str(error).strip() or repr(error)).splitlines()[0][:300]
    return ModelError(f"the weights of {name} cannot be had from {place}: {said}. {_REMEDY.format(cache=cache)}")

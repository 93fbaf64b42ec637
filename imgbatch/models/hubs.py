"""The public zoos: a network of timm or torchvision becomes a model directory, with its weights, labels and preprocessing.

Weights come from the hubs, through the libraries' own caches (HF_HOME, TORCH_HOME), or from a state dict of one's own.
Runs in a process of its own (see `child`).
"""

from __future__ import annotations

import base64
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models._hub import load_model_config_from_path

from imgbatch.config import ModelConfig, StorageConfig
from imgbatch.errors import ModelError
from imgbatch.models import directory, networks, selfcheck, zoo
from imgbatch.models import weights as files
from imgbatch.models.label_file import hint_at_background
from imgbatch.models.networks import TORCHVISION, nearest
from imgbatch.preprocess import Preprocess
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
    """Write the model directory of a zoo's network into the folder `path`; return {"name": its full name, "notes": …}.

    Args:
        name: what messages call it.
        architecture: `timm:NAME[.TAG]` or `torchvision:NAME[@WEIGHTS]`.
        weights: a local state dict in place of the zoo's weights.
        labels: the names of the classes; None: the zoo's own.

    Raises:
        ModelError: there is no such network, its weights cannot be had, or they do not fit.
    """
    make = _of_torchvision if architecture.startswith(TORCHVISION) else _of_timm
    state, notes = files.read(Path(weights), name) if weights else (None, [])
    folder = Folder(Stores(StorageConfig(), {}), path)
    full, more = make(folder, name, architecture.removeprefix("timm:"), state, labels)
    return {"name": full, "notes": notes + more}


def check_directory(
    name: str,
    where: str,
    description: dict[str, Any],
    choice: dict[str, Any],
    classes: int,
    weights: str,
    called: str,
) -> dict[str, Any]:
    """Build the network of a directory and show it a blank image; return what `resolve` does, "features" and "notes".

    "features" is the width of what its head sees, "notes" say what was done so that the weights fit.

    Args:
        where: names the description in messages.
        description: `architecture`, `model_args`, and the keys of preprocessing as `pretrained_cfg`.
        choice: what the config says of preprocessing.
        weights: a file of this machine.
        called: names it in messages.

    Raises:
        ModelError: keys, shapes or labels do not fit, or the answer is not finite.
    """
    architecture = description["architecture"]
    networks.require_known(architecture)
    found = resolve(description, choice, where)
    size = Preprocess.from_timm(found["data"])
    net = networks.make(architecture, classes, found["arguments"])
    state, notes = files.read(Path(weights), called)
    notes += networks.fill(net, state, called, architecture)
    networks.check(net, name, classes, torch.zeros((1, 3, size.height, size.width)))
    head = networks.head(net, classes)
    features = None if head is None else head.weight.shape[1]
    return {**found, "features": features, "notes": notes, "logits": _reference(net, size)}


def reference_of(name: str, choice: dict[str, Any]) -> dict[str, Any]:
    """Return {"logits": …}, the reference of the workers' check, of a model that needs no hub.

    Args:
        choice: what the config says of preprocessing.
    """
    model = zoo.MODELS[name](ModelConfig(name=name), lambda: None)
    size = Preprocess.from_timm({**zoo.LITE0_CFG, **choice})
    return {"logits": _reference(model.network(), size)}


def _reference(net: torch.nn.Module, size: Preprocess) -> str:
    """Return the logits of the fixed images of `selfcheck` in 32 bits, as base64."""
    pixels = torch.from_numpy(selfcheck.pixels(size.height, size.width)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (size.mean, size.std))
    with torch.inference_mode():
        logits = net.eval()((pixels.float() / 255 - mean) / std)
    return base64.b64encode(selfcheck.packed(logits.float().numpy())).decode()


def resolve(description: dict[str, Any], choice: dict[str, Any], where: str) -> dict[str, Any]:
    """Return what timm makes of a description: "data", "arguments" of the network, and "registered".

    "registered" is how images are prepared for timm's own weights of the network; None: it has none.

    Raises:
        ModelError: it does not say how images are prepared, or asks for what cannot be had here.
    """
    try:
        with tempfile.TemporaryDirectory() as place:
            Path(place, "config.json").write_text(json.dumps(description))
            stated, name, arguments = load_model_config_from_path(place)
        known = timm.models.resolve_pretrained_cfg(name, stated).to_dict()
        data = timm.data.resolve_data_config(args=choice, pretrained_cfg=known)
        Preprocess.from_timm(data)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    except Exception as error:  # whatever timm makes of values that it does not expect
        raise ModelError(f"{where} does not say how images are prepared: {error!r}") from error
    if known.get("fixed_input_size") and "input_size" in description["pretrained_cfg"]:
        arguments = {"img_size": list(known["input_size"][1:]), **arguments}  # as timm passes it
    own = None if name.startswith(TORCHVISION) else timm.get_pretrained_cfg(name, allow_unregistered=True)
    keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    return {
        "data": data,
        "arguments": arguments,
        "registered": None if own is None else {key: getattr(own, key) for key in keys},
    }


def _of_timm(
    folder: Folder, name: str, architecture: str, state: files.State | None, labels: list[str] | None
) -> tuple[str, list[str]]:
    plain, _, tag = architecture.partition(".")
    networks.require_known(plain)
    tags = [each.partition(".")[2] for each in timm.list_models(f"{plain}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ModelError(f"timm has no weights {tag!r} for {plain!r}{nearest(tag, tags)}; it has: {', '.join(tags)}")
    known = timm.get_pretrained_cfg(architecture)
    if known is None or (state is None and not known.has_weights):
        raise ModelError(f"timm has no weights for {plain!r}: give yours with --set model.weights=URI")
    notes: list[str] = []
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
        notes = _filled(net, state, name, architecture, labels)
    _require_as_many(name, net.num_classes, names)
    directory.write_directory(folder, net, names)
    return (f"timm:{plain}.{known.tag}" if known.tag else f"timm:{plain}"), notes


def _of_torchvision(
    folder: Folder, name: str, architecture: str, state: files.State | None, labels: list[str] | None
) -> tuple[str, list[str]]:
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
        state = files.with_todays_names(state)
    names = labels or list(zoo.labels_of(1000, None))
    arguments: dict[str, Any] = {}
    if plain in _ADAPTED:
        auxiliary = any(key.startswith(("AuxLogits.", "aux1.")) for key in state)
        arguments = {"transform_input": True, "aux_logits": auxiliary, "init_weights": False}
    net = networks.make(f"{TORCHVISION}{plain}", len(names), arguments)
    notes = _filled(net, state, name, f"{TORCHVISION}{plain}", labels)
    config = {
        "architecture": f"{TORCHVISION}{plain}",
        "num_classes": len(names),
        "label_names": names,
        "pretrained_cfg": _as_timm_says_it(entry.transforms()),
        "model_args": arguments,
    }
    directory.write(folder, net.state_dict(), config)
    return f"{TORCHVISION}{plain}@{entry.name}", notes


def _filled(
    net: torch.nn.Module, state: files.State, name: str, architecture: str, labels: list[str] | None
) -> list[str]:
    """Load a state dict into a network whose head is made for so many labels; return notes."""
    try:
        return networks.fill(net, state, name, architecture)
    except ModelError as error:
        if not labels or "of another shape" not in str(error):
            raise
        raise ModelError(
            f"{error}; the head is made for the {len(labels)} names of model.labels{hint_at_background(labels)}"
        ) from error


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

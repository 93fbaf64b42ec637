"""Effects: model directories made from networks of timm or torchvision, with weights, labels and preprocessing.

Weights come from the hubs, through the libraries' own caches (HF_HOME, TORCH_HOME), or from a state dict of the user.
This module runs in a child process (see `child`).
"""

from __future__ import annotations

import base64
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import try_to_load_from_cache
from timm.models._hub import load_model_config_from_path

from imgbatch.config.sections import ModelConfig, StorageConfig
from imgbatch.errors import ModelError, did_you_mean
from imgbatch.models import architectures, builtin, directory, imagenet, self_check
from imgbatch.models import weights as files
from imgbatch.models.architectures import TORCHVISION
from imgbatch.models.label_file import background_hint
from imgbatch.models.preprocess import Preprocess
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal.plurals import counted

# Networks that torchvision creates with other arguments for its weights than without weights.
_ADAPTED = ("inception_v3", "googlenet")
_REMEDY = (
    "Without internet, copy a filled cache ({cache}) to this machine, or give a state dict with --set model.weights=URI or a "
    "model directory with --model URI"
)


@dataclass(frozen=True, slots=True)
class StateDict:
    """A state dict that replaces the zoo's weights."""

    state: files.State
    where: str
    """Its name in messages."""


@dataclass(frozen=True, slots=True)
class ClassNames:
    """The names of the classes."""

    labels: list[str] | None
    """None: the names of the zoo."""
    where: str
    """The name of their file in messages."""

    def require(self, number: int, classes: int, network: str) -> None:
        """Raise unless the number of names is the number of classes.

        Raises:
            ModelError: with the file and both numbers.
        """
        if number == classes:
            return
        if self.labels is None:
            raise ModelError(
                f"{network} has {counted(classes, 'class', 'classes')}, and its zoo names {number:,}: give the names with "
                "--set model.labels=URI, one per line"
            )
        raise ModelError(
            f"{self.where} has {counted(number, 'name')}, and {network} has {counted(classes, 'class', 'classes')}: give "
            f"one name per class, in the order of the head{background_hint(self.labels)}"
        )


def make_directory(
    name: str,
    architecture: str,
    weights: str | None,
    labels: list[str] | None,
    path: str,
    weights_from: str | None = None,
    labels_from: str = "model.labels",
) -> dict[str, Any]:
    """Write the model directory of a zoo's network into the folder `path`; return {"name": its full name, "notes": …}.

    Args:
        name: the name of the network in messages.
        architecture: `timm:NAME[.TAG]` or `torchvision:NAME[@WEIGHTS]`.
        weights: a local state dict that replaces the zoo's weights.
        labels: the names of the classes; None: the zoo's own.
        weights_from: the name of the state dict in messages; None: `weights`.
        labels_from: the name of the file of labels in messages.

    Raises:
        ModelError: the network or its weights are not available, or the weights do not fit.
    """
    make = _make_from_torchvision if architecture.startswith(TORCHVISION) else _make_from_timm
    state_dict = None
    notes: list[str] = []
    if weights:
        state, notes = files.read(Path(weights), weights_from or weights)
        state_dict = StateDict(state, weights_from or weights)
    folder = Folder(Stores(StorageConfig(), {}), path)
    full_name, zoo_notes = make(
        folder, name, architecture.removeprefix("timm:"), state_dict, ClassNames(labels, labels_from)
    )
    return {"name": full_name, "notes": notes + zoo_notes}


def check_directory(
    name: str,
    where: str,
    description: dict[str, Any],
    overrides: dict[str, Any],
    classes: int,
    weights: str,
    weights_name: str,
) -> dict[str, Any]:
    """Build the network of a directory, run it on a blank image, and return facts about it.

    The facts are those of `resolve`, "features" (the width of the head's input), "logits" (the reference of `self_check`) and
    "notes" (changes made so that the weights fit).

    Args:
        where: the name of the description in messages.
        description: `architecture`, `model_args`, and the keys of preprocessing as `pretrained_cfg`.
        overrides: the preprocessing options of the config.
        weights: a file of this machine.
        weights_name: its name in messages.

    Raises:
        ModelError: keys, shapes or labels do not fit, or the logits are not finite.
    """
    architecture = description["architecture"]
    architectures.require_known(architecture)
    facts = resolve(description, overrides, where)
    size = Preprocess.from_timm(facts["data"])
    net = architectures.create(architecture, classes, facts["arguments"])
    state, notes = files.read(Path(weights), weights_name)
    notes += architectures.load_weights(net, state, weights_name, architecture)
    architectures.require_logits(net, name, classes, torch.zeros((1, 3, size.height, size.width)))
    head = architectures.find_head(net, classes)
    features = None if head is None else head.weight.shape[1]
    return {**facts, "features": features, "notes": notes, "logits": _reference_logits(net, size)}


def reference_of(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return {"logits": …}, the reference of `self_check` for a built-in model.

    Args:
        overrides: the preprocessing options of the config.
    """
    model = builtin.MODELS[name](ModelConfig(name=name))
    size = Preprocess.from_timm({**builtin.LITE0_CFG, **overrides})
    return {"logits": _reference_logits(model.network(), size)}


def _reference_logits(net: torch.nn.Module, size: Preprocess) -> str:
    """Return the logits of the fixed images of `self_check` in 32 bits, as base64."""
    pixels = torch.from_numpy(self_check.fixed_images(size.height, size.width)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (size.mean, size.std))
    with torch.inference_mode():
        logits = net.eval()((pixels.float() / 255 - mean) / std)
    return base64.b64encode(self_check.to_bytes(logits.float().numpy())).decode()


def resolve(description: dict[str, Any], overrides: dict[str, Any], where: str) -> dict[str, Any]:
    """Resolve a description with timm to "data" (the preprocessing), "arguments" of the network, and "registered".

    "registered" is the preprocessing for timm's own weights of the network; None: timm has no weights.

    Raises:
        ModelError: the description does not define the preprocessing, or needs one that is not supported.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(description))
            stated, name, arguments = load_model_config_from_path(folder)
        resolved = timm.models.resolve_pretrained_cfg(name, stated).to_dict()
        data = timm.data.resolve_data_config(args=overrides, pretrained_cfg=resolved)
        Preprocess.from_timm(data)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    except Exception as error:  # timm raises any error for unexpected values
        raise ModelError(f"{where} does not define the preprocessing: {error!r}") from error
    if resolved.get("fixed_input_size") and "input_size" in description["pretrained_cfg"]:
        arguments = {"img_size": list(resolved["input_size"][1:]), **arguments}  # as timm passes it
    own = None if name.startswith(TORCHVISION) else timm.get_pretrained_cfg(name, allow_unregistered=True)
    keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    return {
        "data": data,
        "arguments": arguments,
        "registered": None if own is None else {key: getattr(own, key) for key in keys},
    }


def _make_from_timm(
    folder: Folder, name: str, architecture: str, state_dict: StateDict | None, class_names: ClassNames
) -> tuple[str, list[str]]:
    plain, _, tag = architecture.partition(".")
    architectures.require_known(plain)
    tags = [name.partition(".")[2] for name in timm.list_models(f"{plain}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ModelError(
            f"timm has no weights {tag!r} for {plain!r}{did_you_mean(tag, tags)}; it has: {', '.join(tags)}"
        )
    registered = timm.get_pretrained_cfg(architecture)
    if registered is None or (state_dict is None and not registered.has_weights):
        raise ModelError(f"timm has no weights for {plain!r}: give a state dict with --set model.weights=URI")
    notes: list[str] = []
    if state_dict is None:
        if not registered.num_classes:
            raise ModelError(f"{name} has no head: it returns features, not classes, and cannot label images")
        try:
            net = timm.create_model(architecture, pretrained=True)
        except Exception as error:  # of the hub's client, its HTTP library, the connection, or a truncated file
            raise _unavailable_error(
                name, f"https://huggingface.co/{registered.hf_hub_id}", "HF_HOME", error, _cached_files(registered)
            ) from error
        names = class_names.labels or imagenet.labels_of(registered.num_classes, registered.label_names)
    else:
        names = class_names.labels or imagenet.labels_of(registered.num_classes or 0, None)
        net = timm.create_model(architecture, pretrained=False, num_classes=len(names))
        notes = _load_weights(net, state_dict, architecture, class_names, len(names))
    class_names.require(len(names), net.num_classes, name)
    directory.write_directory(folder, net, names)
    return (f"timm:{plain}.{registered.tag}" if registered.tag else f"timm:{plain}"), notes


def _make_from_torchvision(
    folder: Folder, name: str, architecture: str, state_dict: StateDict | None, class_names: ClassNames
) -> tuple[str, list[str]]:
    plain, _, weights = architecture.removeprefix(TORCHVISION).partition("@")
    architectures.require_known(f"{TORCHVISION}{plain}")
    entries = torchvision.models.get_model_weights(plain)
    if weights and weights not in entries.__members__:
        available = ", ".join(entries.__members__)
        raise ModelError(
            f"torchvision has no weights {weights!r} for {plain!r}{did_you_mean(weights, entries.__members__)}; it has: "
            f"{available}"
        )
    entry = entries[weights] if weights else entries.DEFAULT
    if state_dict is None:
        try:
            state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
        except Exception as error:  # of the connection, or a truncated file
            raise _unavailable_error(name, entry.url, "TORCH_HOME", error, [_in_torch_hub(entry.url)]) from error
        state_dict = StateDict(files.with_current_names(state), name)
    names = class_names.labels or list(imagenet.labels_of(1000, None))
    arguments: dict[str, Any] = {}
    if plain in _ADAPTED:
        auxiliary = any(key.startswith(("AuxLogits.", "aux1.")) for key in state_dict.state)
        arguments = {"transform_input": True, "aux_logits": auxiliary, "init_weights": False}
    net = architectures.create(f"{TORCHVISION}{plain}", len(names), arguments)
    notes = _load_weights(net, state_dict, f"{TORCHVISION}{plain}", class_names, len(names))
    config = {
        "architecture": f"{TORCHVISION}{plain}",
        "num_classes": len(names),
        "label_names": names,
        "pretrained_cfg": _to_pretrained_cfg(entry.transforms()),
        "model_args": arguments,
    }
    directory.write(folder, net.state_dict(), config)
    return f"{TORCHVISION}{plain}@{entry.name}", notes


def _load_weights(
    net: torch.nn.Module, state_dict: StateDict, architecture: str, class_names: ClassNames, number: int
) -> list[str]:
    """Load a state dict into a network with a head of `number` classes; return notes."""
    try:
        return architectures.load_weights(net, state_dict.state, state_dict.where, architecture)
    except ModelError:
        classes = architectures.classes_of(net, state_dict.state, number)
        if classes is not None:
            class_names.require(number, classes, state_dict.where)
        raise


def _to_pretrained_cfg(transform: Any) -> Mapping[str, Any]:
    """Convert torchvision's preset for classification to timm's `pretrained_cfg`."""
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


def _cached_files(registered: Any) -> list[Path]:
    """Return the files in the caches of the libraries with the weights of a network of timm."""
    files_in_cache: list[Path] = []
    if registered.hf_hub_id:
        repository, _, revision = registered.hf_hub_id.partition("@")
        names = (
            [registered.hf_hub_filename] if registered.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        )
        paths = [try_to_load_from_cache(repository, name, revision=revision or None) for name in names]
        files_in_cache += [Path(path) for path in paths if isinstance(path, str)]
    return files_in_cache + ([_in_torch_hub(registered.url)] if registered.url else [])


def _in_torch_hub(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _unavailable_error(name: str, source: str, cache: str, error: Exception, cached: list[Path]) -> ModelError:
    """Return the error for weights of a zoo that are not available. It names a file in the cache that has no weights."""
    for path in cached:
        if path.is_file():
            try:
                files.require_weights(path, f"the weights of {name} are not available: {path}")
            except ModelError as wrong_file:
                return ModelError(f"{wrong_file}; or remove it, so that it is fetched again from {source}")
    message = (str(error).strip() or repr(error)).splitlines()[0][:300]
    return ModelError(
        f"the weights of {name} are not available from {source}: {message}. {_REMEDY.format(cache=cache)}"
    )

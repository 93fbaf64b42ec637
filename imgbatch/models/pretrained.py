"""Effects: the public zoos: a network of timm or torchvision becomes a model directory, with its weights, labels and
preprocessing.

Weights come from the hubs, through the libraries' own caches (HF_HOME, TORCH_HOME), or from a state dict of one's own.
Runs in a process of its own (see `child`).
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
from imgbatch.models.label_file import hint_at_background
from imgbatch.models.preprocess import Preprocess
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal.plurals import counted

# Networks that torchvision makes otherwise for its weights than without them.
_ADAPTED = ("inception_v3", "googlenet")
_REMEDY = (
    "On a machine without internet fill the cache ({cache}) on one that has it, give a state dict with "
    "--set model.weights=URI, or a model directory as --model URI"
)


@dataclass(frozen=True, slots=True)
class Given:
    """A state dict in place of the zoo's weights."""

    state: files.State
    where: str
    """Names it in messages."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the classes."""

    labels: list[str] | None
    """None: the zoo's own."""
    where: str
    """Names their file in messages."""

    def require(self, number: int, classes: int, network: str) -> None:
        """Refuse another number of names than the network has classes.

        Raises:
            ModelError: naming the file and both numbers.
        """
        if number == classes:
            return
        if self.labels is None:
            raise ModelError(
                f"{network} has {counted(classes, 'class', 'classes')}, and its zoo names {number:,}: name them with "
                "--set model.labels=URI, one a line"
            )
        raise ModelError(
            f"{self.where} has {counted(number, 'name')}, and {network} has {counted(classes, 'class', 'classes')}: one name "
            f"a class is needed, in the order of the head{hint_at_background(self.labels)}"
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
        name: what messages call it.
        architecture: `timm:NAME[.TAG]` or `torchvision:NAME[@WEIGHTS]`.
        weights: a local state dict in place of the zoo's weights.
        labels: the names of the classes; None: the zoo's own.
        weights_from: names the state dict in messages; None: as `weights` does.
        labels_from: names the file of the labels in messages.

    Raises:
        ModelError: there is no such network, its weights cannot be had, or they do not fit.
    """
    make = _of_torchvision if architecture.startswith(TORCHVISION) else _of_timm
    given = None
    notes: list[str] = []
    if weights:
        state, notes = files.read(Path(weights), weights_from or weights)
        given = Given(state, weights_from or weights)
    folder = Folder(Stores(StorageConfig(), {}), path)
    full, more = make(folder, name, architecture.removeprefix("timm:"), given, Names(labels, labels_from))
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
    architectures.require_known(architecture)
    found = resolve(description, choice, where)
    size = Preprocess.from_timm(found["data"])
    net = architectures.make(architecture, classes, found["arguments"])
    state, notes = files.read(Path(weights), called)
    notes += architectures.fill(net, state, called, architecture)
    architectures.check(net, name, classes, torch.zeros((1, 3, size.height, size.width)))
    head = architectures.head(net, classes)
    features = None if head is None else head.weight.shape[1]
    return {**found, "features": features, "notes": notes, "logits": _reference(net, size)}


def reference_of(name: str, choice: dict[str, Any]) -> dict[str, Any]:
    """Return {"logits": …}, the reference of the workers' check, of a model that needs no hub.

    Args:
        choice: what the config says of preprocessing.
    """
    model = builtin.MODELS[name](ModelConfig(name=name))
    size = Preprocess.from_timm({**builtin.LITE0_CFG, **choice})
    return {"logits": _reference(model.network(), size)}


def _reference(net: torch.nn.Module, size: Preprocess) -> str:
    """Return the logits of the fixed images of `selfcheck` in 32 bits, as base64."""
    pixels = torch.from_numpy(self_check.pixels(size.height, size.width)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (size.mean, size.std))
    with torch.inference_mode():
        logits = net.eval()((pixels.float() / 255 - mean) / std)
    return base64.b64encode(self_check.packed(logits.float().numpy())).decode()


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


def _of_timm(folder: Folder, name: str, architecture: str, given: Given | None, own: Names) -> tuple[str, list[str]]:
    plain, _, tag = architecture.partition(".")
    architectures.require_known(plain)
    tags = [each.partition(".")[2] for each in timm.list_models(f"{plain}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ModelError(
            f"timm has no weights {tag!r} for {plain!r}{did_you_mean(tag, tags)}; it has: {', '.join(tags)}"
        )
    known = timm.get_pretrained_cfg(architecture)
    if known is None or (given is None and not known.has_weights):
        raise ModelError(f"timm has no weights for {plain!r}: give yours with --set model.weights=URI")
    notes: list[str] = []
    if given is None:
        if not known.num_classes:
            raise ModelError(f"{name} gives features, not classes: it has no head, and cannot label")
        try:
            net = timm.create_model(architecture, pretrained=True)
        except Exception as error:  # of the hub's client, its HTTP library, the network, or a torn file
            raise _not_there(
                name, f"https://huggingface.co/{known.hf_hub_id}", "HF_HOME", error, _cached(known)
            ) from error
        names = own.labels or imagenet.labels_of(known.num_classes, known.label_names)
    else:
        names = own.labels or imagenet.labels_of(known.num_classes or 0, None)
        net = timm.create_model(architecture, pretrained=False, num_classes=len(names))
        notes = _filled(net, given, architecture, own, len(names))
    own.require(len(names), net.num_classes, name)
    directory.write_directory(folder, net, names)
    return (f"timm:{plain}.{known.tag}" if known.tag else f"timm:{plain}"), notes


def _of_torchvision(
    folder: Folder, name: str, architecture: str, given: Given | None, own: Names
) -> tuple[str, list[str]]:
    plain, _, chosen = architecture.removeprefix(TORCHVISION).partition("@")
    architectures.require_known(f"{TORCHVISION}{plain}")
    entries = torchvision.models.get_model_weights(plain)
    if chosen and chosen not in entries.__members__:
        there = ", ".join(entries.__members__)
        raise ModelError(
            f"torchvision has no weights {chosen!r} for {plain!r}{did_you_mean(chosen, entries.__members__)}; it has: {there}"
        )
    entry = entries[chosen] if chosen else entries.DEFAULT
    if given is None:
        try:
            state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
        except Exception as error:  # of the network, or a torn file
            raise _not_there(name, entry.url, "TORCH_HOME", error, [_in_torch_hub(entry.url)]) from error
        given = Given(files.with_todays_names(state), name)
    names = own.labels or list(imagenet.labels_of(1000, None))
    arguments: dict[str, Any] = {}
    if plain in _ADAPTED:
        auxiliary = any(key.startswith(("AuxLogits.", "aux1.")) for key in given.state)
        arguments = {"transform_input": True, "aux_logits": auxiliary, "init_weights": False}
    net = architectures.make(f"{TORCHVISION}{plain}", len(names), arguments)
    notes = _filled(net, given, f"{TORCHVISION}{plain}", own, len(names))
    config = {
        "architecture": f"{TORCHVISION}{plain}",
        "num_classes": len(names),
        "label_names": names,
        "pretrained_cfg": _as_timm_says_it(entry.transforms()),
        "model_args": arguments,
    }
    directory.write(folder, net.state_dict(), config)
    return f"{TORCHVISION}{plain}@{entry.name}", notes


def _filled(net: torch.nn.Module, given: Given, architecture: str, own: Names, number: int) -> list[str]:
    """Load a state dict into a network whose head is made for `number` classes; return notes."""
    try:
        return architectures.fill(net, given.state, given.where, architecture)
    except ModelError:
        classes = architectures.classes_of(net, given.state, number)
        if classes is not None:
            own.require(number, classes, given.where)
        raise


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


def _cached(known: Any) -> list[Path]:
    """Return where the libraries keep the weights of a network of timm, once they have fetched them."""
    found: list[Path] = []
    if known.hf_hub_id:
        repository, _, revision = known.hf_hub_id.partition("@")
        names = [known.hf_hub_filename] if known.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        paths = [try_to_load_from_cache(repository, name, revision=revision or None) for name in names]
        found += [Path(path) for path in paths if isinstance(path, str)]
    return found + ([_in_torch_hub(known.url)] if known.url else [])


def _in_torch_hub(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _not_there(name: str, place: str, cache: str, error: Exception, cached: list[Path]) -> ModelError:
    """Return what to say where a zoo's weights cannot be had; a file in its cache that holds none is named."""
    for path in cached:
        if path.is_file():
            try:
                files.require_weights(path, f"the weights of {name} cannot be had: {path}")
            except ModelError as unlike:
                return ModelError(f"{unlike}; or remove it, and it is fetched again from {place}")
    said = (str(error).strip() or repr(error)).splitlines()[0][:300]
    return ModelError(f"the weights of {name} cannot be had from {place}: {said}. {_REMEDY.format(cache=cache)}")

"""Effects: what `config.json` of a model directory says: the classes, the head, and which keys say how images are prepared.

The keys are timm's, in its form of today (`pretrained_cfg`) and in its older flat one, in which they lie at the top. What they
come to is worked out by timm itself, in `hubs.resolve`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from imgbatch.config.sections import ModelConfig
from imgbatch.decode.other_kinds import stand_in
from imgbatch.errors import ModelError
from imgbatch.models import builtin, imagenet, label_file
from imgbatch.models.preprocess import Preprocess
from imgbatch.sources.spelling import similar_names

log = logging.getLogger(__name__)

AS_GIVEN = "label_names_as_given"
"""Stands in `config.json` if `label_names` are to be shown as they are, WordNet ids too."""

PROCESSOR = "preprocessor_config.json"
"""transformers' file of preprocessing; it is read where `config.json` says nothing of it."""

STATED = ("input_size", "crop_pct", "interpolation", "mean", "std")
"""The keys that say how images are prepared. timm has a default for each, which is a guess where a key is missing."""

_OF_PIXELS = (*STATED, "crop_mode", "test_input_size", "test_crop_pct", "min_input_size", "fixed_input_size")

_NOT_UNDERSTOOD: Mapping[str, tuple[Any, ...]] = {
    # Cadene's pretrainedmodels, from which many descriptions come: Caffe's networks want BGR, or values up to 255.
    "input_space": ("RGB", "rgb"),
    "input_range": ([0, 1], [0.0, 1.0]),
    # The same under other names.
    "color_space": ("RGB", "rgb"),
    "color_mode": ("RGB", "rgb"),
    "channel_order": ("RGB", "rgb"),
    "value_range": ([0, 1], [0.0, 1.0]),
    # transformers' image processors.
    "image_mean": (),
    "image_std": (),
    "do_resize": (True,),
    "do_center_crop": (True,),
    "do_normalize": (True,),
    "do_rescale": (True,),
    "do_pad": (False,),
    "rescale_factor": (1 / 255,),
    "resample": (),
    "crop_size": (),
    # open_clip, and arguments of timm's and torchvision's transforms that its description does not have.
    "resize_mode": (),
    "resize_size": (),
    "crop_border_pixels": (0,),
    "fill_color": (),
    "antialias": (True,),
    "normalize": (True,),
    "padding": (0,),
}
"""Keys that would change the pixels, each with the values at which it changes nothing; other values are refused."""

_OF_PROCESSORS: Mapping[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "rescale_factor": (1 / 255, 0.00392156862745098),
    "do_pad": (False,),
    "do_flip_channel_order": (False,),
    "do_reduce_labels": (False,),
    "crop_pct": (),
    "size_divisor": (),
    "offset": (),
}
"""The same for transformers' image processors."""

_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers

_SIGMOID = re.compile(r"bce|binary_?cross_?entropy|sigmoid|multi_?label|regression")
_OF_THE_HEAD = (
    *("problem_type", "task", "loss", "criterion", "loss_fn", "loss_function"),
    *("output_activation", "final_activation", "head_activation", "last_activation", "classifier_activation"),
)
_FLAGS_OF_THE_HEAD = ("multi_label", "multilabel", "is_multilabel", "is_multi_label")

_LARGEST = 10  # mean or std, on the scale 0 to 1

_PLACEHOLDER = re.compile(r"LABEL_\d+")
_TRANSFORMERS = (
    "it was written by transformers for a network of its own; only networks of timm and torchvision are read"
)


def parse(content: bytes, where: str) -> dict[str, Any]:
    """Return the description, with `pretrained_cfg` and `model_args` as objects.

    Raises:
        ModelError: it is none, or says two things of one.
    """
    if kind := stand_in(content):
        raise ModelError(f"{where} is {kind}")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        why = f": {_TRANSFORMERS}" if isinstance(config, dict) and "architectures" in config else ""
        raise ModelError(f"{where} names no 'architecture'{why}")
    for section in ("pretrained_cfg", "model_args"):
        config[section] = config.get(section) or {}
        if not isinstance(config[section], dict):
            raise ModelError(f"{where}: {section!r} is not an object")
    again, number = config["model_args"].pop("num_classes", None), config.get("num_classes")  # timm writes both
    if again is not None and number is not None and again != number:
        raise ModelError(f"{where}: num_classes is {number!r}, and {again!r} in model_args: leave the one of the head")
    if again is not None and number is None and config["pretrained_cfg"].get("num_classes") is None:
        config["num_classes"] = again
    return config


def preprocessing(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys that say how images are prepared, from `pretrained_cfg` or, in the flat form, from the top.

    Raises:
        ModelError: a key is not understood, or stands in both places with two values.
    """
    nested = config["pretrained_cfg"]
    stated = nested or config
    for key, harmless in _NOT_UNDERSTOOD.items():
        if stated.get(key) is not None and stated[key] not in harmless:
            raise ModelError(
                f"{where}: {key}={stated[key]!r} would change what the network is shown, and is not supported. Say it with "
                "timm's keys (input_size, crop_pct, crop_mode, interpolation, mean, std), and remove this one"
            )
    for key in (*STATED, "crop_mode"):
        if nested and config.get(key) is not None and config[key] != nested.get(key):
            raise ModelError(
                f"{where}: {key} is {config[key]!r} at the top and {nested.get(key)!r} in pretrained_cfg: leave the right one, "
                "in pretrained_cfg"
            )
    return {key: stated[key] for key in _OF_PIXELS if stated.get(key) is not None}


def of_processor(content: bytes, where: str) -> dict[str, Any]:
    """Return what transformers' `preprocessor_config.json` says of preprocessing, under timm's keys.

    Raises:
        ModelError: it asks for something that cannot be had here.
    """
    try:
        said = json.loads(content)
        if isinstance(said.get("pretrained_cfg"), dict):  # of transformers' wrapper around timm
            return preprocessing({"pretrained_cfg": said["pretrained_cfg"]}, where)
        for key, harmless in _OF_PROCESSORS.items():
            if said.get(key) is not None and said[key] not in harmless:
                raise ModelError(
                    f"{where}: {key}={said[key]!r} is not supported: set model.mean, model.std, … and remove the file"
                )
        found: dict[str, Any] = _sides(said) if "size" in said or "crop_size" in said else {}
        if "resample" in said:
            found["interpolation"] = _RESAMPLE[said["resample"]]
        plain = {"mean": [0.0] * 3, "std": [1.0] * 3} if said.get("do_normalize") is False else {}
        return found | {key: said[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in said} | plain
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{where} does not say how images are prepared in a way that is supported ({error!r}): say it in config.json"
        ) from error


def _sides(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return `input_size`, `crop_pct` and `crop_mode` of a processor that resizes, and perhaps crops."""
    size: Any = said.get("size")
    crop: Any = said.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    squash = "shortest_edge" not in size
    if not said.get("do_center_crop"):
        if not squash:
            raise ValueError("size has a shortest_edge, and nothing is cropped")
        return {"input_size": [3, size["height"], size["width"]], "crop_pct": 1.0, "crop_mode": "squash"}
    side, height = size["height" if squash else "shortest_edge"], crop["height"]
    if (squash and size["width"] != side) or crop["width"] != height:
        raise ValueError("size and crop_size are not square")
    ratio = height / side
    if math.floor(height / ratio) != side:  # timm rounds down, and 1 / (1 / x) may be a little less than x
        ratio = height / (side + 0.5)
    return {"input_size": [3, height, height], "crop_pct": ratio, "crop_mode": "squash" if squash else "center"}


def require_softmax(config: Mapping[str, Any], where: str) -> None:
    """Refuse a description whose scores are no distribution over the classes.

    Raises:
        ModelError: naming the key that says so.
    """
    for said in (config, config["pretrained_cfg"]):
        found = [key for key in _OF_THE_HEAD if isinstance(said.get(key), str)]
        found = [key for key in found if _SIGMOID.search(re.sub(r"[- ]", "_", said[key].lower()))]
        found += [key for key in _FLAGS_OF_THE_HEAD if said.get(key) is True]
        if found:
            raise ModelError(
                f"{where}: {found[0]} is {said[found[0]]!r}: a head for sigmoids, which may give several labels to an image or "
                "none. Here each image gets the one best class of a softmax. If the classes exclude each other all the same, "
                "remove that key"
            )


def one_class(where: str) -> ModelError:
    """Return the error for a head of one class."""
    return ModelError(
        f"{where}: a head of one class would give every image that class with a score of 1.0. Make it a head of two: put a row "
        "of zeros before its weight, a 0 before its bias, and a name for the rest before its label (the softmax of 0 and x "
        "is the sigmoid of x)"
    )


def classes_of(config: Mapping[str, Any], where: str) -> int:
    """Return the number of classes of the head.

    Raises:
        ModelError: it is not known.
    """
    number = config.get("num_classes", config["pretrained_cfg"].get("num_classes"))
    if number is None:
        number = len(_names(config, where) or ()) or None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ModelError(f"{where}: num_classes is {number!r}; a classifier needs a head of at least two classes")
    return number


def labels_of(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the names of the classes, in the order of the head.

    Raises:
        ModelError: there are none, or they contradict each other.
    """
    names, classes = _names(config, where), classes_of(config, where)
    if names is None and classes == 1000:  # as timm itself takes it
        return imagenet.imagenet_labels()
    if names is None:
        raise ModelError(
            f"{where} has no 'label_names': add the {classes} names in the order of the head, or give a file with one a line "
            "as --set model.labels=URI"
        )
    if classes == 1000 and not _first_named(config):
        log.warning("%s: since 0.2.0 its 'labels' name the classes; 0.1 took those of ImageNet", where)
    if all(map(_PLACEHOLDER.fullmatch, names)):
        log.warning("%s: its labels are the placeholders %s, …: name them with model.labels", where, names[0])
    # What somebody called classes while training stays; a hub's WordNet ids become words.
    return imagenet.unique(tuple(names) if config.get(AS_GIVEN) else imagenet.readable(names), where)


def warn_of_likeness(labels: Sequence[str], where: str) -> None:
    """Say which labels a person would take for one: public models have such labels, so that they are not refused."""
    if pairs := similar_names(labels):
        log.warning("%s: labels that differ only in case, spaces or invisible characters: %s", where, pairs)


def _first_named(config: Mapping[str, Any]) -> Any:
    return config.get("label_names") or config["pretrained_cfg"].get("label_names")


def _names(config: Mapping[str, Any], where: str) -> list[str] | None:
    """Return the names under timm's key, under its older `labels` or under transformers' `id2label`."""
    found: dict[str, list[str]] = {}
    for key in ("label_names", "labels", "id2label"):
        said = config.get(key) or config["pretrained_cfg"].get(key)  # the top comes first, as in timm
        if isinstance(said, list | dict):
            names = label_file.from_tree(said, f"{where}: {key}")
            if not (found and all(map(_PLACEHOLDER.fullmatch, names))):
                found[key] = names
    for key, names in found.items():
        first, others = next(iter(found.items()))
        if names != others:
            raise ModelError(f"{where}: {first} and {key} name the classes differently: leave the right ones")
    return next(iter(found.values()), None)


def say_what_is_assumed(
    config: Mapping[str, Any], stated: Mapping[str, Any], found: Mapping[str, Any], chosen: ModelConfig, where: str
) -> None:
    """Warn of preprocessing that is a guess, and of what 0.1 read otherwise.

    Args:
        stated: the keys that the description has.
        found: what `hubs.resolve` made of it.
    """
    used = Preprocess.from_timm(found["data"])
    given = {*stated, *(key for key in ("crop_pct", "interpolation", "mean", "std") if getattr(chosen, key))}
    given |= {"input_size"} if chosen.image_size else set()
    if missing := [key for key in STATED if key not in given]:
        own = Preprocess.from_timm(builtin.with_choice(found["registered"], chosen)) if found["registered"] else used
        other = "" if own == used else f"; weights of timm's own for this network have {own.summary()}"
        log.warning(
            "%s does not say %s: timm's defaults are used, %s%s. Set model.mean, model.std, model.interpolation, "
            "model.crop_pct or model.image_size if the model was made otherwise",
            where, ", ".join(missing), used.summary(), other,
        )  # fmt: skip
    if max(map(abs, (*used.mean, *used.std))) > _LARGEST:
        log.warning("%s: mean and std belong to values of 0 to 1; %s looks like 0 to 255", where, used.summary())
    if stated and not config["pretrained_cfg"]:
        before = Preprocess.from_timm(builtin.with_choice({}, chosen))
        if before != used:
            log.warning(
                "%s: since 0.2.0 the preprocessing at its top, or in %s beside it, is used: %s; 0.1 ignored it and used %s: "
                "labels differ from those of 0.1",
                where, PROCESSOR, used.summary(), before.summary(),
            )  # fmt: skip

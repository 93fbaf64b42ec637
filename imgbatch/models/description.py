"""Effects: the description of a model directory, `config.json`: classes, head and preprocessing.

The keys are timm's, in its current form (`pretrained_cfg`) and in its older flat form, with all keys at the top. timm itself
resolves them, in `pretrained.resolve`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from imgbatch.config.sections import ModelConfig
from imgbatch.decode.other_kinds import describe_placeholder
from imgbatch.errors import ModelError
from imgbatch.models import builtin, imagenet, label_file
from imgbatch.models.preprocess import Preprocess
from imgbatch.sources.spelling import similar_names

log = logging.getLogger(__name__)

AS_GIVEN = "label_names_as_given"
"""A key of `config.json`: show `label_names` unchanged, including WordNet ids."""

PROCESSOR = "preprocessor_config.json"
"""transformers' file of preprocessing, which is read if `config.json` has no preprocessing."""

STATED = ("input_size", "crop_pct", "interpolation", "mean", "std")
"""The keys of preprocessing. timm has a default for each, which may be wrong for the model."""

_PIXEL_KEYS = (*STATED, "crop_mode", "test_input_size", "test_crop_pct", "min_input_size", "fixed_input_size")

_UNSUPPORTED_KEYS: Mapping[str, tuple[Any, ...]] = {
    # Cadene's pretrainedmodels, the origin of many descriptions: networks of Caffe expect BGR, or values up to 255.
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
    # open_clip, and arguments of transforms of timm and torchvision that timm's description does not have.
    "resize_mode": (),
    "resize_size": (),
    "crop_border_pixels": (0,),
    "fill_color": (),
    "antialias": (True,),
    "normalize": (True,),
    "padding": (0,),
}
"""Keys that would change the pixels, each with the values that change nothing. Other values are refused."""

_PROCESSOR_KEYS: Mapping[str, tuple[Any, ...]] = {
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
_HEAD_KEYS = (
    *("problem_type", "task", "loss", "criterion", "loss_fn", "loss_function"),
    *("output_activation", "final_activation", "head_activation", "last_activation", "classifier_activation"),
)
_HEAD_FLAGS = ("multi_label", "multilabel", "is_multilabel", "is_multi_label")

_MAX_MEAN_OR_STD = 10  # on the scale 0 to 1

_PLACEHOLDER = re.compile(r"LABEL_\d+")
_TRANSFORMERS = "transformers wrote it for one of its own networks; only networks of timm and torchvision are supported"


def parse(content: bytes, where: str) -> dict[str, Any]:
    """Return the description, with `pretrained_cfg` and `model_args` as objects.

    Raises:
        ModelError: it is not a description, or contradicts itself.
    """
    if kind := describe_placeholder(content):
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
    in_arguments, number = config["model_args"].pop("num_classes", None), config.get("num_classes")  # timm writes both
    if in_arguments is not None and number is not None and in_arguments != number:
        raise ModelError(
            f"{where}: num_classes is {number!r}, and {in_arguments!r} in model_args: keep only that of the head"
        )
    if in_arguments is not None and number is None and config["pretrained_cfg"].get("num_classes") is None:
        config["num_classes"] = in_arguments
    return config


def preprocessing(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys of preprocessing, from `pretrained_cfg` or, in the flat form, from the top.

    Raises:
        ModelError: a key is not supported, or has different values in both places.
    """
    nested = config["pretrained_cfg"]
    stated = nested or config
    for key, harmless in _UNSUPPORTED_KEYS.items():
        if stated.get(key) is not None and stated[key] not in harmless:
            raise ModelError(
                f"{where}: {key}={stated[key]!r} would change the input of the network, and is not supported. Use timm's "
                "keys (input_size, crop_pct, crop_mode, interpolation, mean, std) instead, and remove this one"
            )
    for key in (*STATED, "crop_mode"):
        if nested and config.get(key) is not None and config[key] != nested.get(key):
            raise ModelError(
                f"{where}: {key} is {config[key]!r} at the top and {nested.get(key)!r} in pretrained_cfg: keep only the "
                "right one, in pretrained_cfg"
            )
    return {key: stated[key] for key in _PIXEL_KEYS if stated.get(key) is not None}


def from_processor(content: bytes, where: str) -> dict[str, Any]:
    """Return the preprocessing of transformers' `preprocessor_config.json`, under timm's keys.

    Raises:
        ModelError: it needs something that is not supported.
    """
    try:
        processor = json.loads(content)
        if isinstance(processor.get("pretrained_cfg"), dict):  # of transformers' wrapper around timm
            return preprocessing({"pretrained_cfg": processor["pretrained_cfg"]}, where)
        for key, harmless in _PROCESSOR_KEYS.items():
            if processor.get(key) is not None and processor[key] not in harmless:
                raise ModelError(
                    f"{where}: {key}={processor[key]!r} is not supported: remove the file, and set model.mean, model.std, …"
                )
        keys: dict[str, Any] = _sides(processor) if "size" in processor or "crop_size" in processor else {}
        if "resample" in processor:
            keys["interpolation"] = _RESAMPLE[processor["resample"]]
        identity = {"mean": [0.0] * 3, "std": [1.0] * 3} if processor.get("do_normalize") is False else {}
        return (
            keys | {key: processor[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in processor} | identity
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{where}: its preprocessing is not supported ({error!r}): state the preprocessing in config.json"
        ) from error


def _sides(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return `input_size`, `crop_pct` and `crop_mode` of a processor that resizes and may crop."""
    size: Any = processor.get("size")
    crop: Any = processor.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    squash = "shortest_edge" not in size
    if not processor.get("do_center_crop"):
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
    """Raise if the scores of the model are not a distribution over the classes.

    Raises:
        ModelError: with the key that describes another head.
    """
    for section in (config, config["pretrained_cfg"]):
        keys = [key for key in _HEAD_KEYS if isinstance(section.get(key), str)]
        keys = [key for key in keys if _SIGMOID.search(re.sub(r"[- ]", "_", section[key].lower()))]
        keys += [key for key in _HEAD_FLAGS if section.get(key) is True]
        if keys:
            raise ModelError(
                f"{where}: {keys[0]} is {section[keys[0]]!r}: a head for sigmoids, which gives an image any number of labels. "
                "Here each image gets the best class of a softmax. If its classes exclude each other, remove that key"
            )


def one_class_error(where: str) -> ModelError:
    """Return the error for a head of one class."""
    return ModelError(
        f"{where}: a head of one class would give every image that class with a score of 1.0. Make it a head of two classes: "
        "put a row of zeros before its weight, a 0 before its bias, and a name for the rest before its label (the softmax of 0 "
        "and x is the sigmoid of x)"
    )


def classes_of(config: Mapping[str, Any], where: str) -> int:
    """Return the number of classes of the head.

    Raises:
        ModelError: it is unknown.
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
        ModelError: there are no names, or they contradict each other.
    """
    names, classes = _names(config, where), classes_of(config, where)
    if names is None and classes == 1000:  # as timm assumes
        return imagenet.imagenet_labels()
    if names is None:
        raise ModelError(
            f"{where} has no 'label_names': add the {classes} names in the order of the head, or give a file with one name per "
            "line with --set model.labels=URI"
        )
    if classes == 1000 and not _stated_names(config):
        log.warning("%s: since 0.2.0 its 'labels' name the classes; 0.1 used the labels of ImageNet", where)
    if all(map(_PLACEHOLDER.fullmatch, names)):
        log.warning("%s: its labels are the placeholders %s, …: set model.labels to name them", where, names[0])
    # Names from training are kept unchanged; WordNet ids of a hub become words.
    return imagenet.require_unique(tuple(names) if config.get(AS_GIVEN) else imagenet.readable(names), where)


def warn_about_similar_labels(labels: Sequence[str], where: str) -> None:
    """Warn about similar labels. They are not refused, since public models have such labels."""
    if pairs := similar_names(labels):
        log.warning("%s: labels that differ only in case, spaces or invisible characters: %s", where, pairs)


def _stated_names(config: Mapping[str, Any]) -> Any:
    return config.get("label_names") or config["pretrained_cfg"].get("label_names")


def _names(config: Mapping[str, Any], where: str) -> list[str] | None:
    """Return the names from timm's key, from its older key `labels` or from transformers' `id2label`."""
    by_key: dict[str, list[str]] = {}
    for key in ("label_names", "labels", "id2label"):
        value = config.get(key) or config["pretrained_cfg"].get(key)  # the top comes first, as in timm
        if isinstance(value, list | dict):
            names = label_file.from_tree(value, f"{where}: {key}")
            if not (by_key and all(map(_PLACEHOLDER.fullmatch, names))):
                by_key[key] = names
    for key, names in by_key.items():
        first_key, first_names = next(iter(by_key.items()))
        if names != first_names:
            raise ModelError(f"{where}: {first_key} and {key} name the classes differently: keep only the right names")
    return next(iter(by_key.values()), None)


def warn_about_assumptions(
    config: Mapping[str, Any],
    stated: Mapping[str, Any],
    resolved: Mapping[str, Any],
    overrides: ModelConfig,
    where: str,
) -> None:
    """Warn about preprocessing that is assumed, and about preprocessing that 0.1 read differently.

    Args:
        stated: the keys of preprocessing in the description.
        resolved: the result of `pretrained.resolve`.
    """
    used = Preprocess.from_timm(resolved["data"])
    stated_keys = {*stated, *(key for key in ("crop_pct", "interpolation", "mean", "std") if getattr(overrides, key))}
    stated_keys |= {"input_size"} if overrides.image_size else set()
    if missing := [key for key in STATED if key not in stated_keys]:
        own = (
            Preprocess.from_timm(builtin.with_overrides(resolved["registered"], overrides))
            if resolved["registered"]
            else used
        )
        suffix = "" if own == used else f"; timm's own weights for this network have {own.summary()}"
        log.warning(
            "%s does not state %s: timm's defaults are used, %s%s. Set model.mean, model.std, model.interpolation, "
            "model.crop_pct or model.image_size if the model was trained with others",
            where, ", ".join(missing), used.summary(), suffix,
        )  # fmt: skip
    if max(map(abs, (*used.mean, *used.std))) > _MAX_MEAN_OR_STD:
        log.warning("%s: mean and std must be on the scale 0 to 1; %s looks like 0 to 255", where, used.summary())
    if stated and not config["pretrained_cfg"]:
        in_0_1 = Preprocess.from_timm(builtin.with_overrides({}, overrides))
        if in_0_1 != used:
            log.warning(
                "%s: since 0.2.0 the preprocessing at its top, or in %s beside it, is used: %s; 0.1 ignored it and used %s: "
                "labels differ from those of 0.1",
                where, PROCESSOR, used.summary(), in_0_1.summary(),
            )  # fmt: skip

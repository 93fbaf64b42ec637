"""`Preprocess` compared with Pillow and the transform of timm, on images of every shape."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import sklearn.datasets
import timm.data
from PIL import Image

from imgbatch.decode import decode
from imgbatch.errors import ModelError
from imgbatch.models.preprocess import Preprocess

from . import pictures as make

_SKIMAGE, _SKLEARN = Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"
PHOTOS = [_SKIMAGE / name for name in ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg", "retina.jpg")]
PHOTOS += [_SKLEARN / name for name in ("china.jpg", "flower.jpg")]

LITE0: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
CONFIGS = {
    "lite0": LITE0,
    "defaults": {},
    "bilinear": {**LITE0, "interpolation": "bilinear"},
    "nearest": {**LITE0, "interpolation": "nearest"},
    "squash": {**LITE0, "input_size": (3, 256, 256), "crop_pct": 1.0, "crop_mode": "squash"},
    "squash and crop": {**LITE0, "crop_pct": 0.9, "crop_mode": "squash"},
    "tall": {**LITE0, "input_size": (3, 256, 128), "crop_pct": 0.95},
    "wide": {**LITE0, "input_size": (3, 160, 320), "crop_pct": 1.0},
    "crop beyond": {**LITE0, "crop_pct": 1.2},
}
SIZES = [(1, 1), (1, 7), (7, 1), (1, 60_000), (60_000, 1), (3, 20_000), (50, 40), (223, 225), (500, 375), (300, 1300)]


def by_timm(config: dict[str, Any], image: Image.Image) -> make.Array:
    """Return the input of a model in timm's evaluation, before normalisation: (H, W, 3)."""
    data = timm.data.resolve_data_config(pretrained_cfg=config, args={"num_classes": 1})
    tensor = timm.data.create_transform(**data, is_training=False, normalize=False)(image)
    return np.asarray(tensor).transpose(1, 2, 0)


def levels(left: make.Array, right: make.Array) -> make.Array:
    """Return the absolute differences in grey levels."""
    assert left.dtype == np.uint8
    assert left.shape == right.shape
    return np.abs(left.astype(int) - right.astype(int))


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", CONFIGS)
def test_photos_are_preprocessed_like_timm(name: str, photo: Path) -> None:
    preprocess = Preprocess.from_timm(CONFIGS[name])
    ours = preprocess(decode(photo.read_bytes(), max_pixels=10_000_000).pixels)
    with Image.open(photo) as image:
        difference = levels(ours, by_timm(CONFIGS[name], image.convert("RGB")))
    assert difference.mean() < 0.5
    assert (difference > 2).mean() < 0.001


def test_a_reduced_scale_stays_near_timm() -> None:
    preprocess = Preprocess.from_timm({**LITE0, "input_size": (3, 96, 96)})
    data = (_SKIMAGE / "retina.jpg").read_bytes()  # 1411 pixels a side, decoded at a quarter
    picture = decode(data, max_pixels=10_000_000, short_side=preprocess.short_side)
    assert picture.pixels.shape[0] < picture.height
    with Image.open(_SKIMAGE / "retina.jpg") as image:
        assert levels(preprocess(picture.pixels), by_timm(LITE0 | {"input_size": (3, 96, 96)}, image)).mean() < 1.0


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_shape_becomes_the_input_size(name: str, size: tuple[int, int]) -> None:
    preprocess = Preprocess.from_timm(CONFIGS[name])
    result = preprocess(np.full((*size, 3), 200, np.uint8))
    assert result.dtype == np.uint8
    assert result.shape == (preprocess.height, preprocess.width, 3)
    assert set(np.unique(result).tolist()) == ({0, 200} if name == "crop beyond" else {200})


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (40, 50), (100, 450), (450, 100), (225, 223)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_small_and_long_images_are_preprocessed_like_timm(name: str, size: tuple[int, int]) -> None:
    pixels = make.scene(*size)
    ours = Preprocess.from_timm(CONFIGS[name])(pixels)
    assert levels(ours, by_timm(CONFIGS[name], Image.fromarray(pixels))).mean() < 0.5


@pytest.mark.parametrize("turned", [False, True])
def test_a_panorama_is_cropped_to_its_centre(turned: bool) -> None:
    pixels = make.scene(3000, 200)
    pixels = pixels.swapaxes(0, 1).copy() if turned else pixels
    ours = Preprocess.from_timm(LITE0)(pixels)
    assert levels(ours, by_timm(LITE0, Image.fromarray(pixels))).mean() < 1.0


def test_from_timm_reads_the_keys_of_timm() -> None:
    assert Preprocess.from_timm(CONFIGS["squash and crop"]) == Preprocess(
        height=224, width=224, resize=(248, 248), crop_mode="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    assert Preprocess.from_timm({}) == Preprocess(height=224, width=224, resize=(256,))
    assert Preprocess.from_timm({"input_size": [3, 240, 240], "crop_pct": 0.95, "mean": [0.4]}).mean == (0.4, 0.4, 0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "border"}, "crop_mode='border'.*center, squash"),
        ({"interpolation": "lanczos"}, "interpolation='lanczos'.*bicubic, bilinear, nearest"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"input_size": (1, 28, 28)}, "3 channels"),
        ({"input_size": (3, 0, 28)}, "1 or more"),
        ({"mean": (0.1, 0.2)}, "three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "no std of 0"),
    ],
)
def test_unsupported_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Preprocess.from_timm(LITE0 | change)


def test_squash_needs_two_sides() -> None:
    with pytest.raises(ModelError, match="resize needs 2 sides"):
        Preprocess(height=224, width=224, resize=(224,), crop_mode="squash")


def test_preprocess_is_a_value() -> None:
    one, other = Preprocess.from_timm(LITE0), Preprocess.from_timm(dict(LITE0))
    assert hash(one) == hash(other)
    plain = json.loads(json.dumps(dataclasses.asdict(one)))
    assert (
        Preprocess(**{key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}) == one
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_describe_names_what_matters(name: str) -> None:
    preprocess = Preprocess.from_timm(CONFIGS[name])
    sentence = preprocess.describe()
    assert f"centre {preprocess.height}x{preprocess.width}" in sentence
    assert preprocess.interpolation in sentence
    assert ("squashed" in sentence) == (preprocess.crop_mode == "squash")
    assert all(str(side) in sentence for side in preprocess.resize)


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("lite0", "224×224 px from 256 (crop 0.875), bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"),
        ("squash and crop", "224×224 px from 248×248 (squash, crop 0.903), bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"),
        ("tall", "256×128 px from 269×134 (crop 0.952), bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"),
    ],
)
def test_the_summary_has_the_important_numbers(name: str, summary: str) -> None:
    assert Preprocess.from_timm(CONFIGS[name]).summary() == summary


def test_preprocess_needs_no_torch() -> None:
    code = "import sys; from imgbatch.models.preprocess import Preprocess as P; P.from_timm({}).describe(); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

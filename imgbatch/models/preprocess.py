"""Values: the preprocessing of a model as one value: resize, crop, mean and standard deviation.

Resizing and cropping happen here, on uint8. The network normalises on its own device, so that at most 3×H×W bytes per image
are transferred.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imgbatch.config.sections import INTERPOLATIONS
from imgbatch.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    import torch

    from imgbatch.decode import Pixels

_CROP_MODES = ("center", "squash")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # also the defaults of timm
_CROP_PCT = 0.875

ONE_CHANNEL = (
    "Networks of one channel are not supported, since images are RGB. Convert it to three channels: repeat the weight of its "
    "first convolution three times along dimension 1, divided by 3 (weight.repeat(1, 3, 1, 1) / 3), set in_chans=3, and give "
    "mean and std three times each"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """Converts an image of any size to the input of a network. Part of the fingerprint."""

    height: int
    """Rows of the network's input."""
    width: int
    """Columns of the network's input."""
    resize: tuple[int, ...]
    """(side,): the shorter side becomes this. (h, w): squash resizes to this, center to the smallest size that covers it."""
    interpolation: str = "bicubic"
    """bicubic, bilinear or nearest; the first two with antialiasing, like Pillow."""
    crop_mode: str = "center"
    """center: keep the aspect ratio and crop the longer side. squash: keep the content and change the aspect ratio."""
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    """Of R, G and B, on the scale 0 to 1; subtracted by the network."""
    std: tuple[float, float, float] = _IMAGENET_STD
    """Of R, G and B, on the scale 0 to 1; the network divides by it."""

    def __post_init__(self) -> None:
        _require_choice("interpolation", self.interpolation, INTERPOLATIONS)
        _require_choice("crop_mode", self.crop_mode, _CROP_MODES)
        sides = (2,) if self.crop_mode == "squash" else (1, 2)
        if len(self.resize) not in sides or min(self.height, self.width, *self.resize) < 1:
            raise ModelError(
                f"preprocessing to {self.height}x{self.width} has resize={self.resize}, crop_mode={self.crop_mode!r}: "
                f"resize needs {' or '.join(map(str, sides))} sides, and every size must be 1 or more"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise ModelError(f"mean={self.mean}, std={self.std}: give three numbers each, and no std of 0")

    @classmethod
    def from_timm(cls, pretrained_cfg: Mapping[str, Any]) -> Preprocess:
        """Read timm's `pretrained_cfg` like its `create_transform` for evaluation, with the same defaults.

        Raises:
            ModelError: it needs something that is not supported.

        >>> Preprocess.from_timm({"input_size": (3, 224, 224), "crop_pct": 0.9}).resize
        (248,)
        """
        channels, height, width = pretrained_cfg.get("input_size") or (3, 224, 224)
        if channels != 3:
            hint = f". {ONE_CHANNEL}" if channels == 1 else ""
            raise ModelError(
                f"input_size={pretrained_cfg['input_size']}: only models of 3 channels (RGB) can be used{hint}"
            )
        crop_pct = pretrained_cfg.get("crop_pct") or _CROP_PCT
        crop_mode = pretrained_cfg.get("crop_mode") or "center"
        scaled = (math.floor(height / crop_pct), math.floor(width / crop_pct))
        return cls(
            height=height,
            width=width,
            resize=scaled[:1] if crop_mode == "center" and scaled[0] == scaled[1] else scaled,
            interpolation=pretrained_cfg.get("interpolation") or "bicubic",
            crop_mode=crop_mode,
            mean=_three_numbers(pretrained_cfg.get("mean") or _IMAGENET_MEAN),
            std=_three_numbers(pretrained_cfg.get("std") or _IMAGENET_STD),
        )

    @property
    def short_side(self) -> int:
        """The `short_side` for `decode`: no side of an image needs more pixels than this before the crop."""
        return max(self.resize)

    def __call__(self, pixels: Pixels) -> Pixels:
        """Resize and crop an image, uint8 (H, W, 3) of any size, to uint8 (height, width, 3).

        The crop is black outside the image. Resizing only the part that the crop keeps was slower: 0.41 and 0.51 ms per
        image in two variants, against 0.34 (2026-11-24, one core of an AMD EPYC).
        """
        import torch

        picture = self._trim_long_sides(torch.from_numpy(pixels).permute(2, 0, 1))
        resized = _resize(picture, self._scaled_size(*picture.shape[-2:]), self.interpolation)
        return self._centre(resized).permute(1, 2, 0).numpy()

    def describe(self) -> str:
        """Return the preprocessing as one sentence, which is part of the fingerprint.

        >>> Preprocess(height=224, width=224, resize=(256,), mean=(0.5,) * 3, std=(0.5,) * 3).describe()
        'shorter side to 256 (bicubic), centre 224x224, mean 0.5 0.5 0.5, std 0.5 0.5 0.5'
        """
        sides = "x".join(map(str, self.resize))
        if len(self.resize) == 1:
            scaled = f"shorter side to {sides}"
        else:
            scaled = f"squashed to {sides}" if self.crop_mode == "squash" else f"the least that covers {sides}"
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{scaled} ({self.interpolation}), centre {self.height}x{self.width}, mean {mean}, std {std}"

    def summary(self) -> str:
        """Return the preprocessing in timm's terms, for a person to check before a run.

        >>> Preprocess(height=224, width=224, resize=(256,), mean=(0.5,) * 3, std=(0.5,) * 3).summary()
        '224×224 px from 256 (crop 0.875), bicubic, mean 0.5 0.5 0.5, std 0.5 0.5 0.5'
        """
        sides = "×".join(map(str, self.resize))
        crop = f"{'squash, ' if self.crop_mode == 'squash' else ''}crop {self.height / self.resize[0]:.3g}"
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{self.height}×{self.width} px from {sides} ({crop}), {self.interpolation}, mean {mean}, std {std}"

    def _scaled_size(self, height: int, width: int) -> list[int]:
        """Return the size before the crop, rounded like torchvision (one side) and timm (two sides).

        >>> Preprocess(height=224, width=224, resize=(256,))._scaled_size(375, 500)
        [256, 341]
        """
        if self.crop_mode == "squash":
            return list(self.resize)
        if len(self.resize) == 1:
            side = self.resize[0]
            return [side, int(side * width / height)] if height <= width else [int(side * height / width), side]
        ratio = min(height / self.resize[0], width / self.resize[1])
        return [max(1, round(height / ratio)), max(1, round(width / ratio))]

    def _centre(self, picture: torch.Tensor) -> torch.Tensor:
        """Return the centre crop, like torchvision's center_crop; black where the image is smaller."""
        for axis, side in ((-2, self.height), (-1, self.width)):
            length = picture.shape[axis]
            if length > side:
                picture = picture.narrow(axis, round((length - side) / 2), side)
        rows, columns = self.height - picture.shape[-2], self.width - picture.shape[-1]
        if rows or columns:
            import torch

            sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
            picture = torch.nn.functional.pad(picture, sides)
        return picture

    def _trim_long_sides(self, picture: torch.Tensor) -> torch.Tensor:
        """Cut a long strip (a panorama, a line of 1×60,000 pixels) to its middle, with a margin around the crop.

        Otherwise resizing 1×60,000 to 256×15,360,000 would take 12 GB. Ordinary photos are unchanged. Both ends lose the
        same length, so that the centre does not move.
        """
        if self.crop_mode == "squash":
            return picture
        height, width = picture.shape[-2:]
        rows, columns = self.resize[0], self.resize[-1]
        ratio = min(height / rows, width / columns)
        for axis, length, crop in ((-2, height, self.height), (-1, width, self.width)):
            needed = 4 * math.ceil(max(crop, rows, columns) * ratio) + 16
            if length > needed:
                spare = (length - needed) // 2
                picture = picture.narrow(axis, spare, length - 2 * spare)
        return picture


def _resize(picture: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    """Resize uint8 (3, H, W) like torchvision's v2 transform, whose import would add 1.2 s to an actor's start."""
    from torch.backends import cpu
    from torch.nn.functional import interpolate

    # With one image the layout is ambiguous: torch keeps H×W×3 only if the first stride states it.
    strides = (picture.numel(), *picture.stride())
    batch = picture.as_strided((1, *picture.shape), strides)
    if interpolation == "nearest":  # nearest-exact selects the same pixels as Pillow
        return interpolate(batch, size, mode="nearest-exact")[0]
    native = "AVX" in cpu.get_cpu_capability()  # without AVX, bytes are slower than floats
    batch = batch if native else batch.float()
    resized = interpolate(batch, size, mode=interpolation, antialias=True, align_corners=False)[0]
    return resized if native else resized.round_().clamp_(0, 255).byte()


def _require_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = did_you_mean(str(value), allowed) or f"; supported: {', '.join(allowed)}"
        settable = f" (model.{key} sets another)" if key == "interpolation" else ""
        raise ModelError(f"the model's preprocessing has {key}={value!r}, which is not supported{hint}{settable}")


def _three_numbers(values: Any) -> tuple[float, float, float]:
    """Return three floats. One number is used for all channels, as in timm."""
    numbers = [float(value) for value in values]
    if len(numbers) not in (1, 3):
        raise ModelError(f"mean or std {numbers}: give three numbers")
    red, green, blue = numbers * 3 if len(numbers) == 1 else numbers
    return red, green, blue

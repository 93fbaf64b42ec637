"""Networks in torch: on GPUs, and on CPUs without OpenVINO. What CUDA alone can do has not been run on a card yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from imgbatch.errors import ClusterError
from imgbatch.models import Model, networks
from imgbatch.models.runtime import Pixels, Prediction, half, in_batches

if TYPE_CHECKING:
    from torch import nn


BATCH_SIZES = {"cpu": 32, "cuda": 128}


def choose_device(asked: str) -> torch.device:
    """Return the device of this process.

    Raises:
        ClusterError: CUDA was asked for and this node has none that works.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError("cluster.device=cuda, but torch finds no CUDA device on this node: check its driver")
    return torch.device("cuda")


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return the type that the network computes in; `auto`: 16 bits where the processor has instructions for it."""
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class Whole(torch.nn.Module):
    """Pixels (n, H, W, 3) in, the k best classes out: normalisation, softmax and top-k belong to the network.

    With `embeddings` a third output is (n, features): the input of the network's head, averaged where that is a map.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: Model, net: nn.Module, k: int, dtype: torch.dtype, embeddings: bool = False) -> None:
        super().__init__()
        self._seen: list[torch.Tensor] = []
        if embeddings:
            head = networks.head(net, len(model.labels))
            assert head is not None, "the driver has asked for the width of what it sees"
            head.register_forward_pre_hook(lambda _, seen: self._seen.append(seen[0]))
        self.net, self.k, self.dtype = net.eval().to(dtype), min(k, len(model.labels)), dtype
        # (pixel / 255 - mean) / std as one multiplication and one addition
        mean, std = model.preprocess.mean, model.preprocess.std
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # In 32 bits: a rounded scale would shift every pixel. The permuted view is what torch calls channels-last.
        normal = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift
        scores, ids = self.net(normal.to(self.dtype)).float().softmax(1).topk(self.k)
        if not self._seen:
            return scores, ids
        features = self._seen.pop().float()
        self._seen.clear()
        return scores, ids, features.mean((2, 3)) if features.ndim == 4 else features

    def check(self, model: Model) -> None:
        """Refuse a network that does not answer a blank image with one finite score for each label.

        Raises:
            ModelError: saying what it answers.
        """
        device = self.scale.device
        blank = torch.zeros((1, 3, model.preprocess.height, model.preprocess.width), dtype=self.dtype, device=device)
        networks.check(self.net, model.name, len(model.labels), blank.contiguous(memory_format=torch.channels_last))
        self._seen.clear()


class TorchRuntime:
    """Runs a model in batches of one size."""

    def __init__(
        self,
        model: Model,
        *,
        k: int,
        batch_size: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        embeddings: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.batch_size = batch_size or BATCH_SIZES[self.device.type]
        self._features = model.features if embeddings else None
        self._whole = Whole(model, model.network(), k, self.dtype, embeddings).to(self.device)
        self._whole.net.to(memory_format=torch.channels_last)
        self._whole.check(model)

    def __call__(self, pixels: Pixels) -> Prediction:
        """Return the best classes of n images, n ≥ 0.

        Where memory does not suffice, the batch is halved, for good, down to one image.
        """
        while True:
            try:
                return in_batches(pixels, self.batch_size, self._forward, self._whole.k, self._features)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        """Return what the run's record says of this runtime."""
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "runtime": f"torch {torch.__version__}",
            "batch_size": self.batch_size,
        }

    def _forward(self, batch: Pixels) -> Prediction:
        with torch.inference_mode():
            scores, ids, *features = self._whole(torch.from_numpy(batch).to(self.device, non_blocking=True))
        embeddings = half(features[0].cpu().numpy()) if features else None
        return Prediction(ids.cpu().numpy().astype(np.int32), scores.cpu().numpy(), embeddings)

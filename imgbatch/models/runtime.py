"""What executes a network: torch, on the device that the actor finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from imgbatch.errors import ClusterError, ModelError
from imgbatch.models import Model

if TYPE_CHECKING:
    from torch import nn


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
    """Return the type that the network computes in; `auto`: 16 bits where the processor has instructions for it.

    The half-precision choice on CUDA has not been run on a card yet.
    """
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class _Whole(torch.nn.Module):
    """Pixels in, the k best classes out: normalisation, softmax and top-k belong to the network."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], k: int) -> None:
        super().__init__()
        self.net, self.k = net, k
        self.dtype = next(net.parameters()).dtype
        # (pixel / 255 - mean) / std as one multiplication and one addition
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normal = pixels.float() * self.scale + self.shift  # in 32 bits: a rounded scale would shift every pixel
        logits = self.net(normal.to(self.dtype))
        return logits.float().softmax(1).topk(self.k)  # type: ignore[no-any-return]


@dataclass
class Prediction:
    """The k best classes of each image: (n, k) int32 ids and float32 probabilities, best first."""

    ids: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]


class TorchRuntime:
    """Runs a model in batches of one size."""

    def __init__(self, model: Model, *, k: int, batch_size: int, device: str = "auto", dtype: str = "auto") -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.batch_size = batch_size
        self.shape = (3, model.preprocess.height, model.preprocess.width)
        net = model.network().eval().to(self.device, self.dtype)
        net.to(memory_format=torch.channels_last)
        whole = _Whole(net, model.preprocess.mean, model.preprocess.std, min(k, len(model.labels)))
        self._net = whole.eval().to(self.device)
        self._check(model)

    def __call__(self, pixels: torch.Tensor) -> Prediction:
        """Return the best classes of n×3×H×W uint8 pixels, n ≥ 0, in any memory layout.

        Every forward pass has `batch_size` images, zeros where there are fewer, so that an image's answer does not
        depend on its company. Where memory does not suffice the size is halved, for good, down to one image.
        """
        ids, scores = [np.zeros((0, self._net.k), np.int32)], [np.zeros((0, self._net.k), np.float32)]
        start = 0
        while start < len(pixels):
            chunk = pixels[start : start + self.batch_size]
            try:
                best, classes = self._forward(chunk)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            ids.append(classes)
            scores.append(best)
            start += len(chunk)
        return Prediction(np.concatenate(ids), np.concatenate(scores))

    def facts(self) -> dict[str, object]:
        """Return what the run's record says of this runtime."""
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "runtime": f"torch {torch.__version__}",
            "batch_size": self.batch_size,
        }

    def _forward(self, chunk: torch.Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        if len(chunk) < self.batch_size:
            padding = chunk.new_zeros((self.batch_size - len(chunk), *chunk.shape[1:]))
            full = torch.cat([chunk, padding])
        else:
            full = chunk
        with torch.inference_mode():
            on_device = full.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            scores, ids = self._net(on_device)
        n = len(chunk)
        return scores[:n].cpu().numpy(), ids[:n].to("cpu", torch.int32).numpy()

    def _check(self, model: Model) -> None:
        """Refuse a network that does not answer a blank image with one finite score for each of its labels."""
        with torch.inference_mode():
            blank = torch.zeros((1, *self.shape), dtype=self.dtype, device=self.device)
            logits = self._net.net(blank.contiguous(memory_format=torch.channels_last))
        if logits.ndim != 2 or logits.shape[1] != len(model.labels):
            raise ModelError(f"{model.name}: {tuple(logits.shape)[1:]} logits for {len(model.labels)} labels")
        if not torch.isfinite(logits).all():
            raise ModelError(f"{model.name}: the answer to a blank image is not finite: the weights are damaged")

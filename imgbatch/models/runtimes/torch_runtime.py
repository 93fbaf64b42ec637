"""Effects: networks in torch: on GPUs, and on CPUs without OpenVINO. What CUDA alone can do has not been run on a card yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from imgbatch.errors import ClusterError
from imgbatch.models import architectures
from imgbatch.models.model import Model
from imgbatch.models.runtimes.base import Pixels, Prediction, in_batches, logits_in_batches, prediction

if TYPE_CHECKING:
    from torch import nn

Found = TypeVar("Found")

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
    """Pixels (n, H, W, 3) in, the k best classes out: normalisation, softmax, top-k and roll-up belong to the network.

    With `embeddings` the last output but one is (n, features): the input of the network's head, averaged where that is a map.
    The last output are the logits.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: Model, net: nn.Module, k: int, dtype: torch.dtype, embeddings: bool = False) -> None:
        super().__init__()
        self._seen: list[torch.Tensor] = []
        if embeddings:
            head = architectures.head(net, len(model.labels))
            assert head is not None, "the driver has asked for the width of what it sees"
            head.register_forward_pre_hook(lambda _, seen: self._seen.append(seen[0]))
        self.net, self.k, self.dtype = net.eval().to(dtype), min(k, len(model.labels)), dtype
        # (pixel / 255 - mean) / std as one multiplication and one addition
        mean, std = model.preprocess.mean, model.preprocess.std
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1))
        sums = model.taxonomy.sums() if model.taxonomy else []
        self.above = range(len(sums))
        for number, (children, starts) in enumerate(sums):
            self.register_buffer(f"children{number}", torch.from_numpy(children))
            self.register_buffer(f"starts{number}", torch.from_numpy(starts))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return scores and ids, (n, k); with a taxonomy also those of the best node of each level above, coarse to fine."""
        # In 32 bits: a rounded scale would shift every pixel. The permuted view is what torch calls channels-last.
        normal = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift
        logits = self.net(normal.to(self.dtype)).float()
        probabilities = logits.softmax(1)
        found = (*probabilities.topk(self.k), *(self._rolled_up(probabilities) if self.above else ()))
        if not self._seen:
            return (*found, logits)
        features = self._seen.pop().float()
        self._seen.clear()
        return (*found, features.mean((2, 3)) if features.ndim == 4 else features, logits)

    def _rolled_up(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Taxonomy.roll_up`. 2.5 µs an image for ImageNet, 164 as sums over padded rows (OpenVINO, one core, 2026-11-24).

        Additions alone: OpenVINO would multiply by a matrix in 16 bits.
        """
        level, best = probabilities.T, list[tuple[torch.Tensor, torch.Tensor]]()
        for number in self.above:
            children, starts = getattr(self, f"children{number}"), getattr(self, f"starts{number}")
            level = torch.nn.functional.embedding_bag(children, level, starts, mode="sum")
            best.insert(0, level.topk(1, 0))
        # Rounding may have made a sum 1.0000002.
        return torch.cat([each[0] for each in best]).T.clamp(max=1), torch.cat([each[1] for each in best]).T

    def check(self, model: Model) -> None:
        """Refuse a network that does not answer a blank image with one finite score for each label.

        Raises:
            ModelError: saying what it answers.
        """
        device = self.scale.device
        blank = torch.zeros((1, 3, model.preprocess.height, model.preprocess.width), dtype=self.dtype, device=device)
        architectures.check(
            self.net, model.name, len(model.labels), blank.contiguous(memory_format=torch.channels_last)
        )
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
        """Return the best classes of n images, n ≥ 0."""
        return self._halving(lambda: in_batches(pixels, self.batch_size, self._forward, self._whole.k, self._features))

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits of n images, n ≥ 0."""
        return self._halving(
            lambda: logits_in_batches(pixels, self.batch_size, lambda batch: self._outputs(batch)[-1].cpu().numpy())
        )

    def _halving(self, run: Callable[[], Found]) -> Found:
        """Return run(). Where memory does not suffice, the batch is halved, down to one image; it stays at that size."""
        while True:
            try:
                return run()
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
        return prediction([each.cpu().numpy() for each in self._outputs(batch)[:-1]])

    def _outputs(self, batch: Pixels) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            found: tuple[torch.Tensor, ...] = self._whole(torch.from_numpy(batch).to(self.device, non_blocking=True))
        return found

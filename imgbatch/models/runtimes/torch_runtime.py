"""Effects: networks in torch: on GPUs, and on CPUs without OpenVINO.

The parts that need CUDA have not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from imgbatch.errors import ClusterError
from imgbatch.models import architectures
from imgbatch.models.model import Model
from imgbatch.models.runtimes.base import Pixels, Prediction, logits_of_batches, run_in_batches

if TYPE_CHECKING:
    from torch import nn

Result = TypeVar("Result")

BATCH_SIZES = {"cpu": 32, "cuda": 128}


def choose_device(device: str) -> torch.device:
    """Return the device of this process; `auto` is CUDA if torch finds a device.

    Raises:
        ClusterError: CUDA was requested, and torch finds no CUDA device on this node.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError("cluster.device=cuda, but torch finds no CUDA device on this node: check its NVIDIA driver")
    return torch.device("cuda")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the type of the network's computation; `auto` is a 16-bit type if the processor has instructions for it."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


class EndToEndModel(torch.nn.Module):
    """A network with normalisation, softmax, top-k and roll-up: from pixels (n, H, W, 3) to the k best classes.

    The last output is the logits. With `embeddings`, the second-to-last output is the input of the network's head,
    (n, features); a feature map is averaged.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: Model, net: nn.Module, k: int, dtype: torch.dtype, embeddings: bool = False) -> None:
        super().__init__()
        self._head_inputs: list[torch.Tensor] = []
        if embeddings:
            head = architectures.find_head(net, len(model.labels))
            assert head is not None, "the driver has checked that the model has embeddings"
            head.register_forward_pre_hook(lambda _, inputs: self._head_inputs.append(inputs[0]))
        self.net, self.k, self.dtype = net.eval().to(dtype), min(k, len(model.labels)), dtype
        # (pixel / 255 - mean) / std, as one multiplication and one addition
        mean, std = model.preprocess.mean, model.preprocess.std
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1))
        sums = model.taxonomy.sums() if model.taxonomy else []
        self.levels_above = range(len(sums))
        for number, (children, starts) in enumerate(sums):
            self.register_buffer(f"children{number}", torch.from_numpy(children))
            self.register_buffer(f"starts{number}", torch.from_numpy(starts))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return scores and ids, (n, k); with a taxonomy, also of the best node of each level above, coarse to fine."""
        # In 32 bits, since a rounded scale would shift every pixel. The permuted view has the layout channels_last of torch.
        normal = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift
        logits = self.net(normal.to(self.dtype)).float()
        probabilities = logits.softmax(1)
        outputs = (*probabilities.topk(self.k), *(self._roll_up(probabilities) if self.levels_above else ()))
        if not self._head_inputs:
            return (*outputs, logits)
        features = self._head_inputs.pop().float()
        self._head_inputs.clear()
        return (*outputs, features.mean((2, 3)) if features.ndim == 4 else features, logits)

    def _roll_up(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and ids of the best node of each level, like `Taxonomy.roll_up`.

        It takes 2.5 µs per image for ImageNet; sums over padded rows take 164 (OpenVINO, one core, 2026-11-24). It only adds,
        since OpenVINO would compute a matrix product in 16 bits.
        """
        level, best = probabilities.T, list[tuple[torch.Tensor, torch.Tensor]]()
        for number in self.levels_above:
            children, starts = getattr(self, f"children{number}"), getattr(self, f"starts{number}")
            level = torch.nn.functional.embedding_bag(children, level, starts, mode="sum")
            best.insert(0, level.topk(1, 0))
        # Rounding may give a sum of 1.0000002.
        scores, ids = zip(*best, strict=True)
        return torch.cat(scores).T.clamp(max=1), torch.cat(ids).T

    def check(self, model: Model) -> None:
        """Raise if the network does not return one finite logit per label for a blank image.

        Raises:
            ModelError: with the actual output.
        """
        device = self.scale.device
        blank = torch.zeros((1, 3, model.preprocess.height, model.preprocess.width), dtype=self.dtype, device=device)
        architectures.require_logits(
            self.net, model.name, len(model.labels), blank.contiguous(memory_format=torch.channels_last)
        )
        self._head_inputs.clear()


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
        self._end_to_end = EndToEndModel(model, model.network(), k, self.dtype, embeddings).to(self.device)
        self._end_to_end.net.to(memory_format=torch.channels_last)
        self._end_to_end.check(model)

    def __call__(self, pixels: Pixels) -> Prediction:
        """Return the best classes of n images, n ≥ 0."""
        return self._with_smaller_batches(
            lambda: run_in_batches(pixels, self.batch_size, self._forward, self._end_to_end.k, self._features)
        )

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits of n images, n ≥ 0."""
        return self._with_smaller_batches(
            lambda: logits_of_batches(pixels, self.batch_size, lambda batch: self._outputs(batch)[-1].cpu().numpy())
        )

    def _with_smaller_batches(self, run: Callable[[], Result]) -> Result:
        """Return run(). If memory does not suffice, halve the batch size, down to one image, and keep the smaller size."""
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
        """Return device, dtype, runtime and batch size for the run record."""
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "runtime": f"torch {torch.__version__}",
            "batch_size": self.batch_size,
        }

    def _forward(self, batch: Pixels) -> Prediction:
        return Prediction.from_outputs([output.cpu().numpy() for output in self._outputs(batch)[:-1]])

    def _outputs(self, batch: Pixels) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            outputs: tuple[torch.Tensor, ...] = self._end_to_end(
                torch.from_numpy(batch).to(self.device, non_blocking=True)
            )
        return outputs

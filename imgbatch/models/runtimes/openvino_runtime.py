"""Effects: networks in OpenVINO, on CPUs.

It takes 5.4 ms per image, torch 14.6 (EfficientNet-Lite0, bf16, one core; docs/LOG.md). A network is converted once per node,
compared with torch, and stored in the node's cache. A process that reads it from there needs neither timm nor the weights.
"""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

import imgbatch
from imgbatch.models import node_cache
from imgbatch.models.model import Model
from imgbatch.models.runtimes.base import Pixels, Prediction, logits_of_batches, run_in_batches

_MAX_DIFFERENCE = 0.01  # of probabilities, between OpenVINO and torch, both in 32 bits
_COMPARED_IMAGES = 4
BATCH_SIZE = 8
"""4.9 ms per image; batches of 1, 32 and 128 take 5.4, 5.5 and 5.8 (EfficientNet-Lite0, bf16, one core, 2026-11-24)."""

_NETWORK = "network.xml"
_OUTPUTS_VERSION = 2  # to be increased when the outputs of the network change


class ConversionError(Exception):
    """OpenVINO cannot convert this network, or its results differ from those of torch."""


class ConversionUnreadable(RuntimeError):
    """OpenVINO cannot load the converted network that has this stamp in the node's cache."""

    def __init__(self, stamp: str, message: str) -> None:
        super().__init__(f"the converted network cannot be loaded: {message.strip().splitlines()[-1]}")
        self.stamp = stamp


class OpenVinoRuntime:
    """Runs a model on one core, in batches of one size; processes, not threads, use the other cores."""

    def __init__(
        self,
        model: Model,
        *,
        k: int,
        batch_size: int | None = None,
        dtype: str = "auto",
        embeddings: bool = False,
        rejected_stamp: str | None = None,
    ) -> None:
        self.batch_size, self._k = batch_size or BATCH_SIZE, min(k, len(model.labels))
        core = get_core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._dtype = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(dtype, "bf16" if has_bf16 else "f32")
        self._features = model.features if embeddings else None
        converted = node_cache.get_or_make(
            f"openvino-{_key(model, self._k, embeddings)}",
            lambda path: _convert(model, self._k, embeddings, path),
            rejected_stamp=rejected_stamp,
        )
        self.stamp = node_cache.stamp(converted)
        options = {
            "INFERENCE_PRECISION_HINT": self._dtype,
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            # With pinning, all processes use the same core: 157 images per second on two cores instead of 240.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            network = core.read_model(converted / _NETWORK)
            network.reshape([self.batch_size, model.preprocess.height, model.preprocess.width, 3])
            self._request = core.compile_model(network, "CPU", options).create_infer_request()
        except RuntimeError as error:
            raise ConversionUnreadable(self.stamp, str(error)) from error

    def __call__(self, pixels: Pixels) -> Prediction:
        """Return the best classes of n images, n ≥ 0."""
        return run_in_batches(pixels, self.batch_size, self._forward, self._k, self._features)

    def facts(self) -> dict[str, Any]:
        """Return device, dtype, runtime and batch size for the run record."""
        names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
        return {
            "device": "cpu",
            "dtype": names[self._dtype],
            "runtime": f"openvino {openvino.__version__.partition('-')[0]}",
            "batch_size": self.batch_size,
        }

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits of n images, n ≥ 0."""
        return logits_of_batches(pixels, self.batch_size, lambda batch: self._outputs(batch)[-1])

    def _forward(self, batch: Pixels) -> Prediction:
        return Prediction.from_outputs(self._outputs(batch)[:-1])

    def _outputs(self, batch: Pixels) -> list[npt.NDArray[Any]]:
        return list(self._request.infer([batch], share_inputs=True, share_outputs=True).values())


@cache
def get_core() -> openvino.Core:
    """Return the one core of this process, which is never unloaded.

    The CPU plugin gives the thread that loads it an alternate signal stack, and unmaps it in the thread that unloads it. Where
    these are two threads, for example because the garbage collector ran in another one, the next signal ends the process with
    SIGSEGV (OpenVINO 2026.4).
    """
    return openvino.Core()


def _key(model: Model, k: int, embeddings: bool) -> str:
    """Return a key of the converted network that depends on all of its inputs."""
    parts = [
        _OUTPUTS_VERSION,
        model.digest,
        model.fingerprint(),
        k,
        embeddings,
        imgbatch.__version__,
        openvino.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _convert(model: Model, k: int, embeddings: bool, path: Path) -> None:
    """Convert the network and write it into a new folder, if its results agree with torch.

    The network is traced, since exporting takes three times as long. The comparison detects errors of tracing.

    Raises:
        ConversionError: it cannot be converted, or the results differ.
        ModelError: the network does not return finite logits.
    """
    import torch

    from imgbatch.models.runtimes.torch_runtime import EndToEndModel

    end_to_end = EndToEndModel(model, model.network(), k, torch.float32, embeddings)
    end_to_end.check(model)
    shape = (_COMPARED_IMAGES, model.preprocess.height, model.preprocess.width, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch.jit's deprecation, and about constants
        expected = [output.numpy() for output in end_to_end(pixels)]
        try:
            network = openvino.convert_model(end_to_end.eval(), example_input=pixels)
            compiled = get_core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            outputs = [np.array(output) for output in compiled([pixels.numpy()]).values()]
        except Exception as error:
            raise ConversionError(str(error).splitlines()[0]) from error
    # the outputs with scores of classes and, with a taxonomy, of nodes
    scores = slice(0, 4 if model.taxonomy else 2, 2)
    difference = max(
        float(np.abs(output - reference).max())
        for output, reference in zip(outputs[scores], expected[scores], strict=True)
    )
    if not difference <= _MAX_DIFFERENCE:
        raise ConversionError(f"its probabilities differ from those of torch by up to {difference:.3f}")
    path.mkdir()
    try:
        openvino.save_model(network, path / _NETWORK, compress_to_fp16=False)
        get_core().read_model(path / _NETWORK)  # a full disk truncates the file without an error
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, f"the converted network cannot be written: {str(error).splitlines()[0]}") from error

"""Effects: networks in OpenVINO, on CPUs: 5.4 ms an image where torch takes 14.6 (EfficientNet-Lite0, bf16, one core;
docs/LOG.md).

A network is converted once a node, held against torch's own answers, and kept in the node's cache. A process that finds it
there needs neither timm nor the weights.
"""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

import imgbatch
from imgbatch.models import node_cache
from imgbatch.models.model import Model
from imgbatch.models.runtimes.base import Pixels, Prediction, in_batches, logits_in_batches, prediction

_MOST_DIFFERENCE = 0.01  # of a probability, between OpenVINO and torch, both in 32 bits
_TRIED = 4
BATCH_SIZE = 8
"""4.9 ms an image; batches of 1, 32 and 128 take 5.4, 5.5 and 5.8 (EfficientNet-Lite0, bf16, one core, 2026-11-24)."""

_NETWORK = "network.xml"
_OUTPUTS = 2  # with another number of it, the network has other outputs


class NotConverted(Exception):
    """OpenVINO cannot convert this network, or answers otherwise than torch."""


class Unreadable(RuntimeError):
    """OpenVINO cannot load the network that the node keeps under a stamp."""

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
        doubted: str | None = None,
    ) -> None:
        self.batch_size, self._k = batch_size or BATCH_SIZE, min(k, len(model.labels))
        core = openvino.Core()
        able = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._dtype = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(dtype, "bf16" if able else "f32")
        self._features = model.features if embeddings else None
        converted = node_cache.once(
            f"openvino-{_key(model, self._k, embeddings)}",
            lambda path: _convert(model, self._k, embeddings, path),
            doubted=doubted,
        )
        self.stamp = node_cache.stamp(converted)
        options = {
            "INFERENCE_PRECISION_HINT": self._dtype,
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            # Every process would pin its thread to the same core: 157 images a second on two cores instead of 240.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            network = core.read_model(converted / _NETWORK)
            network.reshape([self.batch_size, model.preprocess.height, model.preprocess.width, 3])
            self._request = core.compile_model(network, "CPU", options).create_infer_request()
        except RuntimeError as error:
            raise Unreadable(self.stamp, str(error)) from error

    def __call__(self, pixels: Pixels) -> Prediction:
        """Return the best classes of n images, n ≥ 0."""
        return in_batches(pixels, self.batch_size, self._forward, self._k, self._features)

    def facts(self) -> dict[str, Any]:
        """Return what the run's record says of this runtime."""
        names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
        return {
            "device": "cpu",
            "dtype": names[self._dtype],
            "runtime": f"openvino {openvino.__version__.partition('-')[0]}",
            "batch_size": self.batch_size,
        }

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits of n images, n ≥ 0."""
        return logits_in_batches(pixels, self.batch_size, lambda batch: self._outputs(batch)[-1])

    def _forward(self, batch: Pixels) -> Prediction:
        return prediction(self._outputs(batch)[:-1])

    def _outputs(self, batch: Pixels) -> list[npt.NDArray[Any]]:
        return list(self._request.infer([batch], share_inputs=True, share_outputs=True).values())


def _key(model: Model, k: int, embeddings: bool) -> str:
    """Return a name for the converted network that changes with everything that it was made of."""
    made_of = [_OUTPUTS, model.digest, model.fingerprint(), k, embeddings, imgbatch.__version__, openvino.__version__]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _convert(model: Model, k: int, embeddings: bool, path: Path) -> None:
    """Write the network into a new folder as OpenVINO has it, if it answers as torch does.

    Tracing is used since exporting takes three times as long; what tracing gets wrong shows in the comparison.

    Raises:
        NotConverted: it does not, or cannot be converted.
        ModelError: the network itself is unsound.
    """
    import torch

    from imgbatch.models.runtimes.torch_runtime import Whole

    whole = Whole(model, model.network(), k, torch.float32, embeddings)
    whole.check(model)
    shape = (_TRIED, model.preprocess.height, model.preprocess.width, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation, and its remarks on constants
        expected = [found.numpy() for found in whole(pixels)]
        try:
            network = openvino.convert_model(whole.eval(), example_input=pixels)
            compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            found = [np.array(output) for output in compiled([pixels.numpy()]).values()]
        except Exception as error:
            raise NotConverted(str(error).splitlines()[0]) from error
    scores = slice(0, 4 if model.taxonomy else 2, 2)  # of classes and, with a taxonomy, of nodes
    difference = max(
        float(np.abs(ours - theirs).max()) for ours, theirs in zip(found[scores], expected[scores], strict=True)
    )
    if not difference <= _MOST_DIFFERENCE:
        raise NotConverted(f"its probabilities differ from torch's by up to {difference:.3f}")
    path.mkdir()
    try:
        openvino.save_model(network, path / _NETWORK, compress_to_fp16=False)
        openvino.Core().read_model(path / _NETWORK)  # a disk that is full cuts it off, without a word
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, f"the converted network cannot be written: {str(error).splitlines()[0]}") from error

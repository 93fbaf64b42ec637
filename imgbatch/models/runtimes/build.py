"""Effects: what executes a model on this node: OpenVINO on CPUs, torch on GPUs and as the fallback; checked before use."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.config.sections import ClassifyConfig
from imgbatch.errors import Full, ModelError
from imgbatch.models import self_check
from imgbatch.models.model import Model
from imgbatch.models.runtimes.base import Pixels, Prediction, Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Repaired:
    """A runtime that was found after another one had failed its check on this node."""

    runtime: Runtime
    fault: str
    """What was wrong, and what is used in its place."""

    def __call__(self, pixels: Pixels) -> Prediction:
        """Return the best classes of n images."""
        return self.runtime(pixels)

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits of n images."""
        return self.runtime.logits(pixels)

    def facts(self) -> dict[str, Any]:
        """Return the facts of the runtime, and the fault under the name of this host."""
        return {**self.runtime.facts(), "node_faults": {socket.gethostname(): self.fault}}


def build_checked(model: Model, *, k: int, device: str, config: ClassifyConfig, embeddings: bool = False) -> Runtime:
    """Build what executes the model in this process, and compare its answer to fixed images with the model's reference.

    Where they differ, the network that the node keeps is made again, once; where they differ still, torch takes its place, in
    32 bits.

    Raises:
        Disagrees: torch does not agree either: this node cannot be used.
        Others: as `build`.
    """
    known: dict[str, Any] = {"k": k, "device": device, "embeddings": embeddings}
    in_torch = replace(config, runtime="torch", dtype="float32")
    faults: list[str] = []
    doubted = ""
    for chosen, what in ((config, ""), (config, "made again"), (in_torch, "torch in 32 bits is used")):
        if faults and chosen is config and not doubted:
            continue  # nothing of it is kept on the node
        runtime: Runtime | None = None
        try:
            runtime = build(model, config=chosen, doubted=doubted or None, **known)
            self_check.require(model, runtime)
        except (self_check.Disagrees, Full, OSError, RuntimeError) as error:
            if not isinstance(error, self_check.Disagrees):
                log.warning("%s cannot be run on this node", model.name, exc_info=True)
            faults.append((str(error).strip() or repr(error)).splitlines()[0][:300])
            log.warning("%s: the check of this worker failed: %s", model.name, faults[-1])
            doubted = getattr(runtime, "stamp", "") or getattr(error, "stamp", "")
            continue
        return Repaired(runtime, f"{faults[0]}: {what}") if faults else runtime
    raise self_check.Disagrees(faults[-1])


def build(
    model: Model,
    *,
    k: int,
    device: str,
    config: ClassifyConfig,
    embeddings: bool = False,
    doubted: str | None = None,
) -> Runtime:
    """Build what executes the model in this process; with `embeddings`, each prediction has them.

    Args:
        doubted: the `stamp` of a converted network that is to be made again.

    Raises:
        ClusterError: CUDA was asked for and this node has none that works.
        ModelError: weights and network do not fit, or the answer to a blank image is not finite.
    """
    from_torch = config.runtime == "torch" or (config.runtime == "auto" and find_spec("openvino") is None)
    if not from_torch and not _on_gpu(device):
        from imgbatch.models.runtimes import openvino_runtime

        try:
            return openvino_runtime.OpenVinoRuntime(
                model, k=k, batch_size=config.batch_size, dtype=config.dtype, embeddings=embeddings, doubted=doubted
            )
        except openvino_runtime.NotConverted as error:
            if config.runtime == "openvino":
                raise ModelError(f"{model.name} cannot run in OpenVINO: {error}") from error
            log.warning("%s runs in torch, since it cannot run in OpenVINO: %s", model.name, error)
    from imgbatch.models.runtimes.torch_runtime import TorchRuntime

    return TorchRuntime(
        model, k=k, batch_size=config.batch_size, device=device, dtype=config.dtype, embeddings=embeddings
    )


def _on_gpu(device: str) -> bool:
    if device == "cpu":
        return False
    import torch

    return device == "cuda" or torch.cuda.is_available()

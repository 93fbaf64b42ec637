"""Effects: selection of the runtime for a model on this node: OpenVINO on CPUs, torch on GPUs and as the fallback."""

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
class FallbackRuntime:
    """A runtime that replaces one whose self-check failed on this node."""

    runtime: Runtime
    fault: str
    """The failure, and the replacement."""

    def __call__(self, pixels: Pixels) -> Prediction:
        """Return the best classes of n images."""
        return self.runtime(pixels)

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits of n images."""
        return self.runtime.logits(pixels)

    def facts(self) -> dict[str, Any]:
        """Return the facts of the runtime, and the fault by the name of this host."""
        return {**self.runtime.facts(), "node_faults": {socket.gethostname(): self.fault}}


def build_checked(model: Model, *, k: int, device: str, config: ClassifyConfig, embeddings: bool = False) -> Runtime:
    """Build the runtime of a model in this process, and compare its logits for fixed images with the model's reference.

    If they differ, the converted network in the node's cache is made again, once. If they still differ, torch in 32 bits
    is used.

    Raises:
        SelfCheckError: torch in 32 bits fails the check as well: this node cannot be used.
        Others: as `build`.
    """
    arguments: dict[str, Any] = {"k": k, "device": device, "embeddings": embeddings}
    in_torch = replace(config, runtime="torch", dtype="float32")
    faults: list[str] = []
    rejected_stamp = ""
    for attempt, remedy in ((config, ""), (config, "made again"), (in_torch, "torch in 32 bits is used")):
        if faults and attempt is config and not rejected_stamp:
            continue  # the node's cache has no converted network that could be made again
        runtime: Runtime | None = None
        try:
            runtime = build(model, config=attempt, rejected_stamp=rejected_stamp or None, **arguments)
            self_check.run_check(model, runtime)
        except (self_check.SelfCheckError, Full, OSError, RuntimeError) as error:
            if not isinstance(error, self_check.SelfCheckError):
                log.warning("%s does not run on this node", model.name, exc_info=True)
            faults.append((str(error).strip() or repr(error)).splitlines()[0][:300])
            log.warning("%s: the check of this worker failed: %s", model.name, faults[-1])
            rejected_stamp = getattr(runtime, "stamp", "") or getattr(error, "stamp", "")
            continue
        return FallbackRuntime(runtime, f"{faults[0]}: {remedy}") if faults else runtime
    raise self_check.SelfCheckError(faults[-1])


def build(
    model: Model,
    *,
    k: int,
    device: str,
    config: ClassifyConfig,
    embeddings: bool = False,
    rejected_stamp: str | None = None,
) -> Runtime:
    """Build the runtime of a model in this process; with `embeddings`, each prediction has them.

    Args:
        rejected_stamp: the `stamp` of a converted network that must be made again.

    Raises:
        ClusterError: CUDA was requested, and torch finds no CUDA device on this node.
        ModelError: the weights do not fit the network, or the logits of a blank image are not finite.
    """
    from_torch = config.runtime == "torch" or (config.runtime == "auto" and find_spec("openvino") is None)
    if not from_torch and not _on_gpu(device):
        from imgbatch.models.runtimes import openvino_runtime

        try:
            return openvino_runtime.OpenVinoRuntime(
                model,
                k=k,
                batch_size=config.batch_size,
                dtype=config.dtype,
                embeddings=embeddings,
                rejected_stamp=rejected_stamp,
            )
        except openvino_runtime.ConversionError as error:
            if config.runtime == "openvino":
                raise ModelError(f"OpenVINO cannot run {model.name}: {error}; set classify.runtime=torch") from error
            log.warning("%s runs in torch, since OpenVINO cannot run it: %s", model.name, error)
    from imgbatch.models.runtimes.torch_runtime import TorchRuntime

    return TorchRuntime(
        model, k=k, batch_size=config.batch_size, device=device, dtype=config.dtype, embeddings=embeddings
    )


def _on_gpu(device: str) -> bool:
    if device == "cpu":
        return False
    import torch

    return device == "cuda" or torch.cuda.is_available()

"""A model is one value: network, preprocessing, labels and digest belong together and travel together.

The driver reads what a model says of itself and never imports torch for it; the network is built in the actors.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imgbatch.errors import ModelError
from imgbatch.preprocess import Preprocess
from imgbatch.storage import Stores
from imgbatch.taxonomy import Taxonomy

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Model", "load"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What labels images, before its network is built."""

    name: str
    digest: str
    """SHA-256, in hex, of the bytes of its weights and of its description."""
    labels: tuple[str, ...]
    """The names of the classes, in the order of the logits."""
    preprocess: Preprocess
    taxonomy: Taxonomy | None = None
    network: Callable[[], nn.Module]
    """Builds the network with its weights: N×3×H×W normalised floats in, N×len(labels) logits out.

    It is called in the process that runs it, and raises ModelError where weights and network do not fit.
    """

    @property
    def reference(self) -> str:
        """Name and digest, as rows carry them."""
        return f"{self.name}@{self.digest[:12]}"

    def fingerprint(self) -> dict[str, Any]:
        """Return what makes two models' labels comparable."""
        names = hashlib.sha256("\n".join(self.labels).encode()).hexdigest()
        return {
            "weights": self.digest,
            "labels": names,
            "preprocess": self.preprocess.describe(),
            "taxonomy": self.taxonomy.digest if self.taxonomy else None,
        }


def load(name: str, stores: Stores) -> Model:
    """Return the model of that name, or in the model directory of that URI.

    Raises:
        ModelError: there is no such model, or its directory is not whole.
    """
    from imgbatch.models import directory, zoo

    if name in zoo.MODELS:
        return zoo.MODELS[name]()
    if "/" in name or name.startswith("."):
        return directory.read(name, stores)
    close = difflib.get_close_matches(name, zoo.MODELS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(zoo.MODELS)}"
    raise ModelError(f"unknown model {name!r}; {hint} A model directory is given by its path or URI, e.g. ./{name}")

"""Effects: a model is one value: network, preprocessing, labels and digest belong together and travel together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from imgbatch.errors import ModelError
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.taxonomy import Taxonomy

if TYPE_CHECKING:
    from torch import nn


_SHOWN = 3


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

    features: int | None = None
    """How many numbers an embedding has: what the head of the network sees. None: no single layer is its head."""

    logits: bytes | None = field(default=None, repr=False, compare=False)
    """The reference of `selfcheck`: the logits of its images in 32 bits; None: workers do not check themselves."""

    @property
    def reference(self) -> str:
        """Name and digest, as rows carry them."""
        return f"{self.name}@{self.digest[:12]}"

    @property
    def slug(self) -> str:
        """The name as it may stand in a path.

        >>> Model(name="timm:resnet50.a1_in1k", digest="", labels=(), preprocess=None, network=list).slug
        'timm-resnet50.a1_in1k'
        """
        return re.sub("[:@]", "-", self.name.rstrip("/").rpartition("/")[2])

    def width(self) -> int:
        """Return how many numbers an embedding has.

        Raises:
            ModelError: there are none to be had.
        """
        if self.features is None:
            raise ModelError(f"output.embeddings: {self.name} has no single layer that makes its logits")
        return self.features

    def summary(self) -> str:
        """Return in one line what the model is shown and what it tells apart."""
        more = ", …" if len(self.labels) > _SHOWN else ""
        levels = f"; levels {', '.join(level.name for level in self.taxonomy.levels)}" if self.taxonomy else ""
        return (
            f"{self.reference}: {self.preprocess.summary()}; {len(self.labels):,} classes: "
            f"{', '.join(self.labels[:_SHOWN])}{more}{levels}"
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what makes two models' labels comparable."""
        names = hashlib.sha256("\n".join(self.labels).encode()).hexdigest()
        return {
            "weights": self.digest,
            "labels": names,
            "preprocess": self.preprocess.describe(),
            "taxonomy": self.taxonomy.digest if self.taxonomy else None,
        }

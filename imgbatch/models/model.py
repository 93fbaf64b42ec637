"""Effects: a model as one value: network, preprocessing, labels and digest."""

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
    """A model, before its network is built."""

    name: str
    digest: str
    """SHA-256, in hex, of its weights and its description."""
    labels: tuple[str, ...]
    """The names of the classes, in the order of the logits."""
    preprocess: Preprocess
    taxonomy: Taxonomy | None = None
    network: Callable[[], nn.Module]
    """Builds the network with its weights: N×3×H×W normalised floats in, N×len(labels) logits out.

    The process that runs the network calls it. It raises ModelError if the weights do not fit the network.
    """

    features: int | None = None
    """The size of an embedding, which is the input of the network's head. None: the head is not a single layer."""

    logits: bytes | None = field(default=None, repr=False, compare=False)
    """The reference of `self_check`: the logits of its images in 32 bits. None: workers skip the check."""

    @property
    def reference(self) -> str:
        """Name and digest, as in the column `model`."""
        return f"{self.name}@{self.digest[:12]}"

    @property
    def slug(self) -> str:
        """The name in a form for paths.

        >>> Model(name="timm:resnet50.a1_in1k", digest="", labels=(), preprocess=None, network=list).slug
        'timm-resnet50.a1_in1k'
        """
        return re.sub("[:@]", "-", self.name.rstrip("/").rpartition("/")[2])

    def width(self) -> int:
        """Return the size of an embedding.

        Raises:
            ModelError: the model has no embeddings.
        """
        if self.features is None:
            raise ModelError(
                f"output.embeddings: {self.name} has no embeddings, since no single layer computes its logits"
            )
        return self.features

    def summary(self) -> str:
        """Return the preprocessing and the classes of the model in one line."""
        ellipsis = ", …" if len(self.labels) > _SHOWN else ""
        levels = f"; levels {', '.join(level.name for level in self.taxonomy.levels)}" if self.taxonomy else ""
        return (
            f"{self.reference}: {self.preprocess.summary()}; {len(self.labels):,} classes: "
            f"{', '.join(self.labels[:_SHOWN])}{ellipsis}{levels}"
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that must be equal so that the labels of two models are comparable."""
        names = hashlib.sha256("\n".join(self.labels).encode()).hexdigest()
        return {
            "weights": self.digest,
            "labels": names,
            "preprocess": self.preprocess.describe(),
            "taxonomy": self.taxonomy.digest if self.taxonomy else None,
        }

"""Effects: the checkpoint of a fine-tuning: its state and weights after an epoch, in the folder of the run."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from imgbatch.errors import NotFound
from imgbatch.storage.stores import Folder

FILE = "checkpoint.pt"
LEARN, REFIT = "learn", "refit"


@dataclass
class State:
    """The progress of a run. Its fields are part of the checkpoint: if one is renamed, older checkpoints cannot be read."""

    phase: str = LEARN
    epoch: int = 0
    """Number of finished epochs of the phase."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """A record for each finished epoch."""
    best_loss: float = math.inf
    best_epoch: int = 0
    best_logits: torch.Tensor | None = None
    """Of the held-out images at the best epoch: the one with the lowest loss if there is patience, else the last one."""
    mirrors: bool = False
    """Whether, at the best epoch, mirrored held-out images are classified not worse than unmirrored ones."""


def read(run: Folder) -> bytes:
    """Return the content of the last checkpoint; empty if there is none."""
    try:
        return run.read(FILE)
    except NotFound:
        return b""


def decode(content: bytes) -> tuple[State, dict[str, Any]]:
    """Return the state, and the tensors: `net`, `best`, `optimiser` and `schedule`."""
    checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return State(**checkpoint.pop("state")), checkpoint


def write(run: Folder, state: State, tensors: dict[str, Any]) -> None:
    """Replace the checkpoint."""
    content = io.BytesIO()
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    torch.save({"state": fields, **tensors}, content)
    run.put(FILE, content.getvalue())

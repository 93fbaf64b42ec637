"""Values: rejects: the closed list of reasons why an image has no label, and which of them are transient."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

REASONS = (
    "empty", "not_an_image", "truncated", "corrupt", "unsupported", "too_large", "vanished", "changed", "forbidden",
    "unreachable", "timeout", "crashed", "out_of_memory", "duplicate",
)  # fmt: skip

_STORE_MAY_ANSWER_LATER = {"vanished", "changed", "forbidden", "unreachable", "timeout"}


def is_passing(stage: str, reason: str) -> bool:
    """Return whether the reason is transient: a later run may succeed with the same bytes.

    >>> is_passing("fetch", "timeout"), is_passing("decode", "timeout"), is_passing("decode", "out_of_memory")
    (True, False, True)
    """
    return (stage == "fetch" and reason in _STORE_MAY_ANSWER_LATER) or reason == "out_of_memory"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reject, before it becomes a row."""

    stage: str
    reason: str
    message: str
    attempts: int = 1

    @property
    def passing(self) -> bool:
        """Whether a later run tries this image again."""
        return is_passing(self.stage, self.reason)


Example = tuple[str, str]
"""The URI of a reject, and its message."""


def note_examples(examples: dict[str, Example], rejects: pa.Table) -> None:
    """Keep the URI and message of the first reject of each reason. No Python objects are made for the others.

    Args:
        examples: by reason; new reasons are added.
        rejects: with the columns `reason`, `uri` and `message`.
    """
    reasons = rejects["reason"]
    for reason in pc.unique(reasons).to_pylist():
        if reason is not None and reason not in examples:
            at = pc.index(reasons, reason).as_py()
            examples[reason] = (rejects["uri"][at].as_py(), rejects["message"][at].as_py() or "")

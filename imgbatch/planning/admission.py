"""Effects: the checks whether a run could work at all: rights on the output, conditional creation, memory of the workers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from imgbatch.errors import Exists, StoreError
from imgbatch.pipeline.plan_outcome import PLAN
from imgbatch.storage.stores import Folder

PROBE = "runs/plan-probe-"
_CONTENT = b"A probe of imgbatch plan, which deletes it at once. It can be deleted.\n"
_MAX_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check."""

    name: str
    passed: bool | None
    """None: not known."""
    text: str

    def public(self) -> dict[str, object]:
        """Return the check for JSON."""
        return asdict(self)


def check_output(output: Folder) -> list[Check]:
    """Create a probe object conditionally, twice, and delete it.

    The second creation must fail: otherwise two runs could overwrite each other's parts.
    """
    name = PROBE + secrets.token_hex(6)
    try:
        output.create(name, _CONTENT)
    except StoreError as error:
        return [Check("write", False, f"{output.uri} cannot be written: {error}")]
    checks = [Check("write", True, f"{output.uri} can be written")]
    try:
        output.create(name, _CONTENT)
        text = "the store has no conditional creation: make sure that only one run writes there at a time"
        checks.append(Check("conditional creation", False, text))
    except Exists:
        checks.append(Check("conditional creation", True, "the store refused to create an object a second time"))
    except StoreError as error:
        checks.append(Check("conditional creation", None, f"not known: {error}"))
    try:
        output.delete(name)
        checks.append(Check("delete", True, "the probe object was deleted"))
    except StoreError as error:
        text = f"{output.at(name)} cannot be deleted, so that runs cannot remove an outdated _SUCCESS: {error}"
        checks.append(Check("delete", False, text))
    return checks


def check_memory(worker: int, nodes: Sequence[tuple[float, float]]) -> Check:
    """Compare the memory of the workers with that of the nodes.

    Args:
        worker: the maximum of a worker that classified the sample, in bytes.
        nodes: (bytes that its workers take, bytes that it has for tasks and actors) of each node.
    """
    known = [node for node in nodes if node[1]]
    if not worker or not known:
        return Check("memory", None, "not known: no worker was measured")
    needed, available = max(known, key=lambda node: node[0] / node[1])
    text = (
        f"a worker takes {worker / 1e9:.1f} GB, all workers of a node {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB"
    )
    if needed <= _MAX_MEMORY * available:
        return Check("memory", True, text)
    return Check("memory", False, f"{text}: use fewer workers (cluster.max_actors) or nodes with more memory")


def keep(output: Folder, content: bytes) -> str | None:
    """Write the plan below the output; return its URI, None if the output cannot be written."""
    with suppress(StoreError):
        output.put(PLAN, content)
        return output.at(PLAN)
    return None

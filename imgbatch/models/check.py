"""Effects: the child process that runs tasks about networks, with limited memory.

The driver does not import torch, and a hostile model directory affects only the child.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from imgbatch.concurrency import process_limits
from imgbatch.errors import ModelError
from imgbatch.models.child import MEMORY_PROPORTION, Result


def run_task(arguments: dict[str, Any]) -> Result:
    """Make a model directory from a zoo's network, check a directory, or compute reference logits."""
    task = arguments.pop("task")
    from imgbatch.models import pretrained  # takes some seconds

    if task == "make":
        return pretrained.make_directory(**arguments)
    if task == "reference":
        return pretrained.reference_of(**arguments)
    return pretrained.check_directory(**arguments)


def main(read: Callable[[], bytes], results: BinaryIO) -> None:
    """Run the task that is read as JSON, and write its result, or its ModelError, as JSON."""
    process_limits.limit_data(int(MEMORY_PROPORTION * process_limits.memory_of_node()))
    try:
        result = run_task(json.loads(read()))
    except ModelError as error:
        result = {"error": str(error)}
    results.write(json.dumps(result).encode())


if __name__ == "__main__":
    stdout = os.dup(1)
    os.dup2(2, 1)  # the output of libraries must not mix with the result
    with open(stdout, "wb") as file:
        main(sys.stdin.buffer.read, file)

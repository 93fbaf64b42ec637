"""Effects: questions about networks, asked of a process of their own: the driver needs no torch, and what a hostile
directory does
to the process that builds its network, it does there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from imgbatch.concurrency import process_limits
from imgbatch.errors import ModelError
from imgbatch.models.child import SHARE_OF_MEMORY, Answer


def answer(question: dict[str, Any]) -> Answer:
    """Do what is asked: make a model directory of a zoo's network, check one that is there, or compute a reference."""
    task = question.pop("task")
    from imgbatch.models import pretrained  # some seconds

    if task == "make":
        return pretrained.make_directory(**question)
    if task == "reference":
        return pretrained.reference_of(**question)
    return pretrained.check_directory(**question)


def main(read: Callable[[], bytes], answers: BinaryIO) -> None:
    """Answer the question that is read, as JSON; an error of ours is an answer, too."""
    process_limits.limit_data(int(SHARE_OF_MEMORY * process_limits.memory_of_node()))
    try:
        found = answer(json.loads(read()))
    except ModelError as error:
        found = {"error": str(error)}
    answers.write(json.dumps(found).encode())


if __name__ == "__main__":
    stdout = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    with open(stdout, "wb") as file:
        main(sys.stdin.buffer.read, file)

"""Effects: questions about networks, asked of a process of their own: the driver needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from imgbatch.concurrency import process_limits
from imgbatch.concurrency.monitor import tick
from imgbatch.errors import ModelError

SHARE_OF_MEMORY = 0.5  # of the machine's or container's, that a network may have while it is checked


_POLL_S = 0.2


Answer = dict[str, Any]


def ask(question: dict[str, Any], *, limit_s: float) -> Answer:
    """Return what `answer` returns of the question, from a new process; `tick` is called while it works.

    Raises:
        ModelError: the process said so, died, or did not end in time.
    """
    # -P: not what lies in the working directory, which may have the name of a module.
    command = [sys.executable, "-P", "-m", "imgbatch.models.check"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    asked: bytes | None
    about, asked = question["name"], json.dumps(question).encode()
    ends = time.monotonic() + limit_s
    # A session of its own: Ctrl-C is the driver's to answer.
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            while True:
                try:
                    out, err = process.communicate(asked, timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    asked = None  # it has been handed over
                    tick()
                    if time.monotonic() > ends:
                        raise ModelError(f"{about}: its network was not there within {limit_s:.0f} s") from None
        finally:
            process.kill()
    if process.returncode:
        said = err.decode(errors="replace").strip().rpartition("\n")[2][:300]
        ended = f"the process that looked at its network ended with {process.returncode}{process_limits.address_space_hint()}"
        raise ModelError(f"{about}: {ended}: {said}")
    found: Answer = json.loads(out)
    if "error" in found:
        raise ModelError(found["error"])
    return found

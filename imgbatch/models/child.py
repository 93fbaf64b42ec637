"""Effects: tasks about networks, run in a child process, so that the driver does not import torch."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from imgbatch.concurrency import process_limits
from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.process import module_command
from imgbatch.errors import ModelError

MEMORY_PROPORTION = 0.5  # of the memory of the machine or container, as the limit of the child process

_POLL_S = 0.2

Result = dict[str, Any]


def run_task(task: dict[str, Any], *, limit_s: float) -> Result:
    """Return the result of `check.run_task` from a new process. Call `tick` while waiting; an exception ends the wait.

    Raises:
        ModelError: the task raised it, or the process died or timed out.
    """
    command, environment = module_command("imgbatch.models.check")
    stdin: bytes | None = json.dumps(task).encode()
    name, deadline = task["name"], time.monotonic() + limit_s
    # The process has a session of its own, so that a Ctrl-C reaches only the driver.
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
                    stdout, stderr = process.communicate(stdin, timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    stdin = None  # it has been written
                    tick()
                    if time.monotonic() > deadline:
                        raise ModelError(f"{name}: checking its network took more than {limit_s:.0f} s") from None
        finally:
            process.kill()
    if process.returncode:
        message = stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        reason = (
            f"the process that checked its network ended with {process.returncode}{process_limits.address_space_hint()}"
        )
        raise ModelError(f"{name}: {reason}: {message}")
    result: Result = json.loads(stdout)
    if "error" in result:
        raise ModelError(result["error"])
    return result

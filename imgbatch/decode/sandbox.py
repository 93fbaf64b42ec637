"""Effects: decoding in a child process, for images that may have killed a worker: a crash affects only one image."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from imgbatch.concurrency import process_limits
from imgbatch.concurrency.process import module_command
from imgbatch.decode import Picture, Rejected, decode

_MEMORY_PROPORTION = 0.5  # of the node's memory, for all images that are decoded in this way at a time: one a core
_MIN_MEMORY = 3 << 30  # enough for a picture of 200 million pixels and the libraries
_START_S = 20.0  # for Python and its libraries, before the first byte is decoded


def decode_isolated(data: bytes, *, max_pixels: int, short_side: int | None, timeout_s: float) -> Picture:
    """Decode an image as `decode` does, in a process of its own. Costs some 0.3 s an image.

    Raises:
        Rejected: as `decode`; and `crashed` if the process died, `timeout` if it did not end, and `out_of_memory` if it
            needed more than `memory_limit`.
    """
    limit = _START_S + timeout_s
    command, environment = module_command("imgbatch.decode.sandbox")
    command += [str(max_pixels), str(short_side or 0), str(limit)]
    try:
        process = subprocess.run(command, input=data, capture_output=True, timeout=limit, env=environment)
        return _result(process)
    except subprocess.TimeoutExpired as error:
        raise Rejected("timeout", f"decoding did not end within {timeout_s:g} s (decode.timeout_s)") from error
    except (OSError, ValueError, LookupError) as error:  # it could not be started, or its output is invalid
        raise Rejected("crashed", f"its decoder process returned no result: {error}") from error


def _result(process: subprocess.CompletedProcess[bytes]) -> Picture:
    if process.returncode:
        code = process.returncode
        how = str(signal.Signals(-code).name) if code < 0 else f"exit code {code}"
        last_line = process.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        reason = "out_of_memory" if code == -signal.SIGKILL else "crashed"
        raise Rejected(
            reason, f"its decoder process, which decoded no other image, ended with {how}. {last_line}".rstrip(". ")
        )
    header, _, pixels = process.stdout.partition(b"\n")
    result = json.loads(header)
    if "reason" in result:
        raise Rejected(result["reason"], result["message"])
    return Picture(np.load(io.BytesIO(pixels), allow_pickle=False), result["width"], result["height"])


def memory_limit(memory: int, cores: int) -> int:
    """Return the maximum memory for one image, in bytes.

    >>> memory_limit(512 << 30, 32) >> 30, memory_limit(64 << 30, 32) >> 30, memory_limit(4 << 30, 8) >> 30
    (8, 3, 2)
    """
    total = int(_MEMORY_PROPORTION * memory)
    return min(total, max(_MIN_MEMORY, total // cores))


def confine(seconds: float) -> None:
    """Limit this process, which decodes images, in time and in memory; if memory runs out, it is killed first."""
    signal.alarm(math.ceil(seconds))  # a killed worker does not end its child
    _die_first()
    process_limits.limit_data(memory_limit(process_limits.memory_of_node(), os.cpu_count() or 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _die_first() -> None:
    """Have the kernel kill this process before any other if memory runs out, rather than the worker or Ray."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(arguments: list[str], read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    """Decode the bytes that `read` returns; write a line of JSON, then the pixels as NumPy writes an H×W×3 array."""
    confine(float(arguments[2]) + 1)
    max_pixels, short_side = map(int, arguments[:2])
    try:
        picture = decode(read(), max_pixels=max_pixels, short_side=short_side or None)
    except (Rejected, MemoryError) as error:
        reason = error.reason if isinstance(error, Rejected) else "out_of_memory"
        write(json.dumps({"reason": reason, "message": str(error)}).encode())
        return
    pixels = io.BytesIO()
    np.save(pixels, picture.pixels)
    write(json.dumps({"width": picture.width, "height": picture.height}).encode() + b"\n" + pixels.getvalue())


if __name__ == "__main__":
    output = os.dup(1)
    os.dup2(2, 1)  # the output of libraries must not mix with the result
    with open(output, "wb") as file:
        main(sys.argv[1:], sys.stdin.buffer.read, file.write)

"""Effects: decoding in a child process, for images that have ended a worker: whatever they do, they do it there, and it
has a name.
"""

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
from imgbatch.decode import Picture, Rejected, decode

_SHARE_OF_MEMORY = 0.5  # of the node's, that all the images may have that are decoded in this way at a time: one a core
_LEAST_MEMORY = 3 << 30  # what a picture of 200 million pixels and the libraries want
_START_S = 20.0  # what Python and its libraries may take before the first byte is decoded


def decode_isolated(data: bytes, *, max_pixels: int, short_side: int | None, timeout_s: float) -> Picture:
    """Decode an image as `decode` does, in a process of its own. Costs some 0.3 s an image.

    Raises:
        Rejected: as `decode`; and `crashed`, `timeout`, or `out_of_memory` where the process died, did not end, or
            wanted more than its share of half of the machine's memory (or 3 GB, if that is more).
    """
    limit = _START_S + timeout_s
    # -P: not what lies in the worker's directory, which may have the name of a module.
    command = [sys.executable, "-P", "-m", "imgbatch.decode.sandbox", str(max_pixels), str(short_side or 0), str(limit)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=limit, env=environment)
        return _answer(done)
    except subprocess.TimeoutExpired as error:
        raise Rejected("timeout", f"decoding did not end within {timeout_s:g} s (decode.timeout_s)") from error
    except (OSError, ValueError, LookupError) as error:  # it could not be started, or what it wrote is no answer
        raise Rejected("crashed", f"the process that should decode it alone gave no answer: {error}") from error


def _answer(done: subprocess.CompletedProcess[bytes]) -> Picture:
    if done.returncode:
        how = str(signal.Signals(-done.returncode).name) if done.returncode < 0 else f"exit code {done.returncode}"
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        reason = "out_of_memory" if done.returncode == -signal.SIGKILL else "crashed"
        raise Rejected(reason, f"the process that decoded it, and nothing else, ended with {how}. {said}".rstrip(". "))
    header, _, pixels = done.stdout.partition(b"\n")
    found = json.loads(header)
    if "reason" in found:
        raise Rejected(found["reason"], found["message"])
    return Picture(np.load(io.BytesIO(pixels), allow_pickle=False), found["width"], found["height"])


def memory_limit(memory: int, cores: int) -> int:
    """Return the bytes of data that one image may have.

    >>> memory_limit(512 << 30, 32) >> 30, memory_limit(64 << 30, 32) >> 30, memory_limit(4 << 30, 8) >> 30
    (8, 3, 2)
    """
    most = int(_SHARE_OF_MEMORY * memory)
    return min(most, max(_LEAST_MEMORY, most // cores))


def _die_first() -> None:
    """Have the kernel end this process before any other when memory runs out: the worker and Ray are to stay."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(arguments: list[str], read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    """Decode what is read; write a line of JSON, and behind it the pixels as NumPy writes an H×W×3 array."""
    signal.alarm(math.ceil(float(arguments[2])) + 1)  # a worker that is killed takes no child with it
    _die_first()
    process_limits.limit_data(memory_limit(process_limits.memory_of_node(), os.cpu_count() or 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
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
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    with open(answers, "wb") as file:
        main(sys.argv[1:], sys.stdin.buffer.read, file.write)

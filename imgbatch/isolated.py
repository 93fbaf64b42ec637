"""Decoding in a child process, for images that have ended a worker: whatever they do, they do it there, and it has a name."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np

from imgbatch.decode import Picture, Rejected, decode

_SHARE_OF_MEMORY = 0.5  # of the node's, that one image may have
_START_S = 20.0  # what Python and its libraries may take before the first byte is decoded


def decode_isolated(data: bytes, *, max_pixels: int, short_side: int | None, timeout_s: float) -> Picture:
    """Decode an image as `decode` does, in a process of its own. Costs some 0.3 s an image.

    Raises:
        Rejected: as `decode`; and `crashed`, `timeout`, or `out_of_memory` where the process died, did not end, or
            wanted more than half of the machine's memory.
    """
    command = [sys.executable, "-m", "imgbatch.isolated", str(max_pixels), str(short_side or 0)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_START_S + timeout_s, env=environment)
    except subprocess.TimeoutExpired as error:
        raise Rejected("timeout", f"decoding did not end within {timeout_s:g} s (decode.timeout_s)") from error
    if done.returncode:
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        reason = "out_of_memory" if done.returncode == -signal.SIGKILL else "crashed"
        raise Rejected(reason, f"the process that decoded it, and nothing else, ended with {how}")
    header, _, pixels = done.stdout.partition(b"\n")
    found = json.loads(header)
    if "reason" in found:
        raise Rejected(found["reason"], found["message"])
    return Picture(np.load(io.BytesIO(pixels), allow_pickle=False), found["width"], found["height"])


def main(arguments: list[str], read: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
    """Decode what is read; write a line of JSON, and behind it the pixels as NumPy writes an H×W×3 array."""
    memory = int(_SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    max_pixels, short_side = map(int, arguments)
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
    main(sys.argv[1:], sys.stdin.buffer.read, sys.stdout.buffer.write)

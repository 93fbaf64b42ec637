"""Decoding of damaged files in child processes with little memory, so that a crash or a hang is found and named."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imgbatch.decode import Rejected, decode
from imgbatch.rejects import REASONS
from tests.fuzz.mutations import mutated

MAX_PIXELS = 16_000_000
LIMIT_S = 10.0
LIMIT_MB = 1_000
"""What a decoder may take beyond the process as it was."""


@dataclass(frozen=True)
class Outcome:
    """What became of one damaged file: 'picture', a reason of a reject, or what must not happen."""

    number: int
    name: str
    what: str
    message: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0

    @property
    def good(self) -> bool:
        """Whether this may happen."""
        return self.what == "picture" or self.what in REASONS


def fuzz(files: dict[str, bytes], numbers: Iterable[int], seed: int) -> Iterator[Outcome]:
    """Yield what becomes of each mutation; a child that dies or hangs is replaced by another."""
    child = None
    for number in numbers:
        child = child or _Child(files, seed)
        outcome = child.ask(number)
        if outcome is None:
            name, _ = mutated(files, number, seed)
            outcome = Outcome(number, name, child.end())
            child = None
        yield outcome
    if child:
        child.end()


class _Child:
    def __init__(self, files: dict[str, bytes], seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, files, seed), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def ask(self, number: int) -> Outcome | None:
        """Return what became of a mutation; None if the child died of it, or does not answer."""
        try:
            self._pipe.send(number)
            outcome: Outcome | None = self._pipe.recv() if self._pipe.poll(LIMIT_S) else None
        except (EOFError, ConnectionError):
            return None
        return outcome

    def end(self) -> str:
        """End the process; return how it had ended by itself."""
        self._process.join(0.5)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        if code is None:
            return "hang"
        return f"crash {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def _serve(pipe: multiprocessing.connection.Connection, files: dict[str, bytes], seed: int) -> None:
    for name in ("avif", "heic", "dicom"):  # what a library takes once is nobody's fault
        decode(files[name], max_pixels=MAX_PIXELS)
    memory = _megabytes("VmData") + LIMIT_MB
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory) << 20, int(memory) << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # C libraries remark on what they meet
    pipe.send("ready")
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        pipe.send(_decoded(files, number, seed))


def _decoded(files: dict[str, bytes], number: int, seed: int) -> Outcome:
    name, data = mutated(files, number, seed)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started, message = _megabytes("VmRSS"), time.monotonic(), ""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            picture = decode(data, max_pixels=MAX_PIXELS, short_side=256)
        shape = picture.pixels.shape
        what = (
            "picture" if len(shape) == 3 and shape[2] == 3 and shape[0] * shape[1] <= MAX_PIXELS else f"shape {shape}"
        )
    except Rejected as reject:
        what, message = reject.reason, str(reject)
    except BaseException as error:  # noqa: BLE001 - this is what we look for
        what, message = f"escaped {type(error).__name__}", traceback.format_exc()
    if warned:
        what, message = "warning", str(warned[0])
    return Outcome(number, name, what, message, time.monotonic() - started, max(0.0, _megabytes("VmHWM") - before))


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

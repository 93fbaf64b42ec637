"""What all jobs share on the command line: --config and --set, logging, and exit codes."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import psutil
import pyarrow as pa

from imgbatch.config import Config, describe, masked
from imgbatch.errors import ImgbatchError

EXIT_CODES = """\
exit codes:
  0  done, and the books balance
  1  a bug: please report it with its traceback
  2  wrong flags, config, model or input
  3  a store or the cluster refused, stayed away or was too small; run the same command again
  4  more rejects than the budget allows
  5  this output belongs to another fingerprint, holds foreign parts, or another run is writing it
  6  the books do not balance
  130, 143  stopped by SIGINT or SIGTERM; the same command goes on where it ended
"""


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser with what every job has."""
    made = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--config", metavar="RUN.toml", help="a file with config keys; flags and --set go before it")
    made.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="section.key=value", help="set one config key"
    )
    return made


def config_keys(kind: type = Config) -> str:
    """Return a line for each config key, for the end of --help."""
    rows = [(f"{key}={default}", help) for key, default, help in describe(kind) if "." in key or key == "top_k"]
    width = max(len(key) for key, _ in rows)
    return "config keys, with their defaults (--set key=value):\n" + "\n".join(
        f"  {key:<{width}}  {help}" for key, help in rows
    )


def run(body: Callable[[], int]) -> int:
    """Run a job's body; say what went wrong in one line, and return the exit code that tells an orchestrator."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    try:
        return body()
    except ImgbatchError as error:
        print(f"error: {masked(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # in a job that does not make a request of it
        print("error: stopped by signal 2", file=sys.stderr)
        return 130


def leave(code: int) -> NoReturn:
    """End the process; where it failed at once, and with what it has started: threads and Ray may still be at work."""
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        _end_children()
        os._exit(code)
    sys.exit(code)


def _end_children() -> None:
    """End a Ray of this machine's own; the agents of one that was still starting would outlive this process by a minute."""
    for end in (psutil.Process.suspend, psutil.Process.kill):  # first at rest, or one starts another in between
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                end(child)


def release_memory() -> None:
    """Give back to the system what an ended stage has freed, so that the next one does not stand on top of it."""
    gc.collect()
    release_freed()


def release_freed() -> None:
    """Give back to the system the memory that is free already: some milliseconds."""
    pa.default_memory_pool().release_unused()


def arguments(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags; argparse itself exits with 2 on wrong ones, as jobs do."""
    return made.parse_args(argv)

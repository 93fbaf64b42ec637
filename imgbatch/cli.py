"""Effects: what all jobs share on the command line: their common flags, where they print, and exit codes."""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import imgbatch
from imgbatch.concurrency import process
from imgbatch.config.secrets import masked
from imgbatch.config.sections import Config, describe
from imgbatch.errors import ImgbatchError
from imgbatch.terminal import console

EXIT_CODES = """\
exit codes:
  0  done, and the counts reconcile
  1  a bug: please report it with its traceback
  2  wrong flags, config, model or input
  3  a store or the cluster refused, stayed away or was too small, or the output was changed meanwhile; run the same
     command again
  4  more rejects than the budget allows
  5  this output belongs to another fingerprint, or holds foreign parts
  6  the counts do not reconcile
  7  another live run is writing this output; run the same command again later
  130, 143  stopped by SIGINT or SIGTERM (129: SIGHUP); the same command goes on where it ended
"""


def parser(description: str, epilog: str = "", *, verb: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with what every job has; from here on, stdout and stderr never raise.

    Args:
        verb: shown as `imgbatch VERB`, however the job was started; None: the name of the program.
    """
    make_streams_safe()
    made = argparse.ArgumentParser(
        prog=verb and f"imgbatch {verb}", description=description, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    common = made.add_argument_group("options of all jobs")  # after those of the job itself
    common.add_argument(
        "--config", metavar="RUN.toml", help="read config keys from this TOML file; flags and --set take precedence"
    )
    common.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="section.key=value",
        help="set one config key; may be repeated",
    )  # fmt: skip
    common.add_argument(
        "--quiet", action="store_true", help="print warnings, errors and the last line only: no log, no progress"
    )
    common.add_argument(
        "--version", action="version", version=f"imgbatch {imgbatch.__version__}", help="print the version and exit"
    )
    return made


class _SafeFile(io.FileIO):
    """A file descriptor whose writes do not fail: where the reader is gone or the disk is full, the bytes are dropped."""

    def write(self, data: Any, /) -> int:
        """Write bytes; return how many were taken."""
        try:
            while (written := super().write(data)) is None:  # a process that shares it has made it non-blocking
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return written


def make_streams_safe() -> None:
    """Replace stdout and stderr by streams that never raise, so that the exit code is always that of the run.

    A closed stream leads to /dev/null: its number would be given to the next file, into which C libraries would then write
    their messages. Characters that the encoding lacks are escaped. Streams that a caller has put in place are kept.
    """
    free = [descriptor for descriptor in range(3) if _is_closed(descriptor)]
    for descriptor in free:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, descriptor)  # for children as well
        if null != descriptor:
            os.close(null)
        else:
            os.set_inheritable(null, True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            if stream is None and descriptor not in free:  # another file has taken the number
                descriptor = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, _safe_stream(descriptor, stream))


def _is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def _safe_stream(descriptor: int, stream: Any) -> io.TextIOWrapper:
    raw = _SafeFile(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        getattr(stream, "encoding", "utf-8"),
        "backslashreplace",
        line_buffering=descriptor != 1 or raw.isatty(),
        write_through=getattr(stream, "write_through", False),
    )


def config_keys(kind: type = Config) -> str:
    """Return a line for each config key, for the end of --help."""
    rows = [(f"{key}={default}", help) for key, default, help in describe(kind) if "." in key or key == "top_k"]
    width = max(len(key) for key, _ in rows)
    return "config keys, with their defaults (--set key=value):\n" + "\n".join(
        f"  {key:<{width}}  {help}" for key, help in rows
    )


def run(body: Callable[[], int], *, quiet: bool = False) -> int:
    """Run a job's body; say what went wrong in one line, and return the exit code that tells an orchestrator.

    Args:
        quiet: log warnings and errors only, and show no progress.
    """
    console.install(_own_stderr(), quiet=quiet)
    try:
        return body()
    except ImgbatchError as error:
        console.close()  # the last line on the screen is the error
        print(f"error: {console.escape_control_characters(masked(str(error)))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # in a job that does not make a request of it
        console.close()
        print("error: stopped by signal 2", file=sys.stderr)
        return 130
    finally:
        console.close()


def result(text: str) -> None:
    """Print what a job has to say to stdout, after the progress line was removed from the terminal."""
    console.close()
    print(text)


def _own_stderr() -> TextIO:
    """Return a second stream to stderr's file: while Ray starts, file descriptor 2 leads elsewhere."""
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except OSError:  # a caller has put a stream in place that is no file
        return sys.stderr
    return _safe_stream(descriptor, sys.stderr)


def arguments(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags, those of the process for None; argparse itself exits with 2 on wrong ones, as jobs do."""
    if argv is None:
        process.restart_in_utf8_mode()
    return made.parse_args(argv)

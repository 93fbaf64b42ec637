"""Effects: the parts that all commands share: common flags, output and exit codes."""

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
  3  a store or the cluster refused, was unreachable or too small, or the output was changed during the run; run the
     same command again
  4  more rejects than the budget allows
  5  this output belongs to another fingerprint, or contains foreign parts
  6  the counts do not reconcile
  7  another live run is writing this output; run the same command again later
  130, 143  stopped by SIGINT or SIGTERM (129: SIGHUP); run the same command again to resume
"""


def parser(description: str, epilog: str = "", *, verb: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the flags of all commands; from here on, stdout and stderr never raise.

    Args:
        verb: shown as `imgbatch VERB`, however the command was started; None: the name of the program.
    """
    make_streams_safe()
    parser = argparse.ArgumentParser(
        prog=verb and f"imgbatch {verb}", description=description, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    common = parser.add_argument_group("options of all jobs")  # after those of the command itself
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
    return parser


class _SafeFile(io.FileIO):
    """A file descriptor that drops bytes which cannot be written, since the reader has ended or the disk is full."""

    def write(self, data: Any, /) -> int:
        """Write bytes; return the number of bytes written or dropped."""
        try:
            # None: another process that shares the descriptor made it non-blocking.
            while (written := super().write(data)) is None:
                select.select([], [self], [])
        except OSError:
            return memoryview(data).nbytes
        return written


def make_streams_safe() -> None:
    """Replace stdout and stderr by streams that never raise, so that the exit code is always that of the run.

    A closed stream is opened to /dev/null: otherwise the next file that is opened would get its number, and C libraries would
    write their messages into that file. Characters that the encoding lacks are escaped. Streams that a caller has replaced
    are kept.
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
            if stream is None and descriptor not in free:  # another file has this number already
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
    """Run a command's body; print an error as one line, and return the exit code.

    Args:
        quiet: log warnings and errors only, and show no progress.
    """
    console.install(_own_stderr(), quiet=quiet)
    try:
        return body()
    except ImgbatchError as error:
        console.close()  # so that the error is the last line on the screen
        print(f"error: {console.escape_control_characters(masked(str(error)))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # in a command that does not handle SIGINT itself
        console.close()
        print("error: stopped by signal 2", file=sys.stderr)
        return 130
    finally:
        console.close()


def result(text: str) -> None:
    """Print the result of a command to stdout, after the progress line was removed from the terminal."""
    console.close()
    print(text)


def _own_stderr() -> TextIO:
    """Return a second stream to stderr's file, since file descriptor 2 is redirected while Ray starts."""
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except OSError:  # a caller has replaced it by a stream without a file
        return sys.stderr
    return _safe_stream(descriptor, sys.stderr)


def arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags; None: those of the process. For invalid ones argparse exits with 2, as commands do."""
    if argv is None:
        process.restart_in_utf8_mode()
    return parser.parse_args(argv)

"""Effects: the parts that all commands share: common flags, output and exit codes."""

from __future__ import annotations

import argparse
import io
import os
import re
import select
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, TextIO

import imgbatch
from imgbatch import errors
from imgbatch.concurrency import process, signals
from imgbatch.config import env_file
from imgbatch.config.secrets import masked
from imgbatch.config.sections import Config, describe
from imgbatch.errors import ImgbatchError
from imgbatch.orchestration import end_line, pipes
from imgbatch.terminal import console


def exit_codes() -> str:
    """Return the table of exit codes, for the end of --help."""
    lines = ["exit codes (retry: the same command, run again, may succeed):"]
    for entry in errors.EXIT_CODES:
        action = f"retry: {entry.action}" if entry.retry else entry.action
        text = "; ".join(filter(None, (entry.meaning, action))).replace("`", "")
        head = f"  {entry.code:<3}  "
        lines += textwrap.wrap(text, _HELP_WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines) + "\n"


_HELP_WIDTH = 120
EXIT_CODES = exit_codes()


def parser(
    description: str, epilog: str = "", *, verb: str | None = None, configurable: bool = True, usage: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser with the flags of all commands; from here on, stdout and stderr never raise.

    Args:
        verb: shown as `imgbatch VERB`, however the command was started; None: the name of the program.
        configurable: whether the command has config keys.
        usage: replaces the line that is made from the flags.
    """
    make_streams_safe()
    parser = _Parser(
        prog=verb and f"imgbatch {verb}", description=description, epilog=epilog, usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    common = parser.add_argument_group("options of all jobs")  # after those of the command itself
    if configurable:
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
        "--log-format", choices=("text", "json"), default="text",
        help="json: each line on stderr is a JSON object, without a progress bar",
    )  # fmt: skip
    common.add_argument(
        "--version", action="version", version=f"imgbatch {imgbatch.__version__}", help="print the version and exit"
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that writes an end line, where one is wanted, before it exits because of a wrong flag."""

    _log_format = "text"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the flags; the format of the log is known before a flag may be found to be wrong."""
        words = " ".join(sys.argv[1:] if args is None else args)
        self._log_format = "json" if re.search(r"--log-format[ =]json\b", words) else "text"
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with 2."""
        if self._log_format == "json":
            sys.stderr.write(console.json_error(message) + "\n")
        else:
            self.print_usage(sys.stderr)
            sys.stderr.write(f"{self.prog}: error: {message}\n")
        if end_line.is_wanted(self._log_format):
            sys.stderr.write(end_line.compose(self.prog.rpartition(" ")[2], 2, {}, message) + "\n")
        raise SystemExit(2)


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


def run(body: Callable[[], int], *, verb: str = "", quiet: bool = False, log_format: str = "text") -> int:
    """Run a command's body; print an error as one line, and return the exit code.

    Args:
        verb: its end line is written where one is wanted; empty: never.
        quiet: log warnings and errors only, and show no progress.
        log_format: text or json.
    """
    console.install(_own_stderr(), quiet=quiet, json_lines=log_format == "json")
    signals.error_line = console.json_error if log_format == "json" else signals.plain_error_line
    wanted = verb and end_line.is_wanted(log_format)
    with pipes.reporting(), end_line.collecting(verb) if wanted else nullcontext() as end:
        code, message = _run(body, log_format)
        if end is not None:
            end.message = message or end.message
            end.write(code)
    return code


def _run(body: Callable[[], int], log_format: str) -> tuple[int, str]:
    """Run a command's body; return the exit code, and the error or the result."""
    global _result
    _result = ""
    try:
        env_file.load()
        return body(), _result
    except ImgbatchError as error:
        console.close()  # so that the error is the last line on the screen
        message = masked(str(error))
        _print_error(message, log_format)
        return error.exit_code, message
    except KeyboardInterrupt:  # in a command that does not handle SIGINT itself
        console.close()
        _print_error("stopped by signal 2", log_format)
        return 130, "stopped by signal 2"
    except Exception as error:  # noqa: BLE001 - a bug
        console.close()
        message = masked(f"{type(error).__name__}: {error}")
        if log_format == "json":
            print(console.json_error(message, error), file=sys.stderr)
        else:
            sys.stderr.write(masked(traceback.format_exc()))
        return 1, message
    finally:
        console.close()


def _print_error(message: str, log_format: str) -> None:
    """Print an error as one line to stderr."""
    text = f"error: {console.escape_control_characters(message)}"
    print(console.json_error(message) if log_format == "json" else text, file=sys.stderr)


_result = ""
"""What the command printed with `result`."""


def result(text: str) -> None:
    """Print the result of a command to stdout, after the progress line was removed from the terminal."""
    global _result
    console.close()
    _result = text
    print(text)


def _own_stderr() -> TextIO:
    """Return a second stream to stderr's file, since file descriptor 2 is redirected while Ray starts."""
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except OSError:  # a caller has replaced it by a stream without a file
        return sys.stderr
    return _safe_stream(descriptor, sys.stderr)


def add_date(parser: argparse.ArgumentParser, where: str = "--input and --output") -> None:
    """Add the flag --date."""
    parser.add_argument(
        "--date", metavar="YYYY-MM-DD", help=f"fills {{date}} in {where}; unset: IMGBATCH_DATE, or else today (UTC)"
    )


def words(argv: Sequence[str] | None) -> Sequence[str]:
    """Return the words of the command line; None: those of the process, which is started again in UTF-8 if necessary."""
    if argv is None:
        process.restart_in_utf8_mode()
        return sys.argv[1:]
    return argv


def arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags; None: those of the process. For invalid ones argparse exits with 2, as commands do."""
    return parser.parse_args(words(argv))

"""Effects: `imgbatch verify`: check a finished output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config import reading
from imgbatch.config.sections import Config

_CODES = """\
exit codes:
  0  the counts reconcile, and the files have no problem; with --sample, no label that was compared is wrong
  1  a bug: please report it with its traceback
  2  wrong flags, no finished output, or not the model of this output
  3  a store, or a process on this machine, failed; run the same command again
  5  foreign files or parts of another fingerprint are in labels/ or rejects/, or a part is damaged
  6  the counts do not reconcile, values are missing or wrong, a table is not sealed, or labels of the sample are wrong
  130, 143  stopped by SIGINT, or by SIGTERM or SIGHUP
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    flags = cli.arguments(parser(), argv)
    return cli.run(lambda: verify(flags), verb="verify", quiet=flags.quiet, log_format=flags.log_format)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.parser(
        "Recount a finished output from its files: each listed image is in exactly one row of labels or\n"
        "rejects, no image has two rows, and the counts are those of _SUCCESS. Checks the files for parts of\n"
        "another fingerprint, missing and impossible values, foreign files, and missing seals. Reads the tables and\n"
        "the listing; writes nothing. With --sample, images are fetched and labelled again on this machine, and\n"
        "compared with their rows.",
        _CODES,
        verb="verify",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the --output of classify.py")
    parser.add_argument("--sample", type=int, metavar="N", help="label N rows of labels/, drawn at random, again")
    parser.add_argument(
        "--model", metavar="NAME_OR_URI", help="the current name or URI of the model of this output; unset: as recorded"
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="seed of the sample, to draw the same one again; unset: random"
    )
    cli.add_date(parser, "OUTPUT")
    return parser


def read_config(flags: Any) -> Config:
    """Return the configuration that results from the flags."""
    return reading.load(flags.config, flags.settings, model=flags.model)


def verify(flags: Any) -> int:
    """Run the checks."""
    from imgbatch.verification import run  # after the flags: --help needs neither Arrow nor NumPy

    with signals.handle_signals():
        config = read_config(flags)
        arguments = {"sample": flags.sample, "model": flags.model, "seed": flags.seed}
        output = reading.fill_date(flags.output, reading.resolve_date(flags.date))
        cli.result(str(run.verify(output, config, **arguments)))
    return 0

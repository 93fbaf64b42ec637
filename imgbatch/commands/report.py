"""Effects: `imgbatch report`: write the report of a run again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config import reading
from imgbatch.config.sections import Config

_MORE = """\
examples:
  imgbatch report s3://bucket/labels
  imgbatch report s3://bucket/labels --run 20261129T020007Z-0c55d1

exit codes:
  0  the report was written
  1  a bug: please report it with its traceback
  2  wrong flags, or the output has no such run
  3  the store failed; run the same command again
  5  a part of the output is damaged or foreign
  130, 143  stopped by SIGINT, or by SIGTERM or SIGHUP
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    flags = cli.arguments(parser(), argv)
    return cli.run(lambda: report(flags), verb="report", quiet=flags.quiet, log_format=flags.log_format)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.parser(
        "Write runs/RUN_ID/report.html of a run again, from what is in the store: run.json, _SUCCESS and the tables. The\n"
        "run may have failed, or be running still. Each run writes its report when it ends; this command is for those that\n"
        "could not, and to look at a run before its end.",
        _MORE,
        verb="report",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the --output of classify")
    parser.add_argument("--run", metavar="RUN_ID", help="which run; unset: the newest one")
    cli.add_date(parser, "OUTPUT")
    return parser


def read_config(flags: Any) -> Config:
    """Return the configuration that results from the flags."""
    return reading.load(flags.config, flags.settings)


def report(flags: Any) -> int:
    """Run the job."""
    from imgbatch.pipeline import report_again as job  # after the flags: --help needs neither Arrow nor NumPy

    with signals.handle_signals():
        config = read_config(flags)
        output = reading.fill_date(flags.output, reading.resolve_date(flags.date))
        cli.result(str(job.write_report(output, config, run_id=flags.run)))
    return 0

"""Effects: `imgbatch compact`: write a merged copy of the tables of a finished output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config import reading

_CODES = """\
exit codes:
  0  the copy is complete, and its rows were counted
  1  a bug: please report it with its traceback
  2  wrong flags, no finished output, or --to is not empty
  3  a store failed, or a run has changed the output meanwhile; delete the copy and run the same command again
  5  the output has foreign files, or parts of another fingerprint
  6  the rows of the output or of the copy are not as many as _SUCCESS says
  130, 143  stopped by SIGINT, or by SIGTERM or SIGHUP; delete the copy and run the same command again
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    parser = cli.parser(
        "Write a merged copy of labels/ and rejects/ of a finished output, in few large files, for programs that read\n"
        "the tables. The output stays as it is. Its parts are read one after the other; the rows are counted at the end.",
        f"examples:\n  imgbatch compact s3://bucket/labels --to s3://bucket/labels-2026\n\n{_CODES}",
        verb="compact",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the --output of classify")
    parser.add_argument("--to", required=True, metavar="URI", help="required: an empty folder for the copy")
    cli.add_date(parser, "OUTPUT and --to")
    flags = cli.arguments(parser, argv)
    return cli.run(lambda: compact(flags), verb="compact", quiet=flags.quiet)


def compact(flags: Any) -> int:
    """Run the job."""
    from imgbatch.ledger import compact as job  # after the flags: --help needs neither Arrow nor NumPy
    from imgbatch.storage.stores import Stores

    with signals.handle_signals():
        config = reading.load(flags.config, flags.settings)
        date = reading.resolve_date(flags.date)
        output, to = (reading.fill_date(uri, date) for uri in (flags.output, flags.to))
        cli.result(str(job.compact(output, to, Stores(config.storage))))
    return 0

"""Effects: `imgbatch export`: write the images that are worth a person's time, as a manifest or as tasks for Label Studio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config import reading

_MORE = """\
examples:
  imgbatch export s3://bucket/labels --to review.csv --uncertain 200
  imgbatch export s3://bucket/labels --to tasks.json --format label-studio --sample 500 --where "label == 'cat'"
  imgbatch export s3://bucket/labels --to broken.csv --rejects --where "reason != 'empty'"

--where takes conditions on columns in Python's syntax: ==, !=, <, <=, >, >=, in (…), is None, 'text' in column,
column.startswith('…'), joined by and, or, not and parentheses. The columns are those of the table, and margin and
second (labels): the difference to the second best class, and its name.

exit codes:
  0  the file was written
  1  a bug: please report it with its traceback
  2  wrong flags or expression, no output, the file exists, or the model of the output cannot be loaded
  3  a store failed; run the same command again
  5  a part of the output is damaged or foreign
  130, 143  stopped by SIGINT, or by SIGTERM or SIGHUP
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    parser = cli.parser(
        "Write the images of an output that are worth a person's time to a file: as a manifest with an empty column\n"
        "label, or as tasks for Label Studio with the model's answers and a labelling config. `imgbatch train` and\n"
        "`imgbatch evaluate` read both back. Reads one table; the memory grows with N, not with the table.",
        _MORE,
        verb="export",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the --output of classify")
    parser.add_argument(
        "--to", required=True, metavar="URI",
        help="required: the file: .csv, .jsonl or .parquet, for Label Studio .json or .jsonl; it must not exist",
    )  # fmt: skip
    parser.add_argument("--uncertain", type=int, metavar="N", help="the N labels with the smallest margins")
    parser.add_argument("--sample", type=int, metavar="N", help="N labels at random")
    parser.add_argument("--rejects", action="store_true", help="all rejects")
    parser.add_argument("--where", metavar="EXPRESSION", help="only rows that meet this condition; alone: all of them")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of --sample, to draw the same images again")
    parser.add_argument(
        "--format",
        choices=("manifest", "label-studio"),
        default="manifest",
        help="manifest (the default), label-studio",
    )
    parser.add_argument(
        "--model", metavar="NAME_OR_URI", help="label-studio: where the model of the output is now; unset: as recorded"
    )
    cli.add_date(parser, "OUTPUT and --to")
    flags = cli.arguments(parser, argv)
    return cli.run(lambda: export(flags), verb="export", quiet=flags.quiet)


def export(flags: Any) -> int:
    """Run the job."""
    from imgbatch.labelling import export as job  # after the flags: --help needs neither Arrow nor NumPy

    with signals.handle_signals():
        config = reading.load(flags.config, flags.settings, model=flags.model)
        date = reading.resolve_date(flags.date)
        output, to = (reading.fill_date(uri, date) for uri in (flags.output, flags.to))
        selection = job.Selection(
            uncertain=flags.uncertain, sample=flags.sample, rejects=flags.rejects, where=flags.where, seed=flags.seed
        )
        cli.result(str(job.export(output, to, config, selection, format=flags.format, model=flags.model)))
    return 0

"""Effects: `imgbatch plan`: measure a sample on the cluster, and forecast the time and the cost of a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config import reading
from imgbatch.config.sections import Config
from imgbatch.errors import UsageError

_CODES = """\
exit codes:
  0  the plan was printed; it says so if the output cannot be written
  2  wrong flags, config, model or input; no image; a file of prices without the machine
  3  a store or the cluster refused, was unreachable, or has fewer resources than the run requests
  5  the output belongs to another fingerprint, or contains foreign parts
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    flags = cli.arguments(parser(), argv)
    return cli.run(lambda: plan(flags), verb="plan", quiet=flags.quiet)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.parser(
        "Measure before money is spent: list the images, run a sample of them through the workers of the cluster\n"
        "without writing rows, and print how long `imgbatch classify` with the same arguments will take, what limits\n"
        "it, and what it costs. Writes OUTPUT/runs/plan.json, and a probe object that it deletes again.",
        f"examples:\n"
        f"  imgbatch plan --input s3://bucket/photos --output s3://bucket/labels --finish-by 06:00@Europe/Berlin\n"
        f"  imgbatch plan --input photos --output out --prices vms.csv --machine g6.4xlarge --nodes 4\n\n"
        f"{_CODES}\n{cli.config_keys()}",
        verb="plan",
    )
    _add_flags_of_classify(parser)
    parser.add_argument(
        "--prices",
        metavar="FILE.csv",
        help="prices of machines, with the columns of SkyPilot's catalogue: adds the cost",
    )
    parser.add_argument(
        "--machine",
        metavar="TYPE",
        help="InstanceType in the file of prices; unset: machines like the nodes of the cluster",
    )
    parser.add_argument("--nodes", type=_positive, metavar="N", help="plan for N nodes like those of the cluster")
    parser.add_argument(
        "--finish-by",
        metavar="HH:MM[@ZONE]",
        help="print how many nodes and workers it takes to end by this time, if the run starts now (run.finish_by)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sample (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


def _add_flags_of_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", action="append", metavar="URI", help="required: as in `imgbatch classify`; may be repeated"
    )
    parser.add_argument("--output", metavar="URI", help="required: the output of the run; no row is written")
    parser.add_argument("--model", metavar="NAME_OR_URI", help="as in `imgbatch classify`")
    cli.add_date(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="plan for only the first N images of the listing")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def read_config(flags: Any) -> Config:
    """Return the configuration that results from the flags.

    Raises:
        UsageError: --machine without --prices.
    """
    if flags.machine is not None and flags.prices is None:
        raise UsageError("--machine needs --prices")
    return reading.load(
        flags.config, flags.settings,
        input=flags.input, output=flags.output, model=flags.model, limit=flags.limit, date=flags.date,
        **{"run.finish_by": flags.finish_by},
    )  # fmt: skip


def plan(flags: Any) -> int:
    """Make the plan, and print it."""
    from imgbatch.planning import run, text  # after the flags: --help needs neither Arrow nor NumPy

    with signals.handle_signals() as stop:
        config = read_config(flags)
        stop.timeout_s = config.run.stop_timeout_s
        options = run.Options(prices=flags.prices, machine=flags.machine, nodes=flags.nodes, seed=flags.seed)
        document = run.plan(config, options, stop)
        cli.result(json.dumps(document, indent=2) if flags.json else text.of(document))
    return 0

"""Effects: `imgbatch classify`: label every image of a store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config import reading
from imgbatch.config.sections import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    flags = cli.arguments(parser(), argv)
    return cli.run(lambda: classify(flags), verb="classify", quiet=flags.quiet, log_format=flags.log_format)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.parser(
        "Label every image of a store with a CNN, and write the label tables back to it.\n"
        "Run the same command again to resume a run that was stopped, or to label images that are new.",
        f"examples:\n"
        f"  imgbatch classify --input s3://bucket/photos --output s3://bucket/labels\n"
        f"  imgbatch classify --input 'photos/*.jpg' --input list.csv --output out --model ./my-model --set top_k=3\n\n"
        f"{cli.EXIT_CODES}\n{cli.config_keys()}",
        verb="classify",
    )
    parser.add_argument(
        "--input",
        action="append",
        metavar="URI",
        help="required: a prefix or folder, glob, object, archive or manifest; may be repeated",
    )
    parser.add_argument(
        "--output",
        metavar="URI",
        help="required: where labels/ and rejects/ are written; {model} and {date} are filled in",
    )
    parser.add_argument(
        "--model",
        metavar="NAME_OR_URI",
        help="efficientnet_lite0 (the default), timm:NAME, torchvision:NAME, or the path or URI of a model directory",
    )
    cli.add_date(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="label only the first N images of the listing")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the inputs, print how many images would be labelled, and write nothing",
    )
    return parser


def read_config(flags: Any) -> Config:
    """Return the configuration that results from the flags."""
    return reading.load(
        flags.config, flags.settings,
        input=flags.input, output=flags.output, model=flags.model, limit=flags.limit, date=flags.date,
    )  # fmt: skip


def classify(flags: Any) -> int:
    """Run the job; with --dry-run only print a summary of the work."""
    from imgbatch.pipeline import run  # after the flags: --help needs neither Arrow nor NumPy
    from imgbatch.pipeline.dry_run import dry_run

    with signals.handle_signals() as stop:
        config = read_config(flags)
        stop.timeout_s = config.run.stop_timeout_s
        cli.result(dry_run(config) if flags.dry_run else str(run.classify(config, stop)))
    return 0

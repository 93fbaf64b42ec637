"""Effects: `imgbatch train`: train a model on labelled images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config.reading import load_as
from imgbatch.config.training import Training


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    flags = cli.arguments(parser(), argv)
    return cli.run(lambda: train(flags), verb="train", quiet=flags.quiet, log_format=flags.log_format)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.parser(
        "Train a model on labelled images and write a model directory that classify.py and timm open.\n"
        "Run the same command again to resume a run that was stopped.",
        f"examples:\n"
        f"  imgbatch train --input photos-by-class --output my-model\n"
        f"  imgbatch train --input list.csv --output s3://bucket/models/v1 --taxonomy tree.csv --set train.method=finetune\n\n"
        f"{cli.EXIT_CODES}\n{cli.config_keys(Training)}",
        verb="train",
    )
    parser.add_argument(
        "--input", action="append", metavar="LABELLED",
        help="required: a folder with a folder for each class, or a manifest with uri and label; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--output",
        metavar="MODEL_DIR",
        help="required: where the model directory is written; it must not hold a model yet",
    )
    cli.add_date(parser)
    parser.add_argument(
        "--base",
        metavar="NAME_OR_URI",
        help="the model to start from: efficientnet_lite0 (the default), timm:NAME, or a model directory",
    )
    parser.add_argument("--taxonomy", metavar="FILE", help="a label tree, CSV or JSON, that is kept with the model")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the classes and splits and where they come from, and write nothing",
    )
    return parser


def read_config(flags: Any) -> Training:
    """Return the configuration that results from the flags."""
    return load_as(
        Training, flags.config, flags.settings,
        input=flags.input, output=flags.output, base=flags.base, taxonomy=flags.taxonomy, date=flags.date,
    )  # fmt: skip


def train(flags: Any) -> int:
    """Run the job; with --dry-run only print the classes and splits of the inputs."""
    from imgbatch.training import run  # after the flags: --help needs neither Arrow nor NumPy

    with signals.handle_signals() as stop:
        config = read_config(flags)
        stop.timeout_s = config.run.stop_timeout_s
        cli.result(run.dry_run(config) if flags.dry_run else str(run.train(config, stop)))
    return 0

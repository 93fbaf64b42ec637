"""Effects: `imgbatch evaluate`: measure how good a model's labels are."""

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
    return cli.run(lambda: evaluate(flags), verb="evaluate", quiet=flags.quiet, log_format=flags.log_format)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.parser(
        "Label images whose class is known, and measure how good the labels are: metrics.json, predictions.parquet and\n"
        "evaluation.html. The class is the column label of a manifest or Parquet file, a tar's .cls, or else the folder\n"
        "that holds the image.",
        f"examples:\n"
        f"  imgbatch evaluate --input s3://bucket/photos --model s3://bucket/models/fruit --output s3://bucket/evaluation\n"
        f"  imgbatch evaluate --input truths.csv --model ./new --against ./old --output out\n"
        f"  imgbatch evaluate --input truths.csv --labels s3://bucket/labels --output out\n\n"
        f"{cli.EXIT_CODES}\n{cli.config_keys()}",
        verb="evaluate",
    )
    parser.add_argument(
        "--input", action="append", metavar="URI", help="required: images whose class is known; may be repeated"
    )
    parser.add_argument(
        "--output", metavar="URI", help="required: where labels, metrics.json and evaluation.html are written"
    )
    parser.add_argument("--model", metavar="NAME_OR_URI", help="efficientnet_lite0 (the default) or a model directory")
    parser.add_argument("--against", metavar="NAME_OR_URI", help="a second model, compared on the same images")
    parser.add_argument("--split", choices=("train", "val", "test"), help="score only the images of this split")
    parser.add_argument(
        "--labels", metavar="URI", help="an output of classify.py: score its labels without running a model"
    )
    cli.add_date(parser, "--input, --output and --labels")
    return parser


def read_config(flags: Any) -> Config:
    """Return the configuration that results from the flags."""
    return reading.load(
        flags.config, flags.settings, input=flags.input, output=flags.output, model=flags.model, date=flags.date
    )


def evaluate(flags: Any) -> int:
    """Run the job."""
    from imgbatch.pipeline import evaluation_run  # after the flags: --help needs neither Arrow nor NumPy

    with signals.handle_signals() as stop:
        config = read_config(flags)
        stop.timeout_s = config.run.stop_timeout_s
        labels = flags.labels and reading.fill_date(flags.labels, config.date or reading.resolve_date(flags.date))
        arguments = {"model": flags.model, "against": flags.against, "split": flags.split, "labels": labels}
        cli.result(str(evaluation_run.evaluate(config, stop, **arguments)))
    return 0

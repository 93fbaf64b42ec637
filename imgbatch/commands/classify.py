"""Effects: `imgbatch classify`: label every image of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imgbatch import cli
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config import reading
from imgbatch.ledger import claims
from imgbatch.pipeline.preflight import naming_the_output, prepare
from imgbatch.terminal import console

if TYPE_CHECKING:
    pass
from imgbatch.pipeline.run import dry_run, log, recorded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    parser = cli.parser(
        "Label every image of a store with a CNN, and write the label tables back to it.\n"
        "The same command goes on where an earlier run was stopped, and labels what is new since.",
        f"examples:\n"
        f"  classify.py --input s3://bucket/photos --output s3://bucket/labels\n"
        f"  classify.py --input 'photos/*.jpg' --input list.csv --output out --model ./my-model --set top_k=3\n\n"
        f"{cli.EXIT_CODES}\n{cli.config_keys()}",
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
    parser.add_argument("--limit", type=int, metavar="N", help="label only the first N images of the listing")
    parser.add_argument("--dry-run", action="store_true", help="list, print what would be done, and write nothing")
    flags = cli.arguments(parser, argv)
    return cli.run(lambda: classify(flags), quiet=flags.quiet)


def classify(flags: Any) -> int:
    """From flags to an exit code."""
    stop = StopRequest().install()
    chosen = reading.load(
        flags.config, flags.settings, input=flags.input, output=flags.output, model=flags.model, limit=flags.limit
    )
    stop.timeout_s = chosen.run.stop_timeout_s
    job = prepare(chosen, stop.check)
    with naming_the_output(job):
        job.output.folders()  # is it there, and are we let in?
        if not job.output.conditional:
            log.warning("%s creates nothing conditionally: one run at a time there is your duty", job.output.uri)
        if flags.dry_run:
            return dry_run(job, stop)
        console.step("checking that no other run writes the output")
        claim = claims.take(job.output, check=job.config.run.check_owner, pulse=stop.check)
    with claim:
        return recorded(job, claim, stop)

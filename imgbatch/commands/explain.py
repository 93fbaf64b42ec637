"""Effects: `imgbatch explain`: everything that an output says about one image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config import reading
from imgbatch.terminal import console

_MORE = """\
examples:
  imgbatch explain s3://bucket/labels s3://bucket/photos/0001.jpg
  imgbatch explain s3://bucket/labels s3://bucket/photos/0001.jpg --again --image seen.png

exit codes:
  0  the image is in a table, or listed
  1  a bug: please report it with its traceback
  2  wrong flags, the image is in no table and no listing, or the model of the output cannot be loaded
  3  a store, or the process that labels the image, failed; run the same command again
  5  a part of the output is damaged or foreign
  130, 143  stopped by SIGINT, or by SIGTERM or SIGHUP
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    parser = cli.parser(
        "Print everything that an output says about one image: its label or the reason of its reject, the part, run and\n"
        "model, the listings that have it, and its carried columns. With --again, the image is fetched and labelled\n"
        "again on this machine, and compared with its row. Works on unfinished outputs too, and writes nothing there.",
        _MORE,
        verb="explain",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the --output of classify")
    parser.add_argument(
        "uri", metavar="URI", help="the uri of the image, as in the tables; or the path of a local file"
    )
    parser.add_argument("--again", action="store_true", help="label the image again with the model of the output")
    parser.add_argument(
        "--image", metavar="FILE", help="with --again: write the image as the network sees it, as a PNG"
    )
    parser.add_argument(
        "--model", metavar="NAME_OR_URI", help="with --again: where the model of the output is now; unset: as recorded"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    cli.add_date(parser, "OUTPUT")
    flags = cli.arguments(parser, argv)
    return cli.run(lambda: explain(flags), verb="explain", quiet=flags.quiet)


def explain(flags: Any) -> int:
    """Run the job."""
    from imgbatch.labelling import explain as job  # after the flags: --help needs neither Arrow nor NumPy

    with signals.handle_signals():
        config = reading.load(flags.config, flags.settings, model=flags.model)
        output = reading.fill_date(flags.output, reading.resolve_date(flags.date))
        found = job.explain(output, flags.uri, config, again=flags.again, image=flags.image, model=flags.model)
        text = json.dumps(found.public(), indent=2) if flags.json else console.escape_control_characters(str(found))
        cli.result(text)
    return 0

"""Recount the books of a finished output, from its files alone.

python jobs/verify.py s3://bucket/labels
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from imgbatch import books, cli, config, console, runs
from imgbatch.errors import BooksError, InputError
from imgbatch.storage import Folder, Stores, absolute


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    parser = cli.parser(
        "Recount the books of a finished output: each listed image in exactly one row of labels or rejects,\n"
        "no image twice, and the sums as _SUCCESS has them. Reads the tables and the last listing; writes nothing.",
        cli.EXIT_CODES,
    )
    parser.add_argument("output", metavar="OUTPUT", help="what classify.py was given as --output")
    flags = cli.arguments(parser, argv)
    return cli.run(lambda: verify(flags), quiet=flags.quiet)


def verify(flags: Any) -> int:
    """Count, compare, and say so."""
    settings = config.load(flags.config, flags.settings)
    output = Folder(Stores(settings.storage), absolute(flags.output))
    success = runs.read_success(output)
    if success is None:
        raise InputError(f"{output.uri} has no _SUCCESS: no run has finished there, or one is under way")
    if "run_id" not in success or not isinstance(said := success.get("counts"), dict):
        raise BooksError(f"{output.at('_SUCCESS')} is damaged: run classify.py again, it will do no work twice")
    listing = output.folder(f"runs/{success['run_id']}/listing")
    console.step("counting the rows")
    found = books.audit(output, listing, limited=success.get("limit") is not None)
    found.require_balance()
    counted = {"listed": found.listed, "labelled": found.labelled, "rejected": found.rejected, "kept": found.kept}
    wrong = [
        f"{name}: {said.get(name)} said, {number} found" for name, number in counted.items() if said.get(name) != number
    ]
    if wrong:
        raise BooksError(f"{output.at('_SUCCESS')} disagrees with the tables: {'; '.join(wrong)}")
    cli.result(
        f"{found.listed:,} images listed, {found.labelled:,} labelled, {found.rejected:,} rejected, {found.kept:,} kept; "
        f"{found.rows:,} rows, no image twice: the books of {output.uri} balance"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Effects: `imgbatch verify`: check a finished output."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from imgbatch import cli
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config import reading
from imgbatch.errors import BooksError, InputError, UsageError
from imgbatch.ledger.success_marker import read_success
from imgbatch.storage.stores import Folder, Stores, absolute
from imgbatch.terminal import console
from imgbatch.verification.file_checks import Check, record_of
from imgbatch.verification.run import AGAIN

_CODES = """\
exit codes:
  0  the books balance, and nothing is wrong with the files; with --sample, no label that was compared is wrong
  1  a bug: please report it with its traceback
  2  wrong flags, no finished output, or not the model of this output
  3  a store, or a process on this machine, failed; run the same command again
  5  foreign files or parts of another fingerprint lie in labels/ or rejects/, or a part is damaged
  6  the books do not balance, values are missing or wrong, a table is not sealed, or labels of the sample are wrong
  130, 143  stopped by SIGINT or SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return its exit code."""
    parser = cli.parser(
        "Recount the books of a finished output: each listed image in exactly one row of labels or rejects, no image\n"
        "twice, and the sums as _SUCCESS has them. Looks in the files for parts of another fingerprint, missing and\n"
        "impossible values, files that are no parts, and missing seals. Reads the tables and the listing; writes nothing.\n"
        "With --sample, images are fetched and labelled again on this machine, and compared with their rows.",
        _CODES,
    )
    parser.add_argument("output", metavar="OUTPUT", help="what classify.py was given as --output")
    parser.add_argument("--sample", type=int, metavar="N", help="label N rows of labels/, drawn at random, again")
    parser.add_argument(
        "--model", metavar="NAME_OR_URI", help="where the model of this output lies now; unset: where it lay then"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="draw the same sample again; unset: another each time")
    flags = cli.arguments(parser, argv)
    return cli.run(lambda: verify(flags), quiet=flags.quiet)


def verify(flags: Any) -> int:
    """Count, look, compare, and say so."""
    stop = StopRequest().install()
    settings = reading.load(flags.config, flags.settings, model=flags.model)
    require_flags(flags)
    output = Folder(Stores(settings.storage), absolute(flags.output))
    success = read_success(output)
    if success is None:
        raise InputError(
            f"{output.uri} has no _SUCCESS: no run has finished there, or one is under way; run classify.py to its end first"
        )
    if "run_id" not in success or not isinstance(success.get("counts"), dict):
        raise BooksError(f"{output.at('_SUCCESS')} is damaged: {AGAIN}")
    check = Check(output, success, record_of(output, str(success["run_id"])))
    sample = None
    if flags.sample:
        from imgbatch.verification.sample import Sample  # what labels images is not needed for counting

        seed = secrets.randbelow(1 << 31) if flags.seed is None else flags.seed
        sample = Sample(output, settings, flags.model, flags.sample, seed)
        check.take = sample.take
    console.step("counting the rows")
    found = check.run(stop.check)
    cli.result(
        f"{found.listed:,} images listed, {found.labelled:,} labelled, {found.rejected:,} rejected, {found.kept:,} kept; "
        f"{found.rows:,} rows, no image twice: the books of {output.uri} balance"
    )
    if sample is not None:
        cli.result(sample.compare(check.fingerprint, check.record, stop.check))
    return 0


def require_flags(flags: Any) -> None:
    """Refuse flags that go with --sample alone, and a sample of nothing.

    Raises:
        UsageError: naming them.
    """
    if flags.sample is None and (flags.model or flags.seed is not None):
        raise UsageError("--model and --seed go with --sample N: without it no image is labelled")
    if flags.sample is not None and flags.sample < 1:
        raise UsageError(f"--sample {flags.sample}: at least 1")
    if flags.seed is not None and flags.seed < 0:
        raise UsageError(f"--seed {flags.seed}: at least 0")

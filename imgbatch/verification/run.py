"""Effects: the checks of a finished output, from its files alone, and a sample that is labelled again."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from imgbatch.config.sections import Config
from imgbatch.errors import BooksError, InputError, UsageError
from imgbatch.ledger.success_marker import read_success
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console
from imgbatch.verification.file_checks import Check, record_of

AGAIN = "run the same classify.py command again, which does no work twice"


@dataclass(frozen=True, slots=True)
class VerificationSummary:
    """The counts of an output in which nothing is wrong."""

    output: str
    listed: int
    labelled: int
    rejected: int
    kept: int
    rows: int
    sample: str = ""
    """What the labels of the sample came to; empty without a sample."""

    def __str__(self) -> str:
        text = (
            f"{self.listed:,} images listed, {self.labelled:,} labelled, {self.rejected:,} rejected, {self.kept:,} kept; "
            f"{self.rows:,} rows, no image twice: the counts of {self.output} reconcile"
        )
        return f"{text}\n{self.sample}" if self.sample else text


def verify(
    place: str,
    settings: Config,
    *,
    sample: int | None = None,
    model: str | None = None,
    seed: int | None = None,
) -> VerificationSummary:
    """Recount a finished output from its files, look for what is wrong with them, and label a sample again.

    Args:
        place: the URI of the output.
        settings: the options of its store, and the limits of the sample's images.
        sample: how many rows of labels/ are labelled again.
        model: where the model of the output lies now; None: where it lay then.
        seed: of the sample; None: another one each time.

    Raises:
        OutputError: foreign files or parts.
        BooksError: rows are missing, double or wrong.
        InputError: there is no finished output.
        UsageError: options that do not go together.
    """
    _require_options(sample, model, seed)
    output = Folder(Stores(settings.storage), absolute(place))
    success = read_success(output)
    if success is None:
        raise InputError(
            f"{output.uri} has no _SUCCESS: no run has finished there, or one is under way; run classify.py to its end first"
        )
    if "run_id" not in success or not isinstance(success.get("counts"), dict):
        raise BooksError(f"{output.at('_SUCCESS')} is damaged: {AGAIN}")
    check = Check(output, success, record_of(output, str(success["run_id"])))
    drawn = None
    if sample:
        from imgbatch.verification.sample import Sample  # what labels images is not needed for counting

        drawn = Sample(output, settings, model, sample, secrets.randbelow(1 << 31) if seed is None else seed)
        check.take = drawn.take
    console.step("counting the rows")
    found = check.run()
    said = drawn.compare(check.fingerprint, check.record) if drawn is not None else ""
    return VerificationSummary(output.uri, found.listed, found.labelled, found.rejected, found.kept, found.rows, said)


def _require_options(sample: int | None, model: str | None, seed: int | None) -> None:
    if sample is None and (model or seed is not None):
        raise UsageError("--model and --seed go with --sample N: without it no image is labelled")
    if sample is not None and sample < 1:
        raise UsageError(f"--sample {sample}: at least 1")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed {seed}: at least 0")

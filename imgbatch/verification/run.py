"""Effects: verification of a finished output from its files alone, and with a sample that is labelled again."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from imgbatch.config.sections import Config
from imgbatch.errors import AuditError, InputError, UsageError
from imgbatch.ledger.success_marker import read_success
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console
from imgbatch.verification.file_checks import OutputCheck, record_of

_REMEDY = "run the same classify.py command again, which does not repeat finished work"


@dataclass(frozen=True, slots=True)
class VerificationSummary:
    """The counts of an output without problems."""

    output: str
    listed: int
    labelled: int
    rejected: int
    kept: int
    rows: int
    sample: str = ""
    """The result of comparing a sample; empty without one."""

    def __str__(self) -> str:
        text = (
            f"{self.listed:,} images listed, {self.labelled:,} labelled, {self.rejected:,} rejected, {self.kept:,} kept; "
            f"{self.rows:,} rows, no image twice: the counts of {self.output} reconcile"
        )
        return f"{text}\n{self.sample}" if self.sample else text


def verify(
    output_uri: str,
    config: Config,
    *,
    sample: int | None = None,
    model: str | None = None,
    seed: int | None = None,
) -> VerificationSummary:
    """Recount a finished output from its files, check the files, and label a sample again.

    Args:
        output_uri: the URI of the output.
        config: the options of its store, and the limits for the sample's images.
        sample: number of rows of labels/ that are labelled again; None: none.
        model: the current name or URI of the model of the output; None: as recorded.
        seed: of the sample; None: a random one.

    Raises:
        OutputError: the output contains foreign files or parts.
        AuditError: rows are missing, duplicated or wrong.
        InputError: the output is not finished.
        UsageError: options contradict each other.
    """
    _require_options(sample, model, seed)
    output = Folder(Stores(config.storage), absolute(output_uri))
    success = read_success(output)
    if success is None:
        raise InputError(
            f"{output.uri} has no _SUCCESS: no run has finished there, or one is running; run classify.py to its end first"
        )
    if "run_id" not in success or not isinstance(success.get("counts"), dict):
        raise AuditError(f"{output.at('_SUCCESS')} is damaged: {_REMEDY}")
    check = OutputCheck(output, success, record_of(output, str(success["run_id"])))
    drawn = None
    if sample:
        from imgbatch.verification.sample import Sample  # torch and Ray are not needed for counting

        drawn = Sample(output, config, model, sample, secrets.randbelow(1 << 31) if seed is None else seed)
        check.on_labels_part = drawn.add_part
    console.step("counting the rows")
    counts = check.run()
    result = drawn.compare(check.fingerprint, check.record) if drawn is not None else ""
    return VerificationSummary(
        output.uri, counts.listed, counts.labelled, counts.rejected, counts.kept, counts.rows, result
    )


def _require_options(sample: int | None, model: str | None, seed: int | None) -> None:
    if sample is None and (model or seed is not None):
        raise UsageError("--model and --seed need --sample N: without it no image is labelled")
    if sample is not None and sample < 1:
        raise UsageError(f"--sample {sample}: at least 1")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed {seed}: at least 0")

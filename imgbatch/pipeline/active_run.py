"""Effects: a run that holds the claim of its output: its job, its record, `_SUCCESS` and its summary."""

from __future__ import annotations

from dataclasses import dataclass, field

from imgbatch.errors import AuditError, OutputChangedError, OutputError, StoreError
from imgbatch.ledger import deleted_files, listing_pages
from imgbatch.ledger.claims import Claim
from imgbatch.ledger.run_record import Record
from imgbatch.ledger.success_marker import SuccessMarker
from imgbatch.pipeline.preflight import Job
from imgbatch.pipeline.run_summary import Tally, log
from imgbatch.quality.row_counts import RowCounts
from imgbatch.report.row_samples import RowSamples


@dataclass(slots=True)
class ForReport:
    """What a run keeps for its report."""

    samples: RowSamples = field(default_factory=RowSamples)
    before: RowCounts | None = None
    """The rows of the last success; None: nothing was compared."""
    judged: RowCounts | None = None
    """The rows that were compared with them."""
    tars: frozenset[str] = frozenset()
    """The URIs of the tars that the run reads."""


@dataclass(frozen=True, slots=True)
class ActiveRun:
    """The job, the claim of its output, and the three accounts of the run: run.json, `_SUCCESS` and the summary."""

    job: Job
    claim: Claim
    record: Record
    success: SuccessMarker
    tally: Tally
    verb: str = "classify"
    for_report: ForReport = field(default_factory=ForReport)

    def withdraw_success(self) -> None:
        """Remove `_SUCCESS`, since there is work to do.

        It may be that of a killed run, written late, but never that of a run that has taken over.

        Raises:
            OutputChangedError: another run has taken over.
        """
        if self.success.content is None:
            return
        self.claim.require_ours()
        self.success.keep_copy()
        try:
            self.success.withdraw()
        except (
            OutputChangedError
        ):  # it was replaced since it was read: by a late write, if this run still holds the claim
            self.claim.require_ours()
            self.success.refresh()
            self.success.keep_copy()
            self.success.withdraw()

    def release_claim(self) -> None:
        """Release the claim.

        Raises:
            OutputChangedError: another run has taken it over. The counted rows may have changed, so `_SUCCESS` is removed.
        """
        try:
            self.claim.require_released()
        except OutputChangedError:
            self.success.refresh()
            if (self.success.content or {}).get("run_id") == self.claim.run_id:
                self.success.withdraw()
            raise

    def raise_if_changed(self, error: Exception) -> None:
        """Raise another error if the run failed since the output was changed; remove a `_SUCCESS` that is no longer valid.

        Args:
            error: the failure of the run.

        Raises:
            OutputChangedError: another run has taken over, or something was deleted.
        """
        deleted = self._deleted_names()
        if isinstance(error, OutputChangedError) and not deleted:  # the error is complete as it is
            return
        try:
            self.claim.require_ours()
        except OutputChangedError as taken_over:  # `_SUCCESS` is another run's
            raise OutputChangedError(deleted or str(taken_over)) from error
        if deleted or isinstance(error, AuditError):  # `_SUCCESS` may be of an earlier run
            try:
                if self.success.content is None:  # the run failed before it read it
                    self.success.refresh()
                self.success.keep_copy()
                self.success.withdraw()
            except (StoreError, OutputError, OutputChangedError) as store_error:  # the first error is the one to report
                log.error("_SUCCESS could not be removed: %s", store_error)
        if deleted:
            raise OutputChangedError(deleted) from error

    def _deleted_names(self) -> str:
        """Return a sentence about files of tables and listing that were deleted during the run; empty if none was deleted."""
        ledger, record = self.job.ledger, self.record
        names_by_folder = {"labels": ledger.labels.names, "rejects": ledger.rejects.names}
        names_by_folder[f"runs/{record.id}/listing"] = listing_pages.page_names(record.listed_rows)
        try:
            return deleted_files.describe_deletion(self.job.output, names_by_folder)
        except StoreError as error:
            log.warning("the output could not be checked for deleted files: %s", error)
            return ""

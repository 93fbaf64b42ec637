"""Effects: a run that holds the claim of its output: what it works with, and what it writes about itself."""

from __future__ import annotations

from dataclasses import dataclass

from imgbatch.errors import AuditError, OutputChangedError, StoreError
from imgbatch.ledger import deleted_files, listing_pages
from imgbatch.ledger.claims import Claim
from imgbatch.ledger.run_record import Record
from imgbatch.ledger.success_marker import SuccessMarker
from imgbatch.pipeline.preflight import Job
from imgbatch.pipeline.run_summary import Tally, log


@dataclass(frozen=True, slots=True)
class ActiveRun:
    """The job, the claim of its output, and the three accounts of the run: run.json, `_SUCCESS` and the summary."""

    job: Job
    claim: Claim
    record: Record
    success: SuccessMarker
    tally: Tally

    def withdraw_success(self) -> None:
        """Remove `_SUCCESS`, since there is work to do.

        That may be the one of a killed run which arrived late, but never one of a run that has taken over.

        Raises:
            OutputChangedError: another run has taken over.
        """
        if self.success.content is None:
            return
        self.claim.require_ours()
        try:
            self.success.withdraw()
        except OutputChangedError:  # it was replaced since it was read: by a late write, if the claim is still ours
            self.claim.require_ours()
            self.success.refresh()
            self.success.withdraw()

    def release_claim(self) -> None:
        """Release the claim.

        Raises:
            OutputChangedError: another run has taken it over; what was counted may have changed, so `_SUCCESS` is removed.
        """
        try:
            self.claim.require_released()
        except OutputChangedError:
            self.success.refresh()
            if (self.success.content or {}).get("run_id") == self.claim.run_id:
                self.success.withdraw()
            raise

    def raise_if_changed(self, error: Exception) -> None:
        """Report that the output was changed during the run, if that is why it failed; remove a `_SUCCESS` that is wrong now.

        Args:
            error: why the run failed.

        Raises:
            OutputChangedError: another run has taken over, or something was deleted.
        """
        deleted = self._deleted_names()
        if isinstance(error, OutputChangedError) and not deleted:  # the error is complete as it is
            return
        try:
            self.claim.require_ours()
        except OutputChangedError as lost:  # `_SUCCESS` is another run's
            raise OutputChangedError(deleted or str(lost)) from error
        if deleted or isinstance(error, AuditError):  # `_SUCCESS` may be of an earlier run
            try:
                if self.success.content is None:  # the run failed before it read it
                    self.success.refresh()
                self.success.withdraw()
            except (StoreError, OutputChangedError) as second:  # the first error is the one to report
                log.error("_SUCCESS could not be removed: %s", second)
        if deleted:
            raise OutputChangedError(deleted) from error

    def _deleted_names(self) -> str:
        """Return what was deleted of the tables and the listing since the run has read or written them."""
        ledger, record = self.job.ledger, self.record
        seen = {"labels": ledger.labels.names, "rejects": ledger.rejects.names}
        seen[f"runs/{record.id}/listing"] = listing_pages.page_names(record.listed_rows)
        try:
            return deleted_files.describe_deletion(self.job.output, seen)
        except StoreError as second:
            log.warning("the output could not be looked at: %s", second)
            return ""

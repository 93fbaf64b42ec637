"""Effects: the end of a run: seals the logs, reads the tables back, and compares them with the listing and the budget."""

from __future__ import annotations

import pyarrow as pa

from imgbatch.errors import AuditError
from imgbatch.ledger import audit
from imgbatch.ledger.listing import Counts
from imgbatch.pipeline.active_run import ActiveRun
from imgbatch.pipeline.budget import check_budget


def seal(run: ActiveRun, carried: pa.Schema) -> str:
    """Seal both logs, unless the seals of the last success are still valid; return the id of the run of the valid seals.

    Args:
        carried: the carried columns of the listing.
    """
    ledger, run_id, success = run.job.ledger, run.record.id, run.success.content
    ledger.fill_gaps(run_id)
    if success is not None and ledger.sealed_by(success.get("seal")):
        return str(success["seal"])
    ledger.seal(run_id, carried)
    # Another writer has committed too: an image that it rejected and this run labelled has two rows. Opening the ledger again
    # removes the reject.
    if len(ledger.written_by_others):
        ledger.open()
    return run_id


def reconcile(run: ActiveRun, listed: Counts) -> tuple[dict[str, int], dict[str, int]]:
    """Read both tables back, and compare them with the listing and the budget; return the counts, and the rejects by reason.

    Raises:
        AuditError: an image has no row, or two.
        BudgetError: too many images have no label.
    """
    config, ledger = run.job.config, run.job.ledger
    parts = {"labels": ledger.labels.numbers, "rejects": ledger.rejects.numbers}
    listing = run.record.folder.folder("listing")
    totals = audit.audit(run.job.output, listing, limited=config.limit is not None, part_numbers=parts)
    run.tally.audited(totals)
    counts = {
        "listed": totals.listed,
        "labelled": totals.labelled,
        "rejected": totals.rejected,
        "already_done": listed.already_done,
        "updated": listed.updated,
        "ignored": listed.ignored,
        "duplicates": listed.duplicates,
        "kept": totals.kept,
        "unpaired_sidecars": listed.unpaired,
    }
    run.record.facts |= {"counts": counts, "rejects": dict(totals.reasons)}
    totals.require_reconciled()
    if totals.listed != listed.listed:
        raise AuditError(f"{listed.listed:,} images were listed, and {totals.listed:,} are on the listing's pages")
    check_budget(config.rejects, listed=totals.listed, labelled=totals.labelled, rejected=totals.rejected, at_end=True)
    return counts, dict(totals.reasons)

"""Effects: one run, on the driver: list, plan, fetch and decode, classify, commit, audit, success."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from imgbatch.concurrency import process
from imgbatch.concurrency.monitor import on_tick, tick
from imgbatch.concurrency.polling import poll_items
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config.sections import Config
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import AuditError, ClusterError, NotFound, OutputChangedError, StoreError
from imgbatch.ledger import audit, claims, deleted_files, listing_pages, run_record
from imgbatch.ledger.corrections import corrections, count_rows
from imgbatch.ledger.listing import Counts, WorkPlan
from imgbatch.ledger.success_marker import SuccessMarker
from imgbatch.models import loading
from imgbatch.pipeline import budget
from imgbatch.pipeline.preflight import Job, list_images, naming_the_output, prepare, warn_of_local_paths
from imgbatch.pipeline.run_summary import RunSummary, Tally
from imgbatch.sources import recognise
from imgbatch.terminal import console, progress
from imgbatch.terminal.plurals import counted, plural

if TYPE_CHECKING:
    from imgbatch.engine import placement, units
    from imgbatch.pipeline.committer import Committer

log = logging.getLogger("imgbatch")


def classify(chosen: Config, stop: StopRequest) -> RunSummary:
    """Label every image of the inputs that has no row yet, and write `_SUCCESS`.

    Args:
        chosen: the whole configuration.
        stop: asked, several times a second, whether the run is to end.

    Raises:
        ImgbatchError: the run could not be finished; `exit_code` says who has to act. Rows that had arrived are committed.
    """
    job = opened(chosen)
    console.step("checking that no other run writes the output")
    with naming_the_output(job):
        claim = claims.take(job.output, check=job.config.run.check_owner)
    with claim:
        return recorded(job, claim, stop)


def opened(chosen: Config) -> Job:
    """Return the run, checked; the output is there, and lets us in."""
    job = prepare(chosen)
    with naming_the_output(job):
        job.output.folders()
    if not job.output.conditional:
        log.warning("%s has no conditional writes: make sure that only one run writes there at a time", job.output.uri)
    return job


def dry_run(chosen: Config) -> str:
    """Return what a run would do; nothing is written."""
    job = opened(chosen)
    job.ledger.read_only = True
    listing = list_images(job, None)
    counts, work_plan = listing.counts, listing.work_plan()
    changed = corrections(job.ledger, listing.pages, listing.carried, work_plan.pending, limited=listing.full)
    counts.updated = sum(map(count_rows, changed))
    pending = int(work_plan.pending.sum()) - counts.tars
    size = f"{counts.bytes / 1e6:,.1f} MB" if counts.bytes else "size not known"
    tars = f" and what {plural(counts.tars, 'a tar holds', f'{counts.tars:,} tars hold')}" if counts.tars else ""
    updated = f" ({counts.updated:,} of these to get other carried values)" if counts.updated else ""
    stale = f", {counts.stale:,} of the {pending:,} to classify changed or to be tried again" if counts.stale else ""
    return (
        f"model {job.model.summary()}\n"
        f"would classify {pending:,} of {counted(counts.listed, 'image')}{tars} "
        f"({size}) with {job.model.reference} into {job.output.uri}: "
        f"{counts.already_done:,} already done{updated}{stale}, {counted(counts.ignored, 'object')} ignored, "
        f"{counted(counts.duplicates, 'duplicate')}; nothing was written"
    )


def recorded(job: Job, claim: claims.Claim, stop: StopRequest) -> RunSummary:
    """Run the job between the first and the last version of its run.json."""
    record = run_record.Record(
        job.output,
        {
            "config": job.config.public(),
            "fingerprint": job.ledger.fingerprint,
            "model": {"name": job.model.name, "digest": job.model.digest, "reference": job.model.reference},
        },
        claim.run_id,
        claim,
    )
    success = SuccessMarker(job.output)
    with naming_the_output(job):
        record.start()
    tally = Tally()
    log.info("model %s", job.model.summary())
    with (
        stop.on_timeout(record.record_interrupt),
        on_tick(record.beat),
        record.recording_failure(),
        tally.reported(record),
    ):
        try:
            counts, rejects = work_through(job, claim, record, success, stop, tally)
        except (AuditError, ClusterError, NotFound, OutputChangedError) as error:
            blame_changes(error, job, claim, record, success)
            raise
    record.finish("succeeded", 0)
    return RunSummary(record.id, job.output.uri, counts, rejects, tally.public())


def blame_changes(
    error: Exception, job: Job, claim: claims.Claim, record: run_record.Record, success: SuccessMarker
) -> None:
    """Say that the output was changed during the run, if that is why it failed; remove a `_SUCCESS` that is wrong now.

    Raises:
        OutputChangedError: another run has taken over, or something was deleted.
    """
    gone = what_is_gone(job, record)
    if isinstance(error, OutputChangedError) and not gone:  # it says all there is to say
        return
    try:
        claim.require_ours()
    except OutputChangedError as lost:  # `_SUCCESS` is another run's
        raise OutputChangedError(gone or str(lost)) from error
    if gone or isinstance(error, AuditError):  # of an earlier run's making, perhaps
        try:
            if success.content is None:  # it was not reached yet
                success.refresh()
            success.withdraw()
        except (StoreError, OutputChangedError) as second:  # the first error is the one to tell
            log.error("_SUCCESS could not be removed: %s", second)
    if gone:
        raise OutputChangedError(gone) from error


def what_is_gone(job: Job, record: run_record.Record) -> str:
    """Return what was deleted of the tables and the listing since the run has seen them."""
    seen = {"labels": job.ledger.labels.names, "rejects": job.ledger.rejects.names}
    seen[f"runs/{record.id}/listing"] = listing_pages.page_names(record.listed_rows)
    try:
        return deleted_files.describe_deletion(job.output, seen)
    except StoreError as second:
        log.warning("the output could not be looked at: %s", second)
        return ""


def work_through(
    job: Job, claim: claims.Claim, record: run_record.Record, success: SuccessMarker, stop: StopRequest, tally: Tally
) -> tuple[dict[str, int], dict[str, int]]:
    """List, label what is to be done, count, and write `_SUCCESS`; return the counts, and the rejects by reason."""
    success.refresh()  # first of all: one that another run writes from now on is not this run's to remove
    listing = list_images(job, record.folder.folder("listing"))
    listed, work_plan = listing.counts, listing.work_plan()
    changed = corrections(job.ledger, listing.pages, listing.carried, work_plan.pending, limited=listing.full)
    record.listed_rows = len(work_plan.pending)
    del listing  # and with it 16 bytes an image
    process.release_memory()
    for some in changed:
        withdraw(claim, success)
        job.ledger.correct(some)
        listed.updated += count_rows(some)
    if listed.updated:
        log.info("%s rows got other carried values", f"{listed.updated:,}")
    if work_plan.pending.any() or (job.config.run.prune and listed.listed and job.ledger.unlisted_rows()):
        withdraw(claim, success)
    if work_plan.pending.any():
        label(job, record, listed, work_plan, stop, tally)
    console.step("reading the tables back")
    process.release_memory()
    tick()
    if job.config.run.prune and listed.listed:  # an empty listing is more likely a mistake than an order to empty all
        job.ledger.prune(listed.unread)
    sealed_by = seal(job, record, success.content)
    job.ledger.release_index()
    success.refresh()  # a newer one, of a run that ends during the audit, is not replaced
    counts, totals = count(job, record, listed, tally)
    claim.require_ours()
    success.write(record.id, counts, job.config.limit, sealed_by)
    release(claim, success)
    return counts, dict(totals.reasons)


def withdraw(claim: claims.Claim, success: SuccessMarker) -> None:
    """Remove `_SUCCESS`, since there is work to do; also the late one of a killed run, but not that of a run that took over."""
    if success.content is None:
        return
    claim.require_ours()
    try:
        success.withdraw()
    except OutputChangedError:
        claim.require_ours()
        success.refresh()
        success.withdraw()


def release(claim: claims.Claim, success: SuccessMarker) -> None:
    """Release the claim; if another run has taken it over in between, what was counted may have changed: no `_SUCCESS`."""
    try:
        claim.require_released()
    except OutputChangedError:
        success.refresh()
        if (success.content or {}).get("run_id") == claim.run_id:
            success.withdraw()
        raise


def label(
    job: Job, record: run_record.Record, counts: Counts, work_plan: WorkPlan, stop: StopRequest, tally: Tally
) -> None:  # fmt: skip
    """Have the pending images labelled on the cluster, and commit their rows as they come."""
    from imgbatch.engine import placement, session  # Ray and torch are not needed where there is nothing to do
    from imgbatch.inference.worker import Work
    from imgbatch.pipeline.committer import Committer

    remaining = None if job.config.limit is None else job.config.limit - counts.listed
    asks = partial(recognise.store_is_reachable, job.sources)
    committer = Committer(
        job.ledger,
        record.id,
        job.model.reference,
        work_plan,
        job.config.run.commit_interval_s,
        asks,
        remaining=remaining,
        retried=counts.stale,
    )
    shown = progress.Progress("labelling", None if work_plan.tars else int(work_plan.pending.sum()))

    def receive(work: Work, plan: placement.Plan, round: units.Round) -> None:
        left_out = len(committer.left_out)
        plan = placement.without(plan, committer.left_out)
        shown.start(int(work_plan.pending.sum()), round.rows)
        blocks = poll_items(
            placement.label_images(work, plan, work_plan, round), job.config.cluster.stall_timeout_s, closes=True
        )
        with closing(blocks):
            for block in blocks:
                tick()
                if block is not None:
                    committer.take(block)
                if committer.due:
                    committer.commit()
                    process.trim_memory()
                    judge_on_the_way(job, counts, committer)
                shown.update(committer.arrived, committer.rejected)
                record.beat(**facts_on_the_way(counts, committer, tally))
                if committer.close_at_limit() or len(committer.left_out) > left_out:
                    break

    try:
        if not work_plan.pending.any():  # but for tars, and there are more images than the limit without them
            return
        limits = job.config.cluster
        with stop.reinstall_after_ray(), session.connected(limits.call_s), committer, closing(shown):
            tick()  # which takes the signals over in C, too, where Ray has taken SIGTERM
            plan = placement.plan(limits)
            warn_of_local_paths(job.output, job.sources, plan.nodes)
            if (
                work_plan.tars and job.config.limit is not None
            ):  # the first members are those that one worker reads first
                plan = replace(plan, actors=1, min_actors=1, max_actors=1)
            with loading.share_weights(job.model, None if plan.one_machine else record.folder.folder("model")) as model:
                work = Work(job.stores, record.folder.folder("listing"), WorkerConfig.of(job.config), model)
                hand_out(committer, partial(receive, work, plan), plan.nodes, partial(placement.nodes, limits))
                committer.give_up(work.listing, placement.TRIES)
    finally:
        record.facts |= {**facts_on_the_way(counts, committer, tally), **committer.report()}
        add_members(counts, committer)


def add_members(counts: Counts, committer: Committer) -> None:
    """Add to the counts of a listing what was found in tars."""
    counts.listed += committer.tar_rows
    counts.ignored += committer.ignored_members
    counts.unpaired += committer.unpaired
    committer.warn_of_unpaired()


def hand_out(
    committer: Committer, receive: Callable[[units.Round], None], nodes: int, alive: Callable[[], set[str]]
) -> None:
    """Hand out what is pending in ever smaller units; in units of one size again where nodes were lost on the way."""
    from imgbatch.engine import units

    work_plan = committer.work_plan
    for round in units.ROUNDS:
        while work_plan.pending.any():
            there, left_out = alive(), len(committer.left_out)
            receive(round)
            if len(committer.left_out) > left_out:  # what the node had is handed out to the others
                continue
            if there <= alive() or not committer.moved_on():
                break
            log.warning("nodes were lost in mid-run: what they had is handed out again")
        committer.blame_the_cluster(nodes, round.lost, last=round is units.ROUNDS[-1])
    while work_plan.tars and work_plan.pending.any() and committer.moved_on():
        receive(units.ROUNDS[-1])


def seal(job: Job, record: run_record.Record, success: dict[str, Any] | None) -> str:
    """Seal both logs, unless they still are since the last success; return the run whose seal holds."""
    job.ledger.fill_gaps(record.id)
    if success is not None and job.ledger.sealed_by(success.get("seal")):
        return str(success["seal"])
    job.ledger.seal(record.id)
    if len(
        job.ledger.written_by_others
    ):  # another writer was here: what he rejected and we labelled is settled by reading anew
        job.ledger.open()
    return record.id


def count(
    job: Job, record: run_record.Record, listed: Counts, tally: Tally
) -> tuple[dict[str, int], audit.AuditResult]:
    """Read both tables back, and hold them against the listing and the budget.

    Raises:
        AuditError: an image is missing or double.
        BudgetError: too many have no label.
    """
    known = {"labels": job.ledger.labels.numbers, "rejects": job.ledger.rejects.numbers}
    totals = audit.audit(job.output, record.folder.folder("listing"), limited=job.config.limit is not None, known=known)
    tally.audited(totals)
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
    record.facts |= {"counts": counts, "rejects": dict(totals.reasons)}
    totals.require_reconciled()
    if totals.listed != listed.listed:
        raise AuditError(f"{listed.listed:,} images were listed, and {totals.listed:,} are on the listing's pages")
    budget.judge(
        job.config.rejects, listed=totals.listed, labelled=totals.labelled, rejected=totals.rejected, at_end=True
    )
    return counts, totals


def judge_on_the_way(job: Job, listed: Counts, committer: Committer) -> None:
    """Stop early where the budget is already spent."""
    budget.judge(
        job.config.rejects,
        listed=committer.arrived,
        labelled=listed.already_done + committer.labelled,
        rejected=committer.rejected,
        at_end=False,
    )


def facts_on_the_way(listed: Counts, committer: Committer, tally: Tally) -> dict[str, dict[str, Any]]:
    """Return both kinds of counts as far as they are known in the middle of a run."""
    tally.take(committer)
    counts = {
        "listed": listed.listed + committer.tar_rows,
        "labelled": committer.labelled,
        "rejected": committer.rejected,
        "already_done": listed.already_done,
        "updated": listed.updated,
        "ignored": listed.ignored + committer.ignored_members,
        "duplicates": listed.duplicates,
        "unpaired_sidecars": listed.unpaired + committer.unpaired,
    }
    return {"counts": counts, "this_run": tally.public()}

"""Effects: one run, on the driver: list, plan, fetch and decode, classify, commit, audit, guards, success."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imgbatch.concurrency import process
from imgbatch.concurrency.monitor import on_tick, tick
from imgbatch.concurrency.signals import StopRequest
from imgbatch.config.sections import Config
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import AuditError, ClusterError, NotFound, OutputChangedError
from imgbatch.ledger import claims, run_record
from imgbatch.ledger.corrections import corrections, count_rows
from imgbatch.ledger.ledger import Corrections
from imgbatch.ledger.listing import Counts
from imgbatch.ledger.success_marker import SuccessMarker
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.models import loading
from imgbatch.orchestration import metrics_export, notify
from imgbatch.pipeline.active_run import ActiveRun
from imgbatch.pipeline.arrivals import Arrivals
from imgbatch.pipeline.budget import check_budget
from imgbatch.pipeline.canary import prepare_canary
from imgbatch.pipeline.committer import Committer
from imgbatch.pipeline.finish_by import Punctuality, on_late
from imgbatch.pipeline.guarding import apply_guards, require_usable_guards
from imgbatch.pipeline.live_facts import LiveFacts
from imgbatch.pipeline.plan_outcome import PlanOutcome
from imgbatch.pipeline.preflight import Job, list_images, naming_the_output, open_output, warn_of_local_paths
from imgbatch.pipeline.reconcile import reconcile, seal
from imgbatch.pipeline.run_report import reported
from imgbatch.pipeline.run_statistics import RunStatistics
from imgbatch.pipeline.run_summary import RunSummary, Tally, log
from imgbatch.pipeline.store_health import StoreHealth
from imgbatch.sources import recognise
from imgbatch.terminal import console, progress

if TYPE_CHECKING:
    from imgbatch.engine.dataset import Attempt
    from imgbatch.engine.placement import Plan
    from imgbatch.inference.canary import Canary
    from imgbatch.inference.worker import Work


def classify(config: Config, stop: StopRequest) -> RunSummary:
    """Label every image of the inputs that has no row yet, and write `_SUCCESS`.

    Args:
        config: the whole configuration.
        stop: a stop request; checked several times a second.

    Raises:
        ImgbatchError: the run could not be finished; `exit_code` gives the cause. Rows that had arrived are committed.
    """
    with notify.at_end(config.notify, "classify", config.output.uri) as notification, on_late(notification.send_late):
        job = open_output(config)
        console.step("checking that no other run writes the output")
        with naming_the_output(job):
            claim = claims.take(job.output, check=job.config.run.check_owner)
        with claim:
            return run_job(job, claim, stop)


def run_job(job: Job, claim: claims.Claim, stop: StopRequest, verb: str = "classify") -> RunSummary:
    """Run the job under its claim; run.json is written first and last, and in between every few seconds."""
    with metrics_export.written(job.config.metrics, verb, job.output.uri, job.output, stop):
        return recorded(job, claim, stop, verb)


def recorded(job: Job, claim: claims.Claim, stop: StopRequest, verb: str) -> RunSummary:
    """Run the job with its record."""
    facts = {
        "config": job.config.public(),
        "fingerprint": job.ledger.fingerprint,
        "model": {"name": job.model.name, "digest": job.model.digest, "reference": job.model.reference},
    }
    record = run_record.Record(job.output, facts, claim.run_id, claim)
    run = ActiveRun(job, claim, record, SuccessMarker(job.output), Tally(), verb)
    with naming_the_output(job):
        record.start()
    log.info("model %s", job.model.summary())
    with reported(run, stop):
        with (
            stop.on_timeout(record.record_interrupt),
            on_tick(record.beat),
            record.recording_failure(),
            run.tally.reported(record),
        ):
            try:
                counts, rejects = work_through(run, stop)
            except (AuditError, ClusterError, NotFound, OutputChangedError) as error:
                run.raise_if_changed(error)
                raise
        record.finish("succeeded", 0)
    return RunSummary(record.id, job.output.uri, counts, rejects, run.tally.public())


def work_through(run: ActiveRun, stop: StopRequest) -> tuple[dict[str, int], dict[str, int]]:
    """List, plan, label, commit, audit, apply the guards, write `_SUCCESS`; return the counts, and the rejects by reason."""
    job = run.job
    # Read first: this run must not remove a `_SUCCESS` that another run writes later.
    run.success.refresh()
    require_usable_guards(run)
    canary = prepare_canary(job.stores, job.config, job.model, run.record.folder.folder("canary"))

    run.record.enter("listing")
    # List the inputs, and plan: the work plan has the images that are new or changed, and the rejects that are retried.
    listing = list_images(job, run.record.folder.folder("listing"))
    listed, work_plan, carried = listing.counts, listing.work_plan(), listing.carried
    changed = corrections(job.ledger, listing.pages, carried, work_plan.pending, limited=listing.full)
    run.record.listed_rows = len(work_plan.pending)
    del listing  # it has 16 bytes an image
    process.release_memory()
    listed = replace(listed, updated=correct_rows(run, changed))

    # Fetch, decode and classify on the cluster; commit here.
    if work_plan.remaining or (job.config.run.prune and listed.listed and job.ledger.unlisted_rows()):
        run.withdraw_success()
    planned = None
    if work_plan.remaining:
        planned = PlanOutcome.read(job.output, job.ledger.fingerprint, work_plan.remaining)
        listed = label(run, listed, work_plan, stop, canary, planned)

    # Audit the tables in the store, and write `_SUCCESS`.
    run.record.enter("auditing")
    console.step("reading the tables back")
    process.release_memory()
    tick()
    if (
        job.config.run.prune and listed.listed
    ):  # an empty listing is more likely a mistake than a request to remove all rows
        job.ledger.prune(listed.unread)
    sealed_by = seal(run, carried)
    job.ledger.release_index()
    run.success.refresh()  # a `_SUCCESS` that another run writes during the audit is not replaced
    counts, rejects = reconcile(run, listed)

    if planned is not None:
        run.record.facts["plan"] = planned.compare(run.tally.seconds, run.record.facts.get("cluster", {}).get("actors"))

    # Compare the new rows with those of the last success; a guard may hold the run back.
    rows = apply_guards(run, sealed_by)
    run.claim.require_ours()
    run.success.write(run.record.id, counts, job.config.limit, sealed_by, rows)
    run.release_claim()
    return counts, rejects


def correct_rows(run: ActiveRun, changed: Iterator[Corrections]) -> int:
    """Rewrite the carried columns of rows that are done and have other values in the input now; return the number of rows."""
    updated = 0
    for batch in changed:
        run.withdraw_success()
        run.job.ledger.correct(batch)
        updated += count_rows(batch)
    if updated:
        log.info("%s rows got other carried values", f"{updated:,}")
    return updated


def label(
    run: ActiveRun,
    listed: Counts,
    work_plan: WorkPlan,
    stop: StopRequest,
    canary: Canary | None = None,
    planned: PlanOutcome | None = None,
) -> Counts:
    """Label the pending images on the cluster, and commit their rows as they arrive.

    Args:
        planned: the plan of the run; it has an estimate of the number of images in tars.

    Returns:
        The counts of the listing and of the streams.
    """
    job, record = run.job, run.record
    limit = job.config.limit
    arrivals = Arrivals(work_plan, remaining=None if limit is None else limit - listed.listed)
    run.for_report.tars = frozenset(stream.uri for stream in work_plan.streams.values())
    statistics = RunStatistics()
    health = StoreHealth(partial(recognise.store_is_reachable, job.sources))
    commit_s = job.config.run.commit_interval_s
    committer = Committer(
        job.ledger,
        record.id,
        job.model.reference,
        arrivals,
        statistics,
        health,
        commit_s,
        samples=run.for_report.samples,
    )
    expected = work_plan.total if work_plan.total is not None or planned is None else planned.images
    punctuality = Punctuality.of(job.config.run.finish_by, record.facts, expected)
    live = LiveFacts(listed, committer, progress.Progress("labelling", work_plan.total))
    record.live_facts = partial(facts_so_far, run, live)
    try:
        if work_plan.remaining:  # otherwise only streams were pending, and the other images reach the limit
            label_on_cluster(run, live, punctuality, canary, stop)
    finally:
        record.live_facts = None
        record.facts |= facts_so_far(run, live)
        arrivals.warn_of_unpaired()
    return listed.with_streams(work_plan.found)


def label_on_cluster(
    run: ActiveRun, live: LiveFacts, punctuality: Punctuality, canary: Canary | None, stop: StopRequest
) -> None:
    """Run the attempts on the cluster, commit the rows that arrive, and reject the images that were lost."""
    # Ray and torch are not needed if no image is pending.
    from imgbatch.engine import dataset, placement, session
    from imgbatch.engine.attempts import run_attempts
    from imgbatch.inference.worker import Work

    job, committer, shown, limits = run.job, live.committer, live.progress, run.job.config.cluster
    run.record.enter("starting")
    with (
        stop.reinstall_after_ray(),
        session.connected(limits.call_s),
        metrics_export.exported(run.verb, job.output.uri) as publish,
        committer,
        closing(shown),
    ):
        tick()  # installs the signal handlers again, in C too, since Ray has replaced that of SIGTERM
        plan = placement.wait_for_plan(limits)
        warn_of_local_paths(job.output, job.sources, plan.nodes)
        live.gpu_actors = plan.actors if plan.split else None
        one_reader = bool(committer.work_plan.streams) and job.config.limit is not None
        if one_reader:  # "the first images" is only defined if one worker reads
            plan = plan.with_one_actor()
        run.record.facts["cluster"] = plan.public()
        replan = (lambda plan: plan) if one_reader else partial(use_new_nodes, run, punctuality)
        with loading.share_weights(job.model, None if plan.one_machine else run.record.folder.folder("model")) as model:
            listing = run.record.folder.folder("listing")
            work = Work(job.stores, listing, WorkerConfig.of(job.config), model, canary=canary)
            attempts = run_attempts(
                partial(label_images, work), plan, committer, limits,
                on_attempt=shown.start, retried=live.listed.stale, replan=replan,
            )  # fmt: skip
            with closing(attempts) as blocks:
                for block in blocks:
                    if block is not None:
                        committer.take(block)
                    if committer.due:
                        committer.commit()
                        process.trim_memory()
                        check_budget_so_far(run, live.listed, committer)
                    shown.update(committer.arrived, committer.statistics.rejected)
                    punctuality.check(committer.arrived)
                    run.record.enter(live.stage)
                    tick()  # raises a stop request before it writes the heartbeat
                    if committer.arrivals.close_at_limit():
                        break
            committer.reject_lost(listing, dataset.TRIES)
        publish(run.record.facts | facts_so_far(run, live))


def use_new_nodes(run: ActiveRun, punctuality: Punctuality, plan: Plan) -> Plan:
    """Return the plan of the next attempt: with the nodes that have joined the cluster, if the run will be late."""
    from imgbatch.engine import placement

    if punctuality.should_grow():
        plan = placement.with_new_nodes(plan, run.job.config.cluster)
        run.record.facts["cluster"] = plan.public()
    return plan


def label_images(work: Work, attempt: Attempt) -> Iterator[pa.Table]:
    """Yield blocks of result rows for the pending images of an attempt.

    With GPUs, CPU tasks fetch and decode, and pixels are sent to actors that classify. Otherwise one actor per core does
    all steps, since moving pixels between processes would cost more.
    """
    from imgbatch.engine.dataset import Images
    from imgbatch.inference.worker import Classify, LabelImages, decode_block

    images = Images(attempt, work)
    if attempt.plan.split:
        yield from images.map_tasks(decode_block).map_gpu_actors(Classify)
    else:
        yield from images.map_actors(LabelImages)


def check_budget_so_far(run: ActiveRun, listed: Counts, committer: Committer) -> None:
    """Stop early if the budget for rejects is already spent.

    Raises:
        BudgetError: too many images were rejected.
    """
    statistics = committer.statistics
    check_budget(
        run.job.config.rejects,
        listed=statistics.arrived,
        labelled=listed.already_done + statistics.labelled,
        rejected=statistics.rejected,
        at_end=False,
    )


def facts_so_far(run: ActiveRun, live: LiveFacts) -> dict[str, Any]:
    """Return the facts of run.json in the middle of a run: those of the output, and of this run."""
    run.tally.take(live.committer.statistics)
    return {**live.public(), "this_run": run.tally.public()}

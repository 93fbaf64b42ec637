"""Effects: the report that a run writes when it ends: reads the pictures, and writes runs/RUN_ID/report.html."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from imgbatch.concurrency.signals import StopRequest
from imgbatch.config.secrets import masked
from imgbatch.config.sections import Config
from imgbatch.errors import Interrupted, NotFound, StoreError
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.run_record import json_object, read_record
from imgbatch.ledger.status import LABELS_LOG
from imgbatch.ledger.success_marker import LAST_SUCCESS, read_success
from imgbatch.pipeline.active_run import ActiveRun
from imgbatch.pipeline.plan_outcome import PLAN
from imgbatch.quality.check import levels_of
from imgbatch.quality.read_rows import newest_parts
from imgbatch.quality.row_counts import LABEL, RunRange
from imgbatch.report.row_samples import COLUMNS, SampledRow
from imgbatch.report.run_view import OF_MOVED, RunView
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console

log = logging.getLogger("imgbatch")

REPORT = "report.html"
_SECONDS, _PROPORTION, _MAX_SECONDS = 4.0, 0.03, 20.0
"""The time limit for pictures: 4 s, or this proportion of the time of the run, up to 20 s."""
_PARTS = 8
"""The maximum number of parts that are read for images of the last run."""


@contextmanager
def reported(run: ActiveRun, stop: StopRequest) -> Iterator[None]:
    """When the block ends, write the report of a run that has new rows, or failed the canary, whatever its end was.

    A report that cannot be written is a warning. That of a run that is being stopped has no pictures, and is left out if the
    stop is slow, since the claim must still be released. `imgbatch report` can write it later.
    """
    config, output = run.job.config, run.job.output
    # For a store that is down, and for a stop: the report must not delay the end of the run.
    without_retries = Folder(Stores(replace(config.storage, retries=0)), output.uri)
    try:
        yield
    except Interrupted:
        if not stop.is_slow:
            without_pictures = replace(config, report=replace(config.report, thumbnails=False))
            _write_at_end(run, without_retries, without_pictures)
        raise
    except Exception as error:
        _write_at_end(run, without_retries if isinstance(error, StoreError) else output, config)
        raise
    _write_at_end(run, output, config)


def _seconds(run: ActiveRun) -> float:
    """Return the time limit for pictures."""
    in_proportion = min(_MAX_SECONDS, max(_SECONDS, _PROPORTION * run.tally.seconds))
    return run.job.config.report.timeout_s or in_proportion


def _write_at_end(run: ActiveRun, output: Folder, config: Config) -> None:
    """Write the report, if the run has one."""
    facts, kept = run.record.facts, run.for_report
    failed_canary = any(not score.get("passed", True) for score in facts.get("canary") or ())
    if run.verb != "classify" or not config.report.enabled or not (kept.samples.counts.rows or failed_canary):
        return
    try:
        console.step("writing the report")
        folder = output.folder(f"runs/{run.record.id}")
        view = RunView(
            output=masked(output.uri), facts=facts, state=str(facts.get("status")), last=last_success(output, facts),
            plan=plan_of(output, facts), samples=kept.samples, before=kept.before, now=kept.judged or kept.samples.counts,
            levels=levels_of(run.job.model),
        )  # fmt: skip
        write(output, folder, view, config, kept.tars, _seconds(run))
    except Interrupted:
        log.warning("the report was not written, since the job was stopped: imgbatch report writes it")
    except Exception as error:
        log.warning("the report could not be written: %s", masked(str(error)) or type(error).__name__)
        log.debug("the report could not be written", exc_info=True)


def write(output: Folder, folder: Folder, view: RunView, config: Config, tars: Collection[str], seconds: float) -> str:
    """Read the pictures, write the report, and return its URI.

    Args:
        output: of the run.
        folder: of the run below it.
        view: what the report shows, without pictures and earlier images.
        config: the stores and limits for reading images.
        tars: the URIs of the tars among the inputs.
        seconds: the time limit for pictures.
    """
    from imgbatch.report.pictures import pictures
    from imgbatch.report.run_page import page

    view.earlier = earlier_rows(output, view)
    if config.report.thumbnails:
        view.pictures = pictures(output.stores, config, view.wanted(), tars, seconds)
    folder.put(REPORT, page(view).encode())
    uri = masked(folder.at(REPORT))
    log.info("report: %s", uri)
    return uri


def last_success(output: Folder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run.json of the last success before a run, or of that which it was compared with; empty if there is none."""
    reference = (facts.get("drift") or {}).get("reference") or {}
    if "output" in reference:  # another output, by guard.reference
        return read_record(compared_output(output, facts), str(reference["through"]))
    found = [read_success(output) or {}]
    with suppress(NotFound):
        found.append(json_object(output.read(LAST_SUCCESS)))
    runs = [str(content["run_id"]) for content in found if content.get("run_id")]
    before = max((run for run in runs if run < str(facts.get("run_id"))), default=None)
    return read_record(output, before) if before else {}


def compared_output(output: Folder, facts: Mapping[str, Any]) -> Folder:
    """Return the output that a run was compared with."""
    reference = (facts.get("drift") or {}).get("reference") or {}
    return Folder(output.stores, absolute(reference["output"])) if "output" in reference else output


def plan_of(output: Folder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan that a run was compared with; empty if there is none, or it was made for another run."""
    compared = facts.get("plan")
    if not isinstance(compared, Mapping) or "not_compared" in compared:
        return {}
    try:
        plan = json_object(output.read(PLAN))
    except NotFound:
        return {}
    return plan if plan.get("id") == compared.get("id") else {}


def earlier_rows(output: Folder, view: RunView) -> dict[str, Sequence[SampledRow]]:
    """Return images of the run that was compared with, of the labels of which there are fewer now.

    The newest parts of that run are read until there are enough.
    """
    reference = view.drift.get("reference") or {}
    shift = view.drift.get("labels") or {}
    fallen = [each.label for each in view.moved() if each.has_fallen]
    if not fallen or not reference.get("through"):
        return {}
    node_of = {label: node for node in fallen for label in view.labels_of(shift["level"], node)}
    runs = RunRange(str(reference.get("after") or ""), str(reference["through"]))
    found: dict[str, list[SampledRow]] = {node: [] for node in fallen}
    parts = Log(compared_output(output, view.facts).folder(LABELS_LOG))
    parts.scan()
    read = 0
    with closing(newest_parts(parts, [], COLUMNS, runs.after)) as tables:
        for footer, rows in tables:
            if not len(rows) or not runs.contains(footer.run_id) or LABEL not in rows.column_names:
                continue
            read += 1
            labels = rows[LABEL].to_pylist()
            for at, label in enumerate(labels):
                node = node_of.get(label)
                if node is not None and len(found[node]) < OF_MOVED:
                    found[node].append(SampledRow.of(rows.slice(at, 1).to_pylist()[0]))
            if read >= _PARTS or all(len(kept) >= OF_MOVED for kept in found.values()):
                break
    return dict(found)

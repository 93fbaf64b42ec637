"""Effects: `imgbatch report`: the report of a run from what is in the store, also of a run that is still running."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from imgbatch.concurrency.monitor import tick
from imgbatch.config.secrets import masked
from imgbatch.config.sections import Config
from imgbatch.errors import ImgbatchError, InputError
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.run_record import newest, read_record
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.orchestration.status import Found, look
from imgbatch.pipeline.run_report import compared_output, last_success, plan_of, write
from imgbatch.quality.check import levels_of
from imgbatch.quality.guards import Levels
from imgbatch.quality.read_rows import count_rows, newest_parts
from imgbatch.quality.row_counts import RowCounts, RunRange
from imgbatch.report.row_samples import COLUMNS, RowSamples
from imgbatch.report.run_view import RunView
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console
from imgbatch.verification.sample import load_original_model, original_config

log = logging.getLogger("imgbatch")

_SECONDS = 20.0
_OF_REJECTS = ("uri", "stage", "reason", "message", "passing", "size", "etag", "last_modified")


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """The result of `imgbatch report`."""

    report: str
    """The URI of the report."""
    run_id: str
    state: str
    """running, succeeded, failed, interrupted or lost."""

    def __str__(self) -> str:
        return f"run {self.run_id} ({self.state}): {self.report}"


def write_report(output_uri: str, config: Config, *, run_id: str | None = None) -> ReportSummary:
    """Write the report of a run again, from its record and the tables.

    Args:
        output_uri: the output of classify, finished or not.
        config: the stores, and the limits for reading images.
        run_id: None: the newest run.

    Raises:
        InputError: there is no such run.
        OutputError: a part is damaged or foreign.
        ImgbatchError: the store cannot be read, or the report not be written.
    """
    stores = Stores(config.storage)
    output = Folder(stores, absolute(output_uri))
    name = run_id or next(iter(newest(output)[-1:]), None)
    if name is None or name.strip("./") != name or "/" in name or not read_record(output, name):
        which = f"run {run_id}" if run_id else "run"
        raise InputError(
            f"{output.uri} has no {which}: give the --output of classify; its runs are in {output.at('runs')}"
        )
    status = look(Found(output, f"runs/{name}/run.json"))
    facts = status.facts
    console.step("reading the rows of the run")
    last = last_success(output, facts)
    samples, tars = _samples(output, _runs(facts, last, name))
    view = RunView(
        output=masked(output.uri), facts=facts, state=status.state, last=last, plan=plan_of(output, facts), samples=samples,
        before=_before(output, facts), now=samples.counts, levels=_levels(output, config, facts),
    )  # fmt: skip
    recorded = facts.get("config") or {}
    shown = config.report.thumbnails and (recorded.get("report") or {}).get("thumbnails", True)
    source = replace(config.source, format=(recorded.get("source") or {}).get("format", config.source.format))
    config = replace(config, source=source, report=replace(config.report, thumbnails=shown))
    console.step("reading the pictures")
    uri = write(output, output.folder(f"runs/{name}"), view, config, tars, config.report.timeout_s or _SECONDS)
    return ReportSummary(uri, name, status.state)


def _runs(facts: Mapping[str, Any], last: Mapping[str, Any], run_id: str) -> RunRange:
    """Return the runs whose rows are shown: those that were compared, else all since the last success."""
    reference = (facts.get("drift") or {}).get("reference") or {}
    if "output" in reference:  # another output, by guard.reference
        return RunRange("", run_id)
    return RunRange(str(reference.get("through") or last.get("run_id") or ""), run_id)


def _samples(output: Folder, runs: RunRange) -> tuple[RowSamples, set[str]]:
    """Return samples of the rows of some runs, and the tars that they are from."""
    samples, tars = RowSamples(), set[str]()
    for name, columns in (
        (LABELS_LOG, tuple(column for column in COLUMNS if column not in _OF_REJECTS[1:5])),
        (REJECTS_LOG, _OF_REJECTS),
    ):
        parts = Log(output.folder(name))
        parts.scan()
        with closing(newest_parts(parts, [], columns, runs.after)) as tables:
            for footer, rows in tables:
                tick()
                if runs.contains(footer.run_id):
                    tars.update(footer.streams)
                    samples.take(rows)
    return samples, tars


def _before(output: Folder, facts: Mapping[str, Any]) -> RowCounts | None:
    """Return the counts of the rows that were compared with; None if none were."""
    reference = (facts.get("drift") or {}).get("reference") or {}
    if not reference.get("through"):
        return None
    runs = RunRange(str(reference.get("after") or ""), str(reference["through"]))
    return count_rows(compared_output(output, facts), [runs])[0]


def _levels(output: Folder, config: Config, facts: Mapping[str, Any]) -> Levels:
    """Return the levels of the model's taxonomy; none if the model cannot be loaded."""
    fingerprint = facts.get("fingerprint") or {}
    try:
        original = original_config(config, None, fingerprint, facts)
        return levels_of(load_original_model(output, original.model, fingerprint, is_named=False))
    except ImgbatchError as error:
        log.warning("the report has no levels, since the model cannot be loaded: %s", masked(str(error)))
        return ()

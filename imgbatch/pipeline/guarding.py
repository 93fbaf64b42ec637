"""Effects: the guards at the end of a run: the new rows are compared with those of the last success."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from imgbatch.config.secrets import masked
from imgbatch.errors import OutputError, StoreError
from imgbatch.pipeline.active_run import ActiveRun
from imgbatch.quality.check import QualityCheck
from imgbatch.terminal import console

log = logging.getLogger("imgbatch")


def require_usable_guards(run: ActiveRun) -> None:
    """Check `guard.accept` and `guard.reference` before any work.

    Raises:
        ConfigError: one of them cannot be used.
    """
    if run.job.config.guard.accept is not None or run.job.config.guard.reference is not None:
        _check(run).reference(run.success.last())


def apply_guards(run: ActiveRun, sealed_by: str) -> Mapping[str, Any] | None:
    """Compare the new rows with those of the last success; return the rows that the next run is compared with.

    What was found is in `drift` of run.json. Without guards, tables that cannot be read are only a warning.

    Args:
        sealed_by: the run of the seals.

    Raises:
        GuardError: a guard holds the run back.
    """
    check, success, guards = _check(run), run.success, run.job.config.guard
    if success.content and sealed_by == success.content.get("seal") and guards.accept is None:  # no row was added since
        verdict = check.unchanged(success.content)
    else:
        console.step("comparing the labels with earlier ones")
        ledger = run.job.ledger
        try:
            verdict = check.judge(success.last(), {"labels": ledger.labels.numbers, "rejects": ledger.rejects.numbers})
        except (StoreError, OutputError) as error:
            if guards.is_on:
                raise
            log.warning("the labels could not be compared with earlier ones: %s", masked(str(error)))
            run.record.facts["drift"] = {"notes": [masked(str(error))]}
            return None
    run.record.facts["drift"] = verdict.facts
    run.for_report.before, run.for_report.judged = verdict.before, verdict.judged
    verdict.require_none(run.record.id, masked(run.record.folder.at("run.json")))
    return verdict.rows


def _check(run: ActiveRun) -> QualityCheck:
    job = run.job
    config, fingerprint = job.config, job.ledger.fingerprint
    return QualityCheck(job.output, run.record.id, job.model, config.guard, config.rejects.retry, fingerprint)

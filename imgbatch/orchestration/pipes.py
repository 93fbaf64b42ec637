"""Effects: Dagster Pipes: a run that Dagster has started is reported to it as one materialization with the counts.

Dagster sets two environment variables when it starts a process. The package `dagster-pipes` comes with the extra `dagster`.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagster_pipes import PipesContext

log = logging.getLogger(__name__)

VARIABLES = ("DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES")
_FACTS = ("run_id", "output", "images_per_second")


@contextmanager
def reporting() -> Iterator[None]:
    """If Dagster has started this process, report the runs within the block to it.

    What prevents a report is logged. It never changes the result of a run.
    """
    with ExitStack() as open_session:
        if all(name in os.environ for name in VARIABLES):
            _open(open_session)
        yield


def _open(stack: ExitStack) -> None:
    from imgbatch.ledger import run_record  # imports Arrow

    try:
        import dagster_pipes
    except ImportError:
        log.warning("Dagster started this process, but dagster-pipes is missing: pip install 'imgbatch[dagster]'")
        return
    try:
        context = stack.enter_context(dagster_pipes.open_dagster_pipes())
    except (OSError, ValueError, LookupError, zlib.error, dagster_pipes.DagsterPipesError) as error:
        log.warning("Dagster started this process, but its messages cannot be sent: %s", error)
        return
    stack.enter_context(run_record.on_finish(lambda facts: report(context, facts)))


def report(context: PipesContext, facts: Mapping[str, Any]) -> None:
    """Send the facts of a run that has ended: a materialization if it succeeded, otherwise its error."""
    if facts.get("status") == "succeeded":
        values = metadata(facts)
        values["rejects"] = {"raw_value": values.get("rejects", {}), "type": "json"}
        context.report_asset_materialization(metadata=values)
    else:
        retry = "run the same command again" if facts.get("retry") else "running it again does not help"
        context.log.error(f"exit code {facts.get('exit_code')}: {facts.get('error')} ({retry})")


def metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a materialization: counts, rejects by reason, and seconds.

    >>> metadata({"run_id": "r", "counts": {"listed": 3}, "rejects": {"corrupt": 1}, "this_run": {"seconds": 2.5}})
    {'run_id': 'r', 'listed': 3, 'rejects': {'corrupt': 1}, 'seconds': 2.5}
    """
    values = {name: facts.get(name) for name in _FACTS} | dict(facts.get("counts") or {})
    values["rejects"] = facts.get("rejects")
    model = facts.get("model")
    values["model"] = model.get("name") if isinstance(model, Mapping) else model
    values["seconds"] = (facts.get("this_run") or {}).get("seconds")
    return {name: value for name, value in values.items() if value is not None}

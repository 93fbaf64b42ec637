"""A Dagster asset, partitioned by day, that starts `imgbatch classify`: one materialization with the counts of the run.

    dagster dev -f definitions.py

imgbatch speaks the Pipes protocol when Dagster starts it. For that, install `imgbatch[dagster]` beside it.
"""

import os
import signal
import subprocess

import dagster as dg

COMMAND = os.environ.get("IMGBATCH", "imgbatch")  # EDIT: its path, if it has a virtual environment of its own
INPUT = os.environ.get("INPUT", "s3://images/photos/")  # EDIT
OUTPUT = os.environ.get("OUTPUT", "s3://labels/{date}/")  # EDIT
OPTIONS = ["--set", "cluster.device=auto"]  # EDIT
MAX_RETRIES = 6
RETRY_DELAY_S = float(os.environ.get("RETRY_DELAY_S", "120"))

RETRIED = {3, 7, 129, 130, 137, 143}
"""The exit codes after which the same command may succeed. All others need a person."""

NIGHTS = dg.DailyPartitionsDefinition(start_date="2026-01-01", timezone="Europe/Berlin", end_offset=1)  # EDIT


@dg.asset(partitions_def=NIGHTS, pool="imgbatch")
def labels(context: dg.AssetExecutionContext):
    """Label the images of one night."""
    date = context.partition_key
    command = [COMMAND, "classify", "--input", INPUT, "--output", OUTPUT, "--date", date, *OPTIONS]
    with dg.open_pipes_session(
        context=context,
        context_injector=dg.PipesEnvContextInjector(),
        message_reader=dg.PipesTempFileMessageReader(),
    ) as session:
        process = subprocess.Popen(command, env={**os.environ, **session.get_bootstrap_env_vars()})
        try:
            code = process.wait()
        except BaseException:  # Dagster ends this run
            process.send_signal(signal.SIGTERM)
            process.wait()  # imgbatch commits what has arrived, and ends within 28 s
            raise
    code = 128 - code if code < 0 else code  # as shells count: 137 for SIGKILL
    if code in RETRIED:
        raise dg.RetryRequested(max_retries=MAX_RETRIES, seconds_to_wait=RETRY_DELAY_S)
    if code:
        raise dg.Failure(f"imgbatch ended with exit code {code}; see its log", allow_retries=False)
    yield from session.get_results()


# At 01:30, the partition of the day that has just begun (end_offset=1).
nightly = dg.build_schedule_from_partitioned_job(
    dg.define_asset_job("classify", [labels], partitions_def=NIGHTS), hour_of_day=1, minute_of_hour=30
)

defs = dg.Definitions(assets=[labels], schedules=[nightly])

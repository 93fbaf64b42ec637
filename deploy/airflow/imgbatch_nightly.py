"""Label the new images of a store every night: plan, classify, then report.

Copy this file and `imgbatch_operator.py` into the folder of your DAGs, and change the lines marked EDIT.
"""

from __future__ import annotations

from datetime import timedelta

import pendulum
from airflow.sdk import DAG, Asset, CronTriggerTimetable, DeadlineAlert, DeadlineReference, SyncCallback
from imgbatch_operator import ImgbatchOperator, report_late

ZONE = "Europe/Berlin"  # EDIT: the time zone of the schedule and of the date in the URIs
SCHEDULE = "30 0 * * *"  # EDIT
RETRIES, RETRY_DELAY = 5, timedelta(minutes=5)  # EDIT: after 3, 7, 143 and killed jobs
DUE = timedelta(hours=6)  # EDIT: from the scheduled time until the labels must be there; None: no deadline
INPUT = "s3://images/{date}/"  # EDIT: {date} is the date of the DAG run in ZONE, as YYYY-MM-DD
OUTPUT = "s3://labels/{date}"  # EDIT
PLAN = True  # EDIT: False to start without measuring a sample, which takes up to two minutes
ARGUMENTS = ["--model", "efficientnet_lite0"]  # EDIT: further arguments of `imgbatch classify` and `imgbatch plan`
RUNTIME_ENV = None  # EDIT: if imgbatch is not installed on the nodes: {"working_dir": "s3://code/imgbatch.zip"}

LABELS = Asset(name="imgbatch_labels", uri="s3://labels/")  # EDIT: what other DAGs name in their `schedule`

with DAG(
    dag_id="imgbatch_nightly",
    schedule=CronTriggerTimetable(SCHEDULE, timezone=ZONE),
    start_date=pendulum.datetime(2026, 1, 1, tz=ZONE),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": RETRIES, "retry_delay": RETRY_DELAY},
    deadline=DUE and DeadlineAlert(DeadlineReference.DAGRUN_LOGICAL_DATE, DUE, SyncCallback(report_late)),
    tags=["imgbatch"],
):
    common = {"output_uri": OUTPUT, "timezone": ZONE, "ray_conn_id": "imgbatch_ray", "runtime_env": RUNTIME_ENV}
    arguments = ["--input", INPUT, *ARGUMENTS]
    classify = ImgbatchOperator(task_id="classify", verb="classify", arguments=arguments, outlets=[LABELS], **common)
    # Each run writes its report when it ends, also if it fails. This task writes it again; it fails if that is not possible.
    report = ImgbatchOperator(task_id="report", verb="report", **common)
    if PLAN:
        ImgbatchOperator(task_id="plan", verb="plan", arguments=arguments, **common) >> classify
    classify >> report

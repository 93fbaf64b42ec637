"""The main job in this process, without Ray: its operator is called unit by unit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import nullcontext

import pyarrow as pa
import pytest

from imgbatch.commands import classify
from imgbatch.concurrency import process
from imgbatch.engine import placement, session, units
from imgbatch.engine.dataset import Attempt
from imgbatch.inference.worker import LabelImages, Work
from imgbatch.pipeline import run


def classify_here(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """Run the job; return its exit code."""

    def label_images(work: Work, attempt: Attempt) -> Iterator[pa.Table]:
        worker = LabelImages(work, isolated=attempt.round.isolated)
        for unit in units.cut_units(attempt.work_plan, attempt.round, 1):
            yield from worker(unit)

    monkeypatch.setattr(session, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(placement, "node_ids", lambda *_: set())
    monkeypatch.setattr(placement, "wait_for_plan", lambda *_, **__: placement.Plan(False, 1, 1, 1, 0, 1, 0, 1))
    monkeypatch.setattr(run, "label_images", label_images)
    monkeypatch.setattr(process, "release_memory", lambda: None)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return classify.main([str(each) for each in argv])
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)

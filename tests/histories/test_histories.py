"""Histories of kills, faults, growing stores and second drivers: a few here, hundreds in `make test-long`."""

from __future__ import annotations

import json
import multiprocessing
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from imgbatch.ledger import claims, commit_log, ledger, row_index, versions
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.success_marker import SUCCESS, SuccessMarker
from imgbatch.storage.stores import Folder
from tests.conftest import S3Server
from tests.histories.machine import Histories, totals
from tests.histories.stores import Memory
from tests.histories.world import World


def run(machine: type[Histories], count: int, steps: int, *, start: int | None = None, shrink: bool = False) -> None:
    """Run `count` histories: always the same ones, or those of a seed."""
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    known: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    chosen = settings(
        max_examples=count, stateful_step_count=steps, phases=phases, derandomize=start is None,
        report_multiple_bugs=False, **known,
    )  # fmt: skip
    run_state_machine_as_test(machine if start is None else seed(start)(machine), settings=chosen)


def test_a_few_histories() -> None:
    run(Histories, 8, 8)


def of_a_seed(start: int) -> Counter[str]:
    """Run the histories of a seed in memory, in a separate process; return what happened in them."""
    before = totals.copy()
    run(type("InMemory", (Histories,), {}), 25, 20, start=start)
    return totals - before


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_hundreds_of_histories() -> None:
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        # Hypothesis varies what it has found within a seed: many seeds reach farther than many histories of one.
        print(dict(sum(pool.map(of_a_seed, range(16)), Counter())))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_histories_on_a_real_store(place: str, tmp_path: Path, s3: S3Server) -> None:
    class OnAStore(Histories):
        def new_world(self) -> World:
            name = uuid.uuid4().hex
            if place == "disk":
                return World(output=f"{tmp_path}/{name}")
            return World(output=f"s3://out/histories/{name}", environment=s3.environment)

    run(OnAStore, 50, 12, start=0)
    print(dict(totals))


def _written_always(
    self: SuccessMarker, run_id: str, counts: Any, limit: int | None, seal: str, rows: Any = None
) -> None:
    said = {"run_id": run_id, "counts": dict(counts), "limit": limit, "seal": seal, "rows": rows}
    self.output.put(SUCCESS, json.dumps(said).encode())


SAFEGUARDS: dict[str, tuple[Any, str, Any]] = {
    "another writer's rows are dropped": (Ledger, "_drop_written", lambda self, rows, theirs: rows),
    "a replacement is conditional": (Memory, "replace", lambda self, path, data, tag: self.put(path, data)),
    "the old row of a changed image is removed first": (Ledger, "_remove_stale", lambda self, keys: None),
    "what a dead run was rewriting is fenced": (commit_log.Log, "fence", lambda self, fingerprint: None),
    "seals": (Ledger, "seal", lambda self, run_id, carried=None: None),
    "a second driver is refused": (claims, "_require_dead", lambda *arguments: None),
    "missing numbers are filled": (Ledger, "fill_gaps", lambda self, run_id: None),
    "fingerprints are compared": (ledger, "require_same", lambda theirs, ours, where: None),
    "a label wins over another writer's reject": (Ledger, "_drop_rejects_of_labelled", lambda self, surplus: None),
    "a part is created conditionally": (Folder, "create", Folder.put),
    "_SUCCESS is removed when a run finds work": (Folder, "delete", lambda self, name, tag=None: None),
    "_SUCCESS is removed conditionally": (Memory, "delete", lambda self, path, tag=None: self.objects.pop(path, None)),
    "_SUCCESS is written conditionally": (SuccessMarker, "write", _written_always),
    "a run detects that it was taken over": (claims.Claim, "require_ours", lambda self: None),
    "transient rejects are tried again": (row_index, "_PASSING", 0),
    "run.prune removes rows": (Ledger, "prune", lambda self, unread: 0),
    "a corrected manifest reaches the rows": (Ledger, "correct", lambda self, corrections: None),
    "a changed ETag is a change": (versions, "_differ", lambda left, right, unknown: np.zeros(len(left), bool)),
}


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_the_machine_fails_without_a_safeguard(safeguard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = totals["histories"]
    monkeypatch.setattr(*SAFEGUARDS[safeguard])
    # Hypothesis puts several that it finds into a group. An error of another kind is no answer of the model's.
    with pytest.raises((AssertionError, ExceptionGroup)) as raised:
        for start in range(48):
            run(type("Broken", (Histories,), {}), 25, 10, start=start)
    assert raised.errisinstance(AssertionError) or raised.group_contains(AssertionError)
    print(f"{safeguard}: failed in history {totals['histories'] - before}")

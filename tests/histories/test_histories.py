"""Histories of kills, faults, growing stores and second drivers: a few here, hundreds in `make test-long`."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.conftest import S3Server
from tests.histories.machine import Histories, totals
from tests.histories.world import World


def run(machine: type[Histories], count: int, steps: int, *, start: int | None = None, shrink: bool = False) -> None:
    """Run that many histories: always the same ones, or those of a seed."""
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    known: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    chosen = settings(
        max_examples=count, stateful_step_count=steps, phases=phases, derandomize=start is None,
        report_multiple_bugs=False, **known,
    )  # fmt: skip
    run_state_machine_as_test(machine if start is None else seed(start)(machine), settings=chosen)


def test_a_few_histories() -> None:
    run(Histories, 8, 8)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("start", range(4))
def test_hundreds_of_histories(start: int) -> None:
    run(type("InMemory", (Histories,), {}), 100, 20, start=start)
    print(dict(totals))


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

"""Histories of kills, faults, growing stores and second drivers: a few here, hundreds in `make test-long`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.histories.machine import Histories

_ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def test_a_few_histories() -> None:
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=40, stateful_step_count=10, derandomize=True, **_ANY)
    )

"""Histories of kills, faults and second drivers, as in tests/histories, on a small scale on each store."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from tests.histories.machine import Histories, totals
from tests.histories.test_histories import run
from tests.histories.world import World


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_histories_on_each_store(server: Any) -> None:
    class OnAStore(Histories):
        def new_world(self) -> World:
            output = f"{server.scheme}://out/histories/{uuid.uuid4().hex}"
            return World(output=output, environment=server.environment)

    run(OnAStore, 12, 10, start=0)
    print(dict(totals))

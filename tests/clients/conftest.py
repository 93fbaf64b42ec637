"""The output of a real run, made in the environment of the jobs; these tests run in one of their own (`make test-clients`)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("JOBS_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
"""An interpreter that has imgbatch and what it depends on."""


@dataclass(frozen=True)
class Output:
    """What the runs wrote, and the rows that it holds."""

    place: Path
    expected: dict[str, list[dict[str, Any]]]

    def table(self, name: str) -> Path:
        """Return the folder of a table."""
        return self.place / name


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """Two runs of the main job."""
    place = tmp_path_factory.mktemp("tables")
    command = [PYTHON, "-m", "tests.clients.make_tables", str(place)]
    made = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return Output(place / "out", json.loads((place / "expected.json").read_text()))


def missing(what: str) -> None:
    """Skip a test, naming what this machine lacks; where CI runs nothing may be missing."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(
        f"{what} is missing: see make test-clients in CONTRIBUTING.md"
    )


@pytest.fixture
def client() -> Callable[[str], Any]:
    """Return a module by its name."""

    def load(name: str) -> Any:
        try:
            return import_module(name)
        except ImportError:
            missing(name)

    return load

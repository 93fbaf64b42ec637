"""Dagster Pipes: what a run sends when Dagster has started it. `make test-deploy` tests it with Dagster itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgbatch import cli
from imgbatch.config.sections import StorageConfig
from imgbatch.errors import BudgetError
from imgbatch.ledger.run_record import Record
from imgbatch.orchestration import pipes
from imgbatch.storage.stores import Folder, Stores

dagster_pipes = pytest.importorskip("dagster_pipes")

CONTEXT = {
    **dict.fromkeys(
        ("code_version_by_asset_key", "provenance_by_asset_key", "partition_key", "partition_key_range", "job_name",
         "partition_time_window")
    ),
    "asset_keys": ["labels"], "run_id": "r", "retry_number": 0, "extras": {},
}  # fmt: skip


@pytest.fixture
def started_by_dagster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Set the two variables as Dagster does; return the file of the messages."""
    messages = tmp_path / "messages"
    context, place = pipes.VARIABLES
    monkeypatch.setenv(context, dagster_pipes.encode_param({"data": CONTEXT}))
    monkeypatch.setenv(place, dagster_pipes.encode_param({"path": str(messages)}))
    monkeypatch.setattr(dagster_pipes.PipesContext, "_instance", None)  # one per process
    yield messages


def sent(messages: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = map(json.loads, messages.read_text().splitlines())
    return [(line["method"], line["params"]) for line in lines]


def run(place: Path, error: Exception | None = None) -> int:
    """Run a command that keeps a record of its run, and ends with the error."""

    def body() -> int:
        record = Record(
            Folder(Stores(StorageConfig(), {}), str(place)),
            {
                "counts": {"listed": 3, "labelled": 2},
                "rejects": {"empty": 1},
                "model": {"name": "lite0", "digest": "x"},
            },
        )
        record.start()
        with record.recording_failure():
            if error:
                raise error
            record.finish("succeeded", 0, this_run={"seconds": 1.5, "labelled": 2})
        return 0

    return cli.run(body)


def test_a_run_is_one_materialization_with_the_counts(started_by_dagster: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "out") == 0
    methods, params = zip(*sent(started_by_dagster), strict=True)
    assert methods == ("opened", "report_asset_materialization", "closed")
    values = {name: value["raw_value"] for name, value in params[1]["metadata"].items()}
    run_id = values.pop("run_id")
    assert (tmp_path / "out" / "runs" / run_id / "run.json").exists()
    assert values == {
        "output": str(tmp_path / "out"), "listed": 3, "labelled": 2, "rejects": {"empty": 1}, "seconds": 1.5,
        "model": "lite0",
    }  # fmt: skip
    assert params[1]["asset_key"] == "labels"


def test_a_failed_run_is_no_materialization(started_by_dagster: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "out", BudgetError("12 of 20 images were rejected")) == 4
    methods, params = zip(*sent(started_by_dagster), strict=True)
    assert methods == ("opened", "log", "closed")
    message = "exit code 4: 12 of 20 images were rejected (running it again does not help)"
    assert params[1] == {"message": message, "level": "ERROR"}


@pytest.mark.parametrize("variable", pipes.VARIABLES)
def test_what_dagster_wrote_wrongly_does_not_change_the_run(
    started_by_dagster: Path, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for value in ("not base64", dagster_pipes.encode_param({"path": str(tmp_path / "missing" / "file")})):
        monkeypatch.setenv(variable, value)
        assert run(tmp_path / "out") == 0
        assert "its messages cannot be sent" in capfd.readouterr().err


def test_a_missing_package_does_not_change_the_run(
    started_by_dagster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dagster_pipes", None)
    with caplog.at_level(logging.WARNING), pipes.reporting():
        pass
    assert "pip install 'imgbatch[dagster]'" in caplog.text
    assert not started_by_dagster.exists()


def test_nothing_is_sent_without_dagster(
    started_by_dagster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(pipes.VARIABLES[0])
    assert run(tmp_path / "out") == 0
    assert not started_by_dagster.exists()

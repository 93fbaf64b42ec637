"""The summary of a run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.ledger.audit import AuditResult
from imgbatch.ledger.run_record import Record
from imgbatch.pipeline.run_summary import Tally
from imgbatch.rejects import note_examples
from imgbatch.storage.stores import Folder, Stores


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A record that is written."""
    made = Record(Folder(Stores(StorageConfig()), str(tmp_path)), {})
    made.start()
    return made


def test_one_example_of_each_reason_is_kept() -> None:
    examples: dict[str, tuple[str, str]] = {}
    rejects = {
        "reason": ["truncated", "empty", "truncated"],
        "uri": ["a", "b", "c"],
        "message": ["cut", None, "cut too"],
    }
    note_examples(examples, pa.table(rejects))
    assert examples == {"truncated": ("a", "cut"), "empty": ("b", "")}


def test_a_summary_reports_the_run_and_the_tables() -> None:
    now = 0.0
    tally = Tally(lambda: now)
    tally.labelled, tally.rejected, tally.rate = 1990, 10, 123.4
    tally.reasons, tally.examples = Counter(truncated=10), {"truncated": ("b.jpg", "cut")}
    now = 20.0
    assert list(tally.lines()) == [
        "this run: 1,990 labelled, 10 rejected in 20.0 s, 100 images/s (123 after the first rows)",
        "rejected in this run: 10 truncated, such as b.jpg: cut",
    ]
    tally.audited(
        AuditResult(reasons=Counter(truncated=12, empty=1), examples={"truncated": ("a.jpg", "x"), "empty": ("e", "")})
    )
    assert list(tally.lines())[1:] == [
        "rejects/ holds 12 truncated, such as b.jpg: cut", "rejects/ holds 1 empty, such as e",
    ]  # fmt: skip
    assert tally.public() == {"labelled": 1990, "rejected": 10, "seconds": 20.0, "images_per_second": 100.0}


def test_secrets_in_examples_are_masked_and_messages_are_short() -> None:
    tally = Tally()
    tally.reasons = Counter(forbidden=1)
    tally.examples = {"forbidden": ("https://me:secret@host/a.jpg?X-Amz-Signature=0123", "m" * 1000)}
    line = list(tally.lines())[1]
    assert "https://***@host/a.jpg?X-Amz-Signature=***: mmm" in line and "secret" not in line and len(line) < 350


@pytest.mark.parametrize("labelled", [0, 5])
def test_a_failed_run_reports_what_it_did(record: Record, labelled: int, caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    with (
        pytest.raises(ZeroDivisionError),
        caplog.at_level("INFO", "imgbatch"),
        record.recording_failure(),
        tally.reported(record),
    ):
        tally.labelled = labelled
        raise ZeroDivisionError
    said = [each.getMessage() for each in caplog.records]
    assert bool(said) == bool(labelled) and (not said or said[0].startswith("this run: 5 labelled, 0 rejected"))
    written = json.loads(record.folder.read("run.json"))
    assert written["this_run"]["labelled"] == labelled and written["status"] == "failed"

"""Nodes whose cache is damaged under a run's feet: the labels are right all the same, and the next run finds it repaired."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Job
from tests.integration import faults, tables
from tests.integration.test_refusals import require_refusal


@pytest.fixture
def place() -> Iterator[Path]:
    """The folder for temporary files of a node, with a name that is short enough for Ray's sockets."""
    path = Path(tempfile.mkdtemp(prefix="ib-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def zeroed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[-third:] = bytes(third)
    path.write_bytes(content)


def test_a_cache_that_is_damaged_between_runs(
    job: Job, folder: Path, tiny_model: Path, tmp_path: Path, place: Path
) -> None:
    def run(name: str) -> dict[str, str]:
        command = ("--input", folder, "--output", tmp_path / name, "--model", tiny_model)
        ended = job("classify", *command, env={"TMPDIR": str(place)})
        assert ended.code == 0, ended.err
        (record,) = tables.runs(tmp_path / name)
        assert record["runtime"].startswith("openvino")
        return tables.labels(tmp_path / name)

    expected = run("first")
    assert len(expected) == 12 and len(set(expected.values())) > 1
    (converted,) = place.glob("imgbatch-*/openvino-*/network.bin")
    checked = list(place.glob("imgbatch-*/checked-*.json"))
    assert len(checked) == 1
    damages: list[Callable[[], object]] = [
        lambda: zeroed(converted),
        lambda: (converted.with_suffix(".xml").write_bytes(b""), checked[0].write_bytes(b"")),
    ]
    for number, damage in enumerate(damages):
        damage()
        assert run(f"damaged-{number}") == expected
        repaired = converted.stat().st_ino
        assert converted.stat().st_size > 0 and json.loads(checked[0].read_text())["features"]
    assert run("last") == expected and converted.stat().st_ino == repaired, "what was repaired is used"


# Wherever weights are filled into a network, half of them are lost: memory that does not hold what is written to it.
BROKEN = """
load_weights = module.load_weights
def badly(net, *arguments):
    notes = load_weights(net, *arguments)
    if os.path.exists(os.environ["BROKEN"]):
        weights = [each.data for each in net.parameters() if each.ndim > 1]
        for each in weights[::2]:
            each.zero_()
    return notes
module.load_weights = badly
"""


def test_a_machine_on_which_the_model_gives_wrong_answers(
    job: Job, folder: Path, tiny_model: Path, tmp_path: Path, place: Path
) -> None:
    """It is broken after the driver has looked at the model; the same command succeeds after it is repaired."""
    fault = tmp_path / "broken"
    environment = {"TMPDIR": str(place), "BROKEN": str(fault)} | faults.patched(
        tmp_path / "hook", "imgbatch.models.architectures", BROKEN
    )
    command = ("--input", folder, "--output", tmp_path / "out", "--model", tiny_model)
    ended = job("classify", *command, "--dry-run", env=environment)
    assert ended.code == 0, ended.err
    fault.touch()
    said = require_refusal(job("classify", *command, env=environment), 3)
    assert "no worker is left" in said and os.uname().nodename in said and "differ from the model's by" in said
    (record,) = tables.runs(tmp_path / "out")
    assert "left out" in record["node_faults"][os.uname().nodename] and not tables.labels(tmp_path / "out")
    fault.unlink()
    ended = job("classify", *command, env=environment)
    assert ended.code == 0, ended.err
    tables.require_single(tmp_path / "out", [path.name for path in folder.iterdir()])

"""The report of a run, as its users meet it: a shifted night shows what moved, and the command writes reports again."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

from imgbatch.ledger import owners
from tests.conftest import Job
from tests.integration import tables
from tests.unit.pictures import encode, scene

GUARD = ("--set", "guard.max_label_shift=0.1", "--set", "report.timeout_s=60")


def reports(output: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((output / "runs").glob("*/report.html"))]


def section(report: str, name: str) -> str:
    """Return a section of a report."""
    start = report.index(f'<section id="{name}"')
    return report[start : report.index("</section>", start)]


def pictures(text: str) -> int:
    return text.count('src="data:image/webp;base64,')


def test_a_shifted_night_shows_what_moved_until_it_is_accepted(
    job: Job, warm: Job, tmp_path: Path, tiny_model: Path
) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(60):
        (images / f"first-{number:02d}.jpg").write_bytes(encode(scene(seed=number), "JPEG"))
    command = ("--input", images, "--output", output, "--model", tiny_model, *GUARD)
    first = warm("classify", *command)
    assert first.code == 0 and f"report: {output}/runs/{tables.success(output)['run_id']}/report.html" in first.err
    (report,) = reports(output)
    assert "60 images labelled, 0 rejected; all counts reconcile." in report and "Most frequent labels" in report
    assert pictures(section(report, "random")) == 24 and "no run of this output has succeeded before" in report
    label_of = tables.labels(output)
    common = Counter(label_of.values()).most_common(1)[0][0]
    picture = next(name for name, label in label_of.items() if label == common)

    for number in range(60):
        shutil.copy(images / picture, images / f"second-{number:02d}.jpg")
    (images / "torn.jpg").write_bytes((images / picture).read_bytes()[:-400])
    (images / "text.jpg").write_bytes(b"<script>alert(1)</script>")
    held = warm("classify", *command)
    record = tables.runs(output)[-1]
    assert held.code == 8 and record["drift"]["held_back"] and "report: " in held.err
    report = reports(output)[-1]
    assert "<strong>held back</strong> The mix of the labels" in report
    assert f"--set guard.accept={record['run_id']}" in report
    moved = section(report, "moved")
    (card,) = [card for card in moved.split("</li>") if f">{common}</h3>" in card]
    assert pictures(card) == 3 and "second-" in card and "points)." in card
    assert "last run: " in moved and "first-" in moved
    rejects = section(report, "rejects")
    assert pictures(rejects) == 1 and "not shown: not_an_image" in rejects and "torn.jpg" in rejects
    assert "<script>alert(1)" not in report and len(report.encode()) < 1_000_000
    assert record["arrivals"]["interval_s"] >= 1 and sum(record["arrivals"]["images"]) == 62

    again = job("classify", *command)
    assert again.code == 8 and len(reports(output)) == 2, "a run without new rows writes no report"
    accept = ("--set", f"guard.accept={record['run_id']}", "--set", "guard.accepted_by=ada@example.org")
    assert job("classify", *command, *accept).code == 0 and len(reports(output)) == 2

    written = job("report", output)
    assert written.code == 0 and written.out.startswith(f"run {tables.success(output)['run_id']} (succeeded): ")
    assert "were accepted by ada@example.org" in reports(output)[-1]
    again = job("report", output, "--run", record["run_id"])
    assert again.code == 0, again.err
    last = reports(output)[-2]
    assert section(last, "moved") == section(report, "moved") and section(last, "counts") == section(report, "counts")
    assert job("verify", output).code == 0
    nobody = job("report", output, "--run", "20200101T000000Z-000000")
    assert nobody.code == 2 and "has no run 20200101T000000Z-000000" in nobody.err
    assert job("report", images).code == 2


def test_a_report_without_pictures_of_a_run_that_runs_and_of_one_that_was_lost(
    job: Job, warm: Job, tmp_path: Path, tiny_model: Path, folder: Path
) -> None:
    output = tmp_path / "out"
    command = ("--input", folder, "--output", output, "--model", tiny_model)
    assert warm("classify", *command, "--set", "report.thumbnails=false").code == 0
    (report,) = reports(output)
    assert not pictures(report) and "not shown" not in report and report.count("imgbatch explain") > 12

    path = output / "runs" / tables.success(output)["run_id"] / "run.json"
    record = json.loads(path.read_text())
    record |= {"status": "running", "exit_code": None, "owner": owners.this_process()}
    record["counts"].pop("kept")
    record.pop("drift")
    path.write_text(json.dumps(record))
    (output / "_SUCCESS").unlink()
    running = job("report", output)
    assert running.code == 0 and "(running)" in running.out
    (report,) = reports(output)
    assert re.search(r"<strong>running</strong> Of 12 listed images, this run labelled 12", report)
    assert not pictures(report), "the run had report.thumbnails=false"

    record["owner"]["pid"] = 2**22 - 1
    path.write_text(json.dumps(record))
    lost = job("report", output)
    assert lost.code == 0 and "(lost)" in lost.out and "its process was killed" in reports(output)[-1]


def test_a_report_that_is_not_wanted_or_cannot_be_written_does_not_change_the_run(
    job: Job, warm: Job, tmp_path: Path, tiny_model: Path, folder: Path
) -> None:
    command = ("--input", folder, "--model", tiny_model)
    off = warm("classify", *command, "--output", tmp_path / "off", "--set", "report.enabled=false")
    assert off.code == 0 and not reports(tmp_path / "off") and "report: " not in off.err
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "jinja2.py").write_text("raise RuntimeError('jinja2 is damaged')")
    failed = job("classify", *command, "--output", tmp_path / "out", env={"PYTHONPATH": str(tmp_path / "poison")})
    assert failed.code == 0 and "WARNING the report could not be written: jinja2 is damaged" in failed.err
    assert tables.runs(tmp_path / "out")[-1]["status"] == "succeeded" and not reports(tmp_path / "out")

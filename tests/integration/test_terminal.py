"""The output of a run: in a terminal, in a log file, and its summary."""

from __future__ import annotations

import importlib
import re
import signal
from pathlib import Path

import pytest

import imgbatch
from tests.conftest import ROOT, Job, clean_environment
from tests.integration import faults, tables
from tests.unit.pictures import encode, scene
from tests.unit.screen import InTerminal
from tests.unit.test_console import DATED, SPINNER

JOBS = ("classify", "train", "evaluate", "verify", "explain", "export", "compact", "submit", "status", "plan", "demo")


@pytest.fixture
def mixed(folder: Path) -> Path:
    """Twelve images, a text and two truncated images."""
    (folder / "text.jpg").write_text("bread, butter")
    for name in ("torn-1.jpg", "torn-2.jpg"):
        (folder / name).write_bytes((folder / "00.jpg").read_bytes()[:500])
    return folder


def steps_of(job: InTerminal) -> str:
    """Return every state of the line of the current step."""
    return "\n".join(sorted(line for line in job.screen.seen if SPINNER.match(line)))


def require_clean(job: InTerminal) -> list[str]:
    """Require that log lines and the step never mixed, and that the step was removed; return the lines."""
    for line in job.screen.seen:
        assert not (SPINNER.search(line) and (DATED.search(line) or "labelled" in line)), line
    assert not any(SPINNER.search(line) or "━" in line for line in job.screen.lines), (
        job.screen.lines,
        job.raw[-3000:],
    )
    assert "\x1b[?25l" not in job.raw
    return job.screen.lines


def test_run_in_a_terminal(mixed: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["jobs/classify.py", "--input", mixed, "--output", output, "--model", tiny_model]
    job = InTerminal(command, 80, clean_environment(), ROOT)
    assert job.read() == 0, job.raw
    lines = require_clean(job)
    steps = steps_of(job)
    for step in (
        "loading the model", "listing", "starting Ray on this machine", "starting the workers", "labelling",
        "committing the last rows", "reading the tables back",
    ):  # fmt: skip
        assert step in steps, steps
    assert "again" not in steps
    text = "".join(lines)
    assert text.rindex("15 images listed, 12 labelled, 3 rejected") > text.rindex(" INFO record: ")
    assert text.index("rejects/ holds 2 truncated, such as") < text.index("rejects/ holds 1 not_an_image, such as")


def test_ctrl_c_in_a_terminal(tiny_model: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(600):
        (images / f"{number:03d}.jpg").write_bytes(encode(scene(seed=number % 20), "JPEG"))
    command = ["jobs/classify.py", "--input", images, "--output", output, "--model", tiny_model]
    env = {**clean_environment(), **faults.slow_decoding(tmp_path / "slow", 0.05)}
    job = InTerminal([*command, "--set", "run.commit_interval_s=0.3"], 140, env, ROOT)
    assert job.read(lambda: bool(list(output.glob("labels/part-*")))) is None, job.raw
    job.type("\x03")
    assert job.read() == 128 + signal.SIGINT, job.raw
    lines = require_clean(job)
    assert lines[-1].startswith("error: stopped by signal 2; run the same command again to resume")
    (record,) = tables.runs(output)
    done = record["this_run"]
    assert done["labelled"] == len(tables.labels(output)) > 0 and done["seconds"] > 0
    assert f" INFO this run: {done['labelled']} labelled, 0 rejected in " in "\n".join(lines)
    assert "Traceback" not in "\n".join(lines)


def test_log_file_and_record_report_the_run(warm: Job, mixed: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ("classify", "--input", mixed, "--output", output, "--model", tiny_model)
    first = warm(*command, "--set", "rejects.max_share=0.5")
    assert first.code == 0, first.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", first.err + first.out)
    lines = first.err.splitlines()
    assert lines and all(DATED.match(line) for line in lines)
    shown = [line.partition(" INFO ")[2] for line in lines]
    (truncated,) = (line for line in shown if line.startswith("rejects/ holds 2 truncated, such as "))
    assert f"{mixed}/torn-" in truncated and truncated.endswith(tables.rows(output, "rejects")[1]["message"])
    assert any(line.startswith(f"rejects/ holds 1 not_an_image, such as {mixed}/text.jpg: ") for line in shown)
    (record,) = tables.runs(output)
    run = f"{output}/runs/{record['run_id']}"
    ends = [line for line in shown if not line.startswith("writing the report")]  # a step is shown if it takes a second
    assert ends[-4:] == [
        f"labels: {output}/labels", f"rejects: {output}/rejects", f"record: {run}/run.json", f"report: {run}/report.html",
    ]  # fmt: skip
    assert (record["this_run"]["labelled"], record["this_run"]["rejected"]) == (12, 3)
    assert record["this_run"]["seconds"] > 0 and record["this_run"]["images_per_second"] > 0

    (mixed / "new.jpg").write_bytes(encode(scene(seed=99), "JPEG"))
    second = warm(*command)
    assert second.code == 0 and "16 images listed, 13 labelled, 3 rejected" in second.out, second.err
    assert " INFO this run: 1 labelled, 0 rejected in " in second.err
    assert "rejects/ holds 2 truncated, such as " in second.err, "rejects of earlier runs are named as well"
    record = tables.runs(output)[-1]
    assert (record["this_run"]["labelled"], record["counts"]["labelled"]) == (1, 13)

    third = warm(*command)
    assert third.code == 0 and " INFO this run: 0 labelled, 0 rejected in " in third.err
    done = tables.runs(output)[-1]["this_run"]
    assert (done["labelled"], done["rejected"], done["images_per_second"]) == (0, 0, 0.0)


def test_quiet_run_prints_only_the_summary(warm: Job, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = warm("classify", "--input", folder, "--output", output, "--model", tiny_model, "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("12 images listed, 12 labelled") and ended.out.count("\n") == 1
    assert warm("verify", output, "--quiet").err == ""
    refused = warm("classify", "--input", tmp_path / "nothing", "--output", tmp_path / "new", "--quiet")
    assert refused.code == 2 and refused.err.startswith("error: ") and refused.err.count("\n") == 1


@pytest.mark.parametrize("name", JOBS)
def test_every_job_has_version_and_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"imgbatch.commands.{name}").main
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([flag])
        assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"imgbatch {imgbatch.__version__}\n") and "--quiet" in shown

"""The report of a run: what it samples, what it says of each kind of run, and its size."""

from __future__ import annotations

import io
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import Config
from imgbatch.pipeline.rate_series import MAX_INTERVALS, RateSeries
from imgbatch.report import pictures as picture_module
from imgbatch.report import run_figures, run_tables
from imgbatch.report.picture_process import read_result, write_result
from imgbatch.report.pictures import CRASHED, NO_TIME, pictures
from imgbatch.report.row_samples import OF_ALL, OF_CLASS, OF_LOW_SCORES, OF_REASON, RowSamples, SampledRow
from imgbatch.report.run_page import MAX_BYTES, page
from imgbatch.report.run_verdict import verdict_of
from imgbatch.report.run_view import RunView
from imgbatch.storage.stores import Stores
from tests.browser.pages import HOSTILE, SCRIPT
from tests.browser.report_pages import BEFORE, NOW, facts, held_back, label_rows, reject_rows, view
from tests.unit.pictures import encode, scene

CLASSES = [f"class {number}" for number in range(10)]


def sampled(samples: RowSamples) -> tuple[list[SampledRow], ...]:
    return (samples.of_all(), samples.of_low_scores(), *(samples.of_class(label) for label in CLASSES))


def test_samples_depend_neither_on_the_blocks_nor_on_their_order() -> None:
    rows = label_rows(CLASSES, 3_000, 5)
    whole, cut = RowSamples(), RowSamples()
    whole.take(rows)
    for start in reversed(range(0, 3_000, 100)):
        cut.take(rows.slice(start, 100))
    assert sampled(whole) == sampled(cut)
    assert sampled(RowSamples(seed=1)) != sampled(whole)
    assert len(whole.of_all()) == OF_ALL and all(len(whole.of_class(label)) == OF_CLASS for label in CLASSES)
    lowest = np.sort(rows["score"].to_numpy())[:OF_LOW_SCORES]
    assert [row.score for row in whole.of_low_scores()] == lowest.tolist()
    assert whole.of_level("label", "class 1", ["class 1"]) == whole.of_class("class 1")
    of_kind = whole.of_level("kind", "kind 1", ["class 1", "class 4"])
    assert [row.label for row in of_kind[:3]] == ["class 1", "class 4", "class 1"]
    assert all(row.levels["kind"] == "kind 2" for row in whole.of_level("kind", "kind 2", []))
    assert whole.counts.labels == Counter(rows["label"].to_pylist())


def test_a_sample_is_uniform() -> None:
    samples = RowSamples()
    for start in range(0, 40_000, 4_000):
        numbers = range(start, start + 4_000)
        samples.take(pa.table({"uri": [f"s3://b/{number}" for number in numbers], "label": ["a"] * 4_000}))
    drawn = [int(row.uri.rpartition("/")[2]) for row in samples.of_all()]
    assert min(drawn) < 15_000 and max(drawn) > 25_000 and len(set(drawn)) == OF_ALL
    assert not {row.uri for row in samples.of_class("a")} & {row.uri for row in samples.of_all()}


def test_the_number_of_samples_does_not_grow_with_labels_and_reasons() -> None:
    samples, draw = RowSamples(), np.random.default_rng(0)
    for _ in range(10):
        labels = [f"label {number}" for number in draw.integers(0, 20_000, 4_000)] + ["common"] * 100
        uris = [f"s3://b/{number}" for number in draw.integers(0, 1 << 60, len(labels))]
        scores = pa.array(draw.random(len(labels)), pa.float32())
        samples.take(pa.table({"uri": uris, "label": labels, "score": scores}))
    kept = [row for rows in samples._classes.kept.values() for row in rows]
    assert len(kept) <= 600 and samples.of_class("common")
    samples.take(reject_rows(400))
    assert {reason: len(rows) for reason, rows in samples.by_reason().items()} == dict.fromkeys(
        ("truncated", "not_an_image", "timeout", "empty"), OF_REASON
    )


def test_results_of_workers_are_divided_into_labels_and_rejects() -> None:
    labels, rejects = label_rows(CLASSES, 50, 1), reject_rows(8)
    samples = RowSamples()
    samples.take(pa.concat_tables([labels, rejects], promote_options="default"))
    assert (samples.counts.labelled, samples.counts.rejected, samples.counts.transient) == (50, 8, 2)
    assert samples.of_low_scores()[0].second and not samples.by_reason()["empty"][0].label


@pytest.mark.parametrize("seconds", [1, 100, 10_000, 1_000_000])
def test_the_series_of_arrivals_keeps_all_images_in_bounded_space(seconds: int) -> None:
    series, total = RateSeries(), 0
    for at in np.linspace(0, seconds, 5_000).tolist():
        series.note(2, at)
        total += 2
    assert sum(series.images) == total and len(series.images) <= MAX_INTERVALS
    figure = run_figures.arrivals(series.public())
    assert figure is not None and figure.table is not None
    assert sum(int(row[1].replace(",", "")) for row in figure.table.rows) == total


def test_a_run_that_was_held_back_says_what_moved_and_how_to_accept_it() -> None:
    made = view(CLASSES, 1_500, moved=0.3)
    found = verdict_of(made)
    assert (found.state, found.word) == ("bad", "held back")
    assert (
        "guard.max_label_shift=0.05" in found.text
        and "'class 0'" in found.text
        and "_SUCCESS is not written" in found.text
    )
    assert any(f"--set guard.accept={NOW}" in line for line in found.to_do)
    assert made.moved()[0].label == "class 0" and made.moved()[0].rows and made.moved()[0].now > made.moved()[0].before
    text = page(made)
    assert (
        text.index("What moved") < text.index("Least certain") < text.index("Provenance") < text.index("Next commands")
    )
    assert "imgbatch explain" in text


def test_a_run_without_a_change_is_good_and_one_with_more_rejects_is_a_warning() -> None:
    calm = verdict_of(view(CLASSES, 1_500, rejected=4))
    assert (calm.state, calm.word, calm.to_do) == ("good", "succeeded", ("Nothing needs your attention.",))
    assert "have not changed beyond noise" in calm.text
    rejects = verdict_of(view(CLASSES, 1_500, rejected=120))
    assert rejects.state == "warning" and "The proportion of rejects rose from 0.27% to 7.41%" in rejects.text


@pytest.mark.parametrize(
    ("more", "state", "words"),
    [
        ({"status": "running", "exit_code": None}, "plain", "this run labelled 30 and rejected 4; 66 have no row"),
        ({"status": "lost"}, "bad", "Its heartbeat has stopped"),
        ({"status": "interrupted", "exit_code": 143, "error": "SIGTERM"}, "warning", "It was stopped: SIGTERM"),
        ({"status": "failed", "exit_code": 3, "error": "GET https://h/a?sig=abc"}, "bad", "GET https://h/a?sig=***"),
    ],
)  # fmt: skip
def test_a_run_that_has_not_succeeded_says_so(more: dict[str, Any], state: str, words: str) -> None:
    run = facts(30, 4, 100, **more)
    run["counts"].pop("kept")
    samples = RowSamples()
    samples.take(label_rows(CLASSES, 30, 1))
    found = verdict_of(RunView(output="s3://b/o", facts=run, state=run["status"], samples=samples, now=samples.counts))
    assert found.state == state and words in found.text and found.to_do
    text = page(RunView(output="s3://b/o", facts=run, state=run["status"], samples=samples, now=samples.counts))
    assert "66 without one. The tables were not read back" in text and "since the run has not got so far" in text


def test_a_run_that_failed_the_canary_says_that_it_cannot_be_accepted() -> None:
    canary = {"host": "n1", "right": 12, "images": 30, "accuracy": 0.4, "required": 0.9, "passed": False, "wrong": []}
    run = facts(0, 0, 100, status="failed", exit_code=8, canary=[canary], drift={})
    made = RunView(output="s3://b/o", facts=run, state="failed")
    assert "12 of 30 images are right, 90 % are required" in verdict_of(made).text
    text = page(made)
    assert "cannot be accepted" in text and "12 of 30" in text and "guard.accept" not in text


def test_a_first_run_shows_its_labels_and_says_that_nothing_is_compared() -> None:
    made = view(CLASSES, 600)
    run = {**made.facts, "drift": {"notes": ["no run of this output has succeeded before"]}}
    first = replace(made, facts=run, last={}, before=None, earlier={})
    assert "Nothing was compared with earlier labels: no run of this output" in verdict_of(first).text
    text = page(first)
    assert "Most frequent labels" in text and "What moved" not in text and "there is nothing to compare with" in text


def test_another_fingerprint_is_a_warning() -> None:
    made = view(CLASSES, 600)
    last = {**made.last, "fingerprint": {**made.last["fingerprint"], "labels": "3" * 64}}
    assert "The last run had other labels." in page(replace(made, last=last))
    assert "Another model." not in page(made)


def test_names_are_escaped_and_no_secret_is_shown() -> None:
    text = held_back()
    assert SCRIPT not in text and "&lt;script&gt;" in text and "onerror=alert(1)>" not in text and "تفاح أخضر" in text
    assert "hunter2" not in text and "0123456789abcdef" not in text and "***@host" in text
    assert len(text.encode()) <= MAX_BYTES


def test_a_report_of_twenty_thousand_long_labels_is_smaller_than_a_megabyte() -> None:
    labels = [f"{number} {'تفاح' * 80}"[:300] for number in range(20_000)]
    made = view(labels, 40_000)
    big = made.pictures or {}
    noise = np.random.default_rng(0)
    made.pictures = {uri: replace(shown, webp=noise.bytes(6_000), reason="") for uri, shown in big.items()}
    text = page(made)
    assert len(text.encode()) <= MAX_BYTES
    assert "The first 300 of " in text and "data:image/webp" in text


def test_pictures_are_left_out_from_the_last_on_if_the_page_is_too_large() -> None:
    made = view(CLASSES, 1_500, moved=0.3)
    first, *_, last = dict.fromkeys(row.uri for row in made.wanted())
    noise = np.random.default_rng(0)
    made.pictures = {
        row.uri: replace(made.pictures[row.uri], webp=noise.bytes(20_000), reason="") for row in made.wanted()
    }  # type: ignore[index]
    text = page(made)
    assert len(text.encode()) <= MAX_BYTES and "not shown: the page would be too large" in text
    assert text.count("data:image/webp") > 10 and first != last


def test_without_pictures_there_is_no_placeholder() -> None:
    text = page(replace(view(CLASSES, 300), pictures=None))
    assert "data:image" not in text and "not shown" not in text and "imgbatch explain" in text


def test_the_range_of_chance_contains_the_next_sample() -> None:
    draw = np.random.default_rng(0)
    outside = 0
    for _ in range(2_000):
        before, now = draw.binomial([2_000, 800], 0.2) / [2_000, 800]
        low, high = run_figures.chance_range(before, now, 2_000, 800)
        outside += not low <= now <= high
    assert outside <= 20  # 0.3 % are expected
    low, high = run_figures.chance_range(0.2, 0.3, 2_000, 800)
    assert high < 0.3


def test_levels_open_from_coarse_to_fine_with_both_runs() -> None:
    kinds = {label: f"kind {number % 3}" for number, label in enumerate(CLASSES)}
    made = view(CLASSES, 1_500, moved=0.4, levels=[("kind", kinds)])
    (_, coarse), (_, fine) = run_tables.level_tables(made)
    assert coarse.total == 3 and fine.total == 10
    assert fine.rows[0][0] == "class 0" and coarse.rows[0][0] == "kind 0" and coarse.rows[0][-1].startswith("+")
    assert sum(int(row[1].replace(",", "")) for row in fine.rows) == 1_500


def test_a_plan_with_a_price_gives_the_cost() -> None:
    made = view(CLASSES, 300)
    plan = {"prices": [{"machine": "m7.large", "on_demand_per_hour": 1.0, "on_demand": {"low": 0.09, "high": 0.11}}]}
    made.plan = plan
    (cost,) = [figure for figure in run_tables.key_figures(made) if figure.name == "cost"]
    assert cost.value == "0.10" and cost.note == "2 nodes, m7.large, planned 0.09 to 0.11"
    assert "+7%: inside the interval" in run_tables.plan_in_words(made)


def row_of(uri: str, **more: Any) -> SampledRow:
    return SampledRow(uri=uri, **more)


def test_pictures_are_read_from_objects_tars_and_tables(tmp_path: Path) -> None:
    jpeg = encode(scene(400, 300, seed=1), "JPEG")
    (tmp_path / "good.jpg").write_bytes(jpeg)
    (tmp_path / "torn.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "text.jpg").write_bytes(b"no image")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("one.jpg", "two.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(jpeg)
            tar.addfile(member, io.BytesIO(jpeg))
    pq.write_table(pa.table({"image": [jpeg, jpeg]}), tmp_path / "t.parquet")
    tar = str(tmp_path / "a.tar")
    names = ("good.jpg", "torn.jpg", "text.jpg", "gone.jpg", "a.tar#two.jpg", "a.tar#gone.jpg", "t.parquet#1")
    rows = [row_of(str(tmp_path / name)) for name in names]
    found = pictures(Stores(Config().storage), Config(), rows, {tar}, 60)
    by_name = {uri.rpartition("/")[2]: picture for uri, picture in found.items()}
    assert {name for name in names if by_name[name].webp} == {"good.jpg", "torn.jpg", "a.tar#two.jpg", "t.parquet#1"}
    assert {name: by_name[name].reason for name in names if by_name[name].reason} == {
        "torn.jpg": "truncated", "text.jpg": "not_an_image", "gone.jpg": "vanished", "a.tar#gone.jpg": "vanished",
    }  # fmt: skip
    assert all(len(picture.webp) <= 4_000 for picture in found.values())


def test_a_member_of_a_tar_is_read_where_it_is(tmp_path: Path) -> None:
    images = [encode(scene(64, 48, seed=seed), "JPEG") for seed in range(2)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, content in enumerate(images):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        second = tar.getmembers()[1].offset
    damaged = bytearray((tmp_path / "a.tar").read_bytes())
    damaged[:second] = b"\0" * second  # only what is at the position of the second member can be read
    (tmp_path / "a.tar").write_bytes(damaged)
    row = row_of(str(tmp_path / "a.tar#1.jpg"), resume_offset=second, previous_offset=0)
    (picture,) = pictures(Stores(Config().storage), Config(), [row], {str(tmp_path / "a.tar")}, 60).values()
    assert picture.webp


def test_a_crash_costs_one_picture_and_the_time_limit_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.jpg").write_bytes(encode(scene(64, 48, seed=1), "JPEG"))
    rows = [row_of(str(tmp_path / "good.jpg")), *(row_of(str(tmp_path / f"{number}.jpg")) for number in range(5))]
    hanging = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(picture_module, "module_command", lambda module: (hanging, None))
    found = pictures(Stores(Config().storage), Config(), rows, (), 0.5)
    assert {picture.reason for picture in found.values()} == {NO_TIME}
    crashing = [sys.executable, "-c", "import os; os.abort()"]
    real, calls = picture_module.__dict__["module_command"], []

    def first_crashes(module: str) -> Any:
        from imgbatch.concurrency.process import module_command

        calls.append(module)
        return (crashing, None) if len(calls) == 1 else module_command(module)

    assert real is not first_crashes
    monkeypatch.setattr(picture_module, "module_command", first_crashes)
    monkeypatch.setattr(picture_module, "_PROCESSES", 1)
    found = pictures(Stores(Config().storage), Config(), rows[::-1], (), 60)
    reasons = [found[row.uri].reason for row in rows[::-1]]
    assert reasons == [CRASHED, *["vanished"] * 4, ""] and found[rows[0].uri].webp


def test_a_result_that_ends_early_is_no_result() -> None:
    file = io.BytesIO()
    write_result(file, (b"RIFF", "truncated"))
    content = file.getvalue()
    assert read_result(io.BytesIO(content)) == (b"RIFF", "truncated")
    for end in range(len(content)):
        assert read_result(io.BytesIO(content[:end])) is None
    assert read_result(io.BytesIO(b"\xff" * 8 + content)) is None


def test_hostile_labels_have_rows_in_the_tables_of_levels() -> None:
    made = view(HOSTILE, 400)
    ((_, table),) = run_tables.level_tables(made)
    assert any(row[0] == SCRIPT for row in table.rows) and BEFORE in page(made)

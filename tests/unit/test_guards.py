"""Guards, with the real job in a world in memory: what is held back, what is compared with what, and how it is accepted."""

from __future__ import annotations

import getpass
import json
from typing import Any

import pytest

from imgbatch.config.results import GuardConfig
from imgbatch.config.sections import Config, OutputConfig
from imgbatch.errors import ConfigError
from imgbatch.ledger.success_marker import LAST_SUCCESS, SuccessMarker, read_success
from imgbatch.quality.guards import RUNS_OF_SPREAD
from tests.histories.stores import Image
from tests.histories.world import World

SHIFT = "guard.max_label_shift=0.05"
DROP = "guard.max_score_drop=0.01"
RISE = "guard.max_reject_rise=0.01"
EVEN, MOVED = "abcd" * 30, "a" * 90 + "bcd" * 10
DAY = 120  # images
FAST = "run.commit_interval_s=1000"


def deliver(world: World, day: str, kinds: str | list[str], mood: str | None = None) -> None:
    """Add the images of a day; a kind is the label that they get, or the reason of their reject."""
    for number, kind in enumerate(kinds):
        world.images[f"{day}-{number:04d}.png"] = Image(kind, f"{day}{number}", mood)


def records(world: World) -> list[dict[str, Any]]:
    """Return run.json of all runs, in their order."""
    folder = world.folder("")
    return [json.loads(folder.read(f"runs/{name}/run.json")) for name in sorted(folder.folders("runs"))]


def drift(world: World) -> dict[str, Any]:
    """Return the `drift` of the last run."""
    facts: dict[str, Any] = records(world)[-1]["drift"]
    return facts


@pytest.fixture
def world() -> World:
    """A world with one successful run over an even mix."""
    world = World()
    deliver(world, "1", EVEN)
    assert world.run(FAST, SHIFT) == 0
    return world


def test_a_first_run_has_nothing_to_compare_with(world: World) -> None:
    facts = drift(world)
    assert "no run of this output has succeeded before" in facts["notes"] and "labels" not in facts
    assert facts["rows"] == read_success(world.folder(""))["rows"]  # type: ignore[index]


def test_the_same_mix_passes_and_a_shifted_one_is_held_back_until_it_is_accepted(world: World) -> None:
    first = records(world)[-1]["run_id"]
    deliver(world, "2", EVEN)
    assert world.run(FAST, SHIFT) == 0
    second = records(world)[-1]["run_id"]
    facts = drift(world)
    assert facts["reference"]["through"] == first and facts["reference"]["labelled"] == DAY == facts["images"]
    assert not facts["labels"]["beyond_noise"]

    deliver(world, "3", MOVED)
    assert world.run(FAST, SHIFT) == 8
    held = records(world)[-1]
    assert (held["status"], held["exit_code"], held["retry"]) == ("failed", 8, False)
    assert held["drift"]["reference"]["through"] == second
    assert held["drift"]["labels"]["changed"][0] == {"label": "a", "before": 0.25, "now": 0.75}
    assert held["drift"]["held_back"][0]["guard"] == "guard.max_label_shift"
    assert "'a' 25.0 % to 75.0 %" in world.error and f"guard.accept={held['run_id']}" in world.error
    assert read_success(world.folder("")) is None

    assert world.run(FAST, SHIFT) == 8, "the same command again"
    again = records(world)[-1]
    assert again["this_run"]["labelled"] == 0 and again["drift"]["images"] == DAY
    assert world.run(FAST, SHIFT, f"guard.accept={again['run_id']}", "guard.accepted_by=Ada") == 0
    accepted = drift(world)
    assert accepted["accepted"] == {"run_id": again["run_id"], "by": "Ada"}
    assert read_success(world.folder(""))["rows"] == {  # type: ignore[index]
        "after": second, "through": records(world)[-1]["run_id"], "new_rejects": 0, "transient": 0,
    }  # fmt: skip
    assert world.verify() == 0

    deliver(world, "4", MOVED)
    assert world.run(FAST, SHIFT, f"guard.accept={again['run_id']}") == 0, "it is compared with the accepted rows"
    deliver(world, "5", EVEN)
    assert world.run(FAST, SHIFT, f"guard.accept={again['run_id']}") == 8, "an old id accepts nothing else"


def test_the_user_accepts_by_default(world: World) -> None:
    deliver(world, "2", MOVED)
    assert world.run(FAST, SHIFT) == 8
    assert world.run(FAST, SHIFT, f"guard.accept={records(world)[-1]['run_id']}") == 0
    assert drift(world)["accepted"]["by"] == getpass.getuser()


def test_rows_that_are_newer_than_the_accepted_run_are_judged(world: World) -> None:
    deliver(world, "2", MOVED)
    assert world.run(FAST, SHIFT) == 8
    held = records(world)[-1]["run_id"]
    deliver(world, "3", EVEN)
    assert world.run(FAST, SHIFT, f"guard.accept={held}") == 8
    assert drift(world)["reference"]["through"] == held and drift(world)["images"] == DAY
    # Accepting the later run accepts both.
    assert world.run(FAST, SHIFT, f"guard.accept={records(world)[-1]['run_id']}") == 0


def test_without_a_guard_the_shift_is_only_recorded(world: World) -> None:
    deliver(world, "2", MOVED)
    assert world.run(FAST) == 0
    assert drift(world)["labels"]["beyond_noise"] and "held_back" not in drift(world)


def test_a_killed_run_is_judged_with_the_run_that_resumes_it(world: World) -> None:
    first = records(world)[-1]["run_id"]
    deliver(world, "2", MOVED)
    for _ in range(3):
        assert world.run(SHIFT, faults={("labels/part", 5): "killed before"}) is None
        assert read_success(world.folder("")) is None
    assert world.run(SHIFT) == 8
    assert drift(world)["images"] == DAY and drift(world)["reference"]["through"] == first
    assert json.loads(world.folder("").read(LAST_SUCCESS))["run_id"] == first


@pytest.mark.parametrize("fault", ["killed before", "killed in flight", "killed after"])
def test_the_reference_survives_a_kill_around_its_copy(world: World, fault: str) -> None:
    first = records(world)[-1]["run_id"]
    deliver(world, "2", MOVED)
    assert world.run(SHIFT, faults={("last_success", 1): fault}) is None
    assert world.run(SHIFT) == 8 and drift(world)["reference"]["through"] == first
    for write in world.late:
        with pytest.raises(Exception):  # noqa: B017 - a late PUT is refused
            write()
    assert world.run(SHIFT) == 8 and drift(world)["reference"]["through"] == first


def test_a_late_copy_of_a_dead_run_replaces_no_newer_one(world: World) -> None:
    folder = world.folder("")
    old = SuccessMarker(folder, {"run_id": "20200101T000000Z-000000"})
    success = SuccessMarker(folder)
    success.refresh()
    success.keep_copy()
    old.keep_copy()
    assert json.loads(folder.read(LAST_SUCCESS)) == success.content


def test_a_run_without_new_rows_is_not_judged_and_keeps_the_reference(world: World) -> None:
    rows = read_success(world.folder(""))["rows"]  # type: ignore[index]
    assert world.run(FAST, SHIFT, RISE) == 0
    assert drift(world)["notes"] == ["no row is newer than the last success"]
    assert read_success(world.folder(""))["rows"] == rows  # type: ignore[index]
    deliver(world, "2", MOVED)
    assert world.run(FAST, SHIFT) == 8 and drift(world)["reference"]["labelled"] == DAY


def test_a_few_rows_are_judged_and_join_the_reference(world: World) -> None:
    deliver(world, "2", "abcd")
    assert world.run(FAST, SHIFT) == 0
    deliver(world, "3", "g" * 99)
    assert world.run(FAST, SHIFT) == 8
    assert drift(world)["reference"]["labelled"] == DAY + 4


def test_fewer_images_than_usual(world: World) -> None:
    few = "guard.min_images=120"
    deliver(world, "2", EVEN)
    assert world.run(FAST, few) == 0
    success = read_success(world.folder(""))
    assert world.run(FAST, few) == 8 and "0 images are new, fewer than 120" in world.error
    assert read_success(world.folder("")) == success, "it is still that of a success"
    deliver(world, "3", "abc")
    assert world.run(FAST, few) == 8 and "3 images are new" in world.error
    assert world.run(FAST, few, f"guard.accept={records(world)[-1]['run_id']}") == 0
    empty = World()
    deliver(empty, "1", "abc")
    assert empty.run(FAST, "guard.min_images=4") == 8 and empty.run(FAST, "guard.min_images=3") == 0


def test_a_rise_of_rejects(world: World) -> None:
    many = "rejects.max_share=1"
    deliver(world, "2", ["a", "b", "c", "d", "not_an_image"] * 28)
    assert world.run(FAST, RISE, many) == 8
    assert "the proportion of rejects rose from 0.00% to 20.00%" in world.error
    assert world.run(FAST, RISE, many, f"guard.accept={records(world)[-1]['run_id']}") == 0
    deliver(world, "3", ["a", "b", "c", "d", "not_an_image"] * 28)
    assert world.run(FAST, RISE, many) == 0, "as many as on the day before"


def test_rejects_that_are_only_retried_do_not_count(world: World) -> None:
    many = "rejects.max_share=1"
    deliver(world, "2", EVEN)
    deliver(world, "2b", EVEN[:40], mood="forbidden")
    assert world.run(FAST, RISE, many) == 8
    assert drift(world)["rejects"]["now"] == 0.25
    assert world.run(FAST, RISE, many, f"guard.accept={records(world)[-1]['run_id']}") == 0
    assert drift(world)["rows"]["transient"] == 40
    deliver(world, "3", EVEN)
    assert world.run(FAST, RISE, many) == 0
    assert drift(world)["images"] == DAY + 40 and drift(world)["rejects"]["now"] == 0
    assert drift(world)["rejects"]["before"] == 0.25, "though their rows are of a later run now"
    deliver(world, "4", EVEN)
    deliver(world, "4b", EVEN[:40], mood="forbidden")
    assert world.run(FAST, RISE, many) == 8, "these are new"
    assert drift(world)["rejects"]["now"] == 0.25


def test_the_score_of_another_mix_of_difficulty() -> None:
    """The network of the world has one score for all images, so the rows are built here."""
    from collections import Counter

    import pyarrow as pa

    from imgbatch.quality.guards import Samples, measure, violations
    from imgbatch.quality.row_counts import RowCounts

    def rows(score: float, n: int = 500) -> RowCounts:
        counts = RowCounts()
        scores = pa.array([score + 0.1 * (number % 3 - 1) for number in range(n)], pa.float32())
        counts.add_labels(pa.table({"label": ["a", "b"] * (n // 2), "score": scores}))
        return counts

    drifted = measure(Samples(rows(0.8), rows(0.7), 0, 0))
    assert drifted.score is not None and drifted.score.size == pytest.approx(0.1, abs=1e-3)
    (violation,) = violations(drifted, 500, GuardConfig(max_score_drop=0.05))
    assert violation.text == "the mean score fell from 0.800 to 0.700"
    assert not violations(drifted, 500, GuardConfig(max_score_drop=0.2)), "less than the limit"
    assert not violations(measure(Samples(rows(0.7), rows(0.8), 0, 0)), 500, GuardConfig(max_score_drop=0.05))
    few = measure(Samples(rows(0.8, 4), rows(0.75, 4), 0, 0))
    assert not violations(few, 4, GuardConfig(max_score_drop=0.0)), "four images show nothing"
    other = measure(Samples(rows(0.8), rows(0.7), 0, 0, other_model="b@1"))
    assert other.score is None and "b@1" in other.notes[0]
    assert rows(0.8).labels == Counter(a=250, b=250)


def test_the_noise_is_that_of_the_last_runs_where_they_differ_more_than_by_chance(world: World) -> None:
    deliver(world, "2", "a" * 70 + "b" * 20 + "c" * 20 + "d" * 10)
    assert world.run(FAST) == 0
    (entry,) = drift(world)["history"]
    assert entry["level"] == "label" and entry["images"] == DAY and entry["labels"] > 0.15
    deliver(world, "3", "a" * 40 + "b" * 30 + "c" * 30 + "d" * 20)
    assert world.run(FAST, SHIFT) == 0, "beyond chance, but days differ that much"
    assert drift(world)["labels"]["noise"] == entry["labels"] >= drift(world)["labels"]["size"] > 0.05
    deliver(world, "4", "d" * 110 + "abc" * 3 + "a")
    assert world.run(FAST, SHIFT) == 8, "more than that"
    assert world.run(FAST, SHIFT, f"guard.accept={records(world)[-1]['run_id']}") == 0
    assert len(drift(world)["history"]) == 2, "an accepted run widens nothing"


def test_only_the_last_seven_runs_and_comparable_ones_widen_the_noise() -> None:
    from collections import Counter

    from imgbatch.quality.guards import Samples, measure
    from imgbatch.quality.row_counts import RowCounts

    counts = RowCounts(labels=Counter(a=500, b=500), labelled=1_000, columns={"label"})
    wide = {"level": "label", "images": 1_000, "labels": 0.4, "rejects": 0.3}
    narrow = wide | {"labels": 0.001, "rejects": -0.2}

    def noise(*history: dict[str, object]) -> float:
        drifted = measure(Samples(counts, counts, 0, 0, history=history))
        assert drifted.labels is not None
        return drifted.labels.noise

    by_chance = noise()
    assert noise(wide, *[narrow] * (RUNS_OF_SPREAD - 1)) == 0.4
    assert noise(wide, *[narrow] * RUNS_OF_SPREAD) == by_chance < 0.1
    assert noise(wide | {"images": 499}) == by_chance == noise(wide | {"level": "kind"})


def test_a_day_in_an_output_of_its_own_is_compared_with_the_day_before(world: World) -> None:
    world.output, world.images = "memory://out/2", {}
    world.input.listed = world.images
    world.input._images = world.images
    deliver(world, "2", MOVED)
    assert world.run(FAST, SHIFT) == 0, "the first run of an output"
    world.output, world.images = "memory://out/3", {}
    world.input._images = world.images
    deliver(world, "3", MOVED)
    assert world.run(FAST, SHIFT, "guard.reference=memory://out") == 8
    assert drift(world)["reference"]["output"] == "memory://out"
    assert world.run(FAST, SHIFT, "guard.reference=memory://out/2") == 0
    assert world.run(FAST, "guard.reference=memory://nowhere") == 2 and "it has no runs" in world.error


@pytest.mark.parametrize("value", ["20990101T000000Z-abcdef", "x/../y", ".."])
def test_a_run_that_does_not_exist_cannot_be_accepted(world: World, value: str) -> None:
    deliver(world, "2", MOVED)
    assert world.run(FAST, SHIFT, f"guard.accept=z{value}") == 2 and "has no run of this id" in world.error
    assert read_success(world.folder("")) is not None, "before any work"


def test_a_run_that_no_guard_held_back_cannot_be_accepted(world: World) -> None:
    deliver(world, "2", MOVED)
    assert world.run(FAST, "rejects.max_count=0") == 0
    deliver(world, "3", ["empty"])
    assert world.run(FAST, "rejects.max_count=0") == 4
    run_id = records(world)[-1]["run_id"]
    assert world.run(FAST, f"guard.accept={run_id}") == 2 and "was not held back" in world.error
    assert world.run(FAST, f"guard.accept={records(world)[0]['run_id']}") == 0, "of an earlier success: no effect"


def test_the_success_of_an_older_version_stands_for_the_whole_table(world: World) -> None:
    folder = world.folder("")
    old = read_success(folder)
    assert old is not None
    del old["rows"]
    folder.put("_SUCCESS", json.dumps(old).encode())
    deliver(world, "2", MOVED)
    assert world.run(FAST, SHIFT) == 8 and drift(world)["reference"]["labelled"] == DAY


def test_a_damaged_part_is_a_warning_without_guards_and_an_error_with_them(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from imgbatch.errors import Unreachable
    from imgbatch.quality import check

    def away(*arguments: object) -> None:
        raise Unreachable("the store is away")

    monkeypatch.setattr(check, "count_rows", away)
    deliver(world, "2", MOVED)
    assert world.run(FAST, SHIFT) == 3
    assert world.run(FAST) == 0 and "the labels could not be compared" in caplog.text


def test_a_guard_needs_its_column() -> None:
    with pytest.raises(ConfigError, match=r"guard\.max_score_drop needs the column score"):
        Config(guard=GuardConfig(max_score_drop=0.1), output=OutputConfig(columns=("label",)))
    Config(guard=GuardConfig(max_label_shift=0.1), output=OutputConfig(columns=("label",)))


def test_a_table_without_labels_is_not_compared(world: World) -> None:
    bare = World()
    for day in ("1", "2"):
        deliver(bare, day, EVEN)
        assert bare.run(FAST, "output.columns=['run_id']") == 0
    assert drift(bare)["notes"] == ["labels are not compared: labels/ has no column label"]
    assert drift(bare)["images"] == DAY


def test_labels_of_another_model_are_compared_as_far_as_they_agree() -> None:
    from collections import Counter

    from imgbatch.quality.guards import Samples, measure
    from imgbatch.quality.row_counts import RowCounts

    before = RowCounts(labels=Counter(a=100, b=100, old=300), labelled=500, columns={"label"})
    now = RowCounts(labels=Counter(a=100, b=100, new=50), labelled=250, columns={"label"})
    known = frozenset(["a", "b", "new"])
    drifted = measure(Samples(before, now, 0, 0, other_model="b@1", same_labels=False, known_labels=known))
    assert drifted.labels is not None and drifted.labels.size == 0 and drifted.shift is not None
    assert drifted.shift.labels == 2 and "20.0% of the images have another label" in drifted.notes[1]
    none = RowCounts(labels=Counter(old=1), labelled=1, columns={"label"})
    assert measure(Samples(none, now, 0, 0, other_model="b@1", same_labels=False, known_labels=known)).labels is None


def test_labels_that_hold_anything_are_shown_as_they_are(world: World) -> None:
    from imgbatch.quality.drift import Change
    from imgbatch.quality.guards import shown

    assert (
        shown(Change("<script>" + "x" * 300, 0, 1)).startswith("'<script>xxx")
        and len(shown(Change("x" * 300, 0, 1))) < 100
    )
    assert "\x1b" not in shown(Change("\x1b[31m", 0, 1))

"""Drift: false alarms are rare whatever the samples, and real shifts are found where docs/guards.md says so."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from imgbatch.quality import drift
from imgbatch.quality.drift import DIVISIONS, compare, label_shift, label_terms, mean_drop, squared_distance, widest

GUARDS = (Path(__file__).parents[2] / "docs" / "guards.md").read_text(encoding="utf-8")

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def mix(labels: int, *, skewed: bool) -> Floats:
    """Return an even mix of labels, or one in which the i-th label is i times as rare as the first."""
    weights = 1 / np.arange(1, labels + 1) if skewed else np.ones(labels)
    return np.asarray(weights / weights.sum())


def shifted(proportions: Floats, share: float) -> Floats:
    """Return the mix after a share of all images, of all other labels, has got the label of middle frequency."""
    at = len(proportions) // 2
    moved = proportions * (1 - share / (1 - proportions[at]))
    moved[at] = proportions[at] + share
    return moved


def sizes_found(share: str) -> dict[int, int]:
    """Return from how many images a shift is found, by the number of labels, as the table in guards.md has it."""
    section = GUARDS.partition("## How many images find which shift")[2]
    header, _, *rows = re.findall(r"^\|.*\|$", section.partition("A shift that is spread")[0], re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    column = cells[0].index(share)
    return {int(row[0].replace(",", "")): int(row[column].replace(",", "")) for row in cells[1:]}


def false_alarms(labels: int, n: int, *, skewed: bool, runs: int) -> int:
    """Return how often two samples of one distribution differ beyond noise."""
    generator = np.random.default_rng(labels + n + skewed)
    proportions = mix(labels, skewed=skewed)
    pairs = zip(*(generator.multinomial(n, proportions, size=runs) for _ in range(2)), strict=True)
    compared = (compare(before, now, squared_distance) for before, now in pairs)
    return sum(comparison.value > comparison.bound for comparison in compared)


def found(labels: int, n: int, share: float, *, skewed: bool, runs: int) -> int:
    """Return how often a shift is found."""
    generator = np.random.default_rng(7)
    before = mix(labels, skewed=skewed)
    samples = zip(
        generator.multinomial(n, before, size=runs),
        generator.multinomial(n, shifted(before, share), size=runs),
        strict=True,
    )
    compared = (compare(reference, now, squared_distance) for reference, now in samples)
    return sum(comparison.value > comparison.bound for comparison in compared)


@pytest.mark.parametrize(("labels", "n", "skewed"), [(2, 200, False), (10, 200, True), (81, 5_000, True)])
def test_two_samples_of_one_distribution_seldom_differ_beyond_noise(labels: int, n: int, skewed: bool) -> None:
    # 0.3 % is the rate of one comparison: 200 of them have more than 4 with a probability of 0.04 %.
    assert false_alarms(labels, n, skewed=skewed, runs=200) <= 4


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize("n", [200, 5_000, 100_000])
@pytest.mark.parametrize("labels", [2, 10, 81, 1_000])
def test_a_thousand_runs_without_drift_have_at_most_one_percent_of_false_alarms(
    labels: int, n: int, skewed: bool
) -> None:
    alarms = false_alarms(labels, n, skewed=skewed, runs=1_000)
    print(f"{labels} labels, {n} images, {'skewed' if skewed else 'even'}: {alarms} of 1,000")
    assert alarms <= 10  # expected are 3; more than 10 have a probability of 0.03 %


@pytest.mark.parametrize("labels", [2, 81])
def test_a_shift_of_five_percent_is_found_with_the_documented_number_of_images(labels: int) -> None:
    assert found(labels, sizes_found("5 %")[labels], 0.05, skewed=True, runs=40) >= 34


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize("share", ["2 %", "5 %", "10 %", "20 %"])
@pytest.mark.parametrize("labels", [2, 10, 81, 1_000])
def test_each_shift_of_the_table_is_found_with_its_number_of_images(labels: int, share: str, skewed: bool) -> None:
    proportion = float(share.removesuffix(" %")) / 100
    rate = found(labels, sizes_found(share)[labels], proportion, skewed=skewed, runs=100)
    print(f"{labels} labels, a shift of {share}, {'skewed' if skewed else 'even'}: found {rate} of 100 times")
    assert rate >= 90


def test_the_expected_distance_is_that_of_theory() -> None:
    """(K - 1)(1/n1 + 1/n2)/8 for an even mix: 0.05, a distance of 0.22, for 1,000 labels and 5,000 images."""
    generator = np.random.default_rng(0)
    before, now = generator.multinomial(5_000, mix(1_000, skewed=False), size=2)
    comparison = compare(before, now, squared_distance)
    assert comparison.expected == pytest.approx(999 * (2 / 5_000) / 8, rel=0.1)
    assert abs(comparison.value - comparison.expected) < comparison.bound - comparison.expected


def test_the_distance_is_that_of_scipy() -> None:
    from scipy.spatial.distance import jensenshannon

    before, now = np.array([5, 0, 7, 90]), np.array([1, 4, 0, 200])
    distance = jensenshannon(before, now)
    assert squared_distance(before[None], now[None])[0] == pytest.approx(distance**2)
    assert label_terms(before[None], now[None]).min() >= 0


def test_equal_samples_give_equal_bounds_in_every_process_and_order_of_labels() -> None:
    before, now = {"a": 90, "b": 10}, {"b": 30, "a": 70}
    first = label_shift([("label", before, now)])
    again = label_shift([("label", dict(reversed(before.items())), now)])
    assert first == again and first.size > 0
    assert [change.label for change in first.changes] == ["b", "a"]
    assert (first.changes[0].before, first.changes[0].now) == (0.1, 0.3)


def test_a_level_is_as_fine_as_the_number_of_images_supports() -> None:
    few = {f"apple {number}": 2 for number in range(50)}
    many = {label: 10 * number for label, number in few.items()}
    assert label_shift([("kind", {"apple": 100}, {"apple": 100}), ("label", few, few)]).level == "kind"
    assert label_shift([("kind", {"apple": 1_000}, {"apple": 1_000}), ("label", many, many)]).level == "label"
    assert label_shift([("label", few, few)]).level == "label", "there is no coarser one"


def test_twenty_thousand_labels_and_millions_of_images() -> None:
    generator = np.random.default_rng(3)
    before = generator.multinomial(2_000_000, mix(20_000, skewed=True))
    now = generator.multinomial(2_000_000, shifted(mix(20_000, skewed=True), 0.01))
    comparison = compare(before, now, squared_distance)
    assert comparison.value > comparison.bound > comparison.expected > 0


def test_more_rows_than_numpy_divides() -> None:
    before = np.array([3_000_000_000, 1_000_000_000])
    assert compare(before, before, squared_distance).value == 0
    assert compare(before, before[::-1], squared_distance).value > 0.1


@pytest.mark.parametrize(("before", "now"), [([0, 0], [0, 0]), ([3, 0], [0, 0]), ([1, 0], [0, 1])])
def test_samples_that_are_empty_or_tiny_are_never_beyond_noise(before: list[int], now: list[int]) -> None:
    comparison = compare(np.array(before), np.array(now), squared_distance)
    assert comparison.value <= comparison.bound
    assert comparison.noise >= 0, "its root is the noise of a label shift"


def test_a_drop_of_the_mean() -> None:
    values = np.array([0.25, 0.75])
    before, now = np.array([100, 900]), np.array([300, 700])
    comparison = compare(before, now, mean_drop(values))
    assert comparison.value == pytest.approx(0.1) and comparison.value > comparison.bound
    assert comparison.expected == pytest.approx(0, abs=0.005)
    rise = compare(now, before, mean_drop(values))
    assert rise.value == pytest.approx(-0.1) and rise.value < 0 < rise.bound


def test_the_noise_is_never_narrower_than_the_differences_between_earlier_runs() -> None:
    assert widest([0.02, 0.3], 0.1) == 0.3 and widest([0.02], 0.1) == 0.1 and widest([], 0.1) == 0.1
    assert widest([-0.3], 0.1) == 0.1, "a recovery"


def test_a_bound_is_reached_by_three_in_a_thousand() -> None:
    assert (DIVISIONS + 1, drift.EXTREME) == (1_000, 3)

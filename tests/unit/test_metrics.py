"""The metrics of an evaluation, compared with those of scikit-learn and scipy and with a bootstrap in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as theirs

from imgbatch.evaluation import metrics

N, CLASSES = 600, 9


@pytest.fixture
def labels() -> tuple[np.ndarray, np.ndarray]:
    """True and predicted classes of some images; the last class is never true, and the one before never predicted."""
    draw = np.random.default_rng(0)
    truth = draw.integers(0, CLASSES - 1, N)
    return truth, np.where(draw.random(N) < 0.7, truth, draw.integers(0, CLASSES, N)) % (CLASSES - 2)


def test_per_class_figures_are_those_of_scikit_learn(labels: tuple[np.ndarray, np.ndarray]) -> None:
    truth, predicted = labels
    confusion = metrics.Confusion.of(truth, predicted, CLASSES)
    assert (confusion.matrix() == theirs.confusion_matrix(truth, predicted, labels=range(CLASSES))).all()
    per_class = metrics.PerClass.of(confusion)
    precision, recall, f1, support = theirs.precision_recall_fscore_support(
        truth, predicted, labels=range(CLASSES), zero_division=np.nan
    )
    assert (per_class.support == support).all()
    for ours, expected in ((per_class.precision, precision), (per_class.recall, recall), (per_class.f1, f1)):
        assert np.allclose(ours, expected, equal_nan=True)
    assert np.isnan(per_class.precision[-1]) and np.isnan(per_class.f1[-1])
    assert per_class.macro(per_class.recall) == pytest.approx(theirs.balanced_accuracy_score(truth, predicted))


def test_mistakes_are_sorted_by_descending_count(labels: tuple[np.ndarray, np.ndarray]) -> None:
    wrong = metrics.Confusion.of(*labels, CLASSES).mistakes()
    assert (np.diff(wrong.count) <= 0).all() and (wrong.truth != wrong.predicted).all()
    assert wrong.count.sum() == np.count_nonzero(labels[0] != labels[1])


def test_intervals_are_those_of_resampled_images(labels: tuple[np.ndarray, np.ndarray]) -> None:
    draw = np.random.default_rng(1)
    right = labels[0] == labels[1]
    score = np.clip(np.where(right, 0.8, 0.5) + draw.normal(0, 0.1, N), 0, 1)
    other = right & (draw.random(N) < 0.9)
    again = [draw.integers(0, N, N) for _ in range(1000)]
    cases = [
        (metrics.proportion(right), [right[i].mean() for i in again]),
        (metrics.difference(right, other), [right[i].mean() - other[i].mean() for i in again]),
        (
            metrics.calibration(score, right).ece,
            [metrics.calibration(score[i], right[i]).ece.value for i in again[:200]],
        ),
    ]
    for estimate, by_hand in cases:
        low, high = np.quantile(by_hand, [0.025, 0.975])
        assert estimate.low == pytest.approx(low, abs=0.008) and estimate.high == pytest.approx(high, abs=0.008)
        assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize(
    ("part", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_proportions_are_those_of_newcombe_s_table(part: int, total: int, low: float, high: float) -> None:
    # Newcombe: Two-sided confidence intervals for the single proportion (1998), table I, method 3.
    estimate = metrics.proportion_of(part, total)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high) and estimate.value == part / total


@pytest.mark.parametrize("total", [1, 2, 7, 96, 5_000, 10**7])
def test_intervals_of_proportions_are_scipy_s_wilson_intervals(total: int) -> None:
    parts = np.unique([0, 1, total // 3, total - 1, total])
    intervals = metrics.wilson(parts, np.full(len(parts), total))
    for part, interval in zip(parts.tolist(), intervals, strict=True):
        assert interval == pytest.approx(tuple(binomtest(part, total).proportion_ci(method="wilson")), abs=1e-9)
    assert intervals.min() >= 0 and intervals.max() <= 1


def test_the_interval_of_a_small_set_without_a_mistake_has_a_width() -> None:
    perfect, none = metrics.proportion(np.ones(96, bool)), metrics.proportion(np.zeros(96, bool))
    assert str(perfect) == "100.00% (96.15% to 100.00%)" and str(none) == "0.00% (0.00% to 3.85%)"


def test_figures_of_classes_and_of_coverage_have_intervals_except_without_images() -> None:
    truth, predicted = np.array([0] * 10 + [1] * 10), np.array([0] * 9 + [1] + [1] * 10)
    per_class = metrics.PerClass.of(metrics.Confusion.of(truth, predicted, 3))
    assert per_class.recall_interval.round(3).tolist()[:2] == [[0.596, 0.982], [0.722, 1.0]]  # 9 and 10 of 10
    assert per_class.precision_interval.round(3).tolist()[:2] == [[0.701, 1.0], [0.623, 0.984]]  # 9 of 9, 10 of 11
    assert np.isnan(per_class.recall_interval[2]).all() and np.isnan(per_class.precision_interval[2]).all()
    covered = metrics.coverage(np.array([0.2, 0.9]), np.array([False, True]), steps=2)
    assert covered.interval[:2].round(3).tolist() == [[0.095, 0.905], [0.207, 1.0]]  # 1 of 2, 1 of 1
    assert np.isnan(covered.interval[2]).all()
    (first, second) = metrics.calibration(np.array([0.01, 0.99, 0.99]), np.array([False, True, True])).interval.round(3)
    assert first.tolist() == [0, 0.793] and second.tolist() == [0.342, 1]


def test_ece_is_near_zero_for_probabilities_and_large_for_overconfident_scores() -> None:
    draw = np.random.default_rng(2)
    score = draw.random(20_000)
    assert metrics.calibration(score, draw.random(20_000) < score).ece.value < 0.02
    boasting = metrics.calibration(np.full(1000, 0.99), draw.random(1000) < 0.6)
    assert boasting.ece.value == pytest.approx(0.39, abs=0.05)
    assert metrics.calibration(np.array([0.0, 1.0]), np.array([False, True])).ece.value == 0


def test_coverage_includes_images_whose_score_equals_the_minimum() -> None:
    score = np.array([0.0, 0.3, 0.3, 0.7, 1.0], np.float32)
    curve = metrics.coverage(score, np.array([False, False, True, True, True]))
    at = {round(float(minimum), 2): number for number, minimum in enumerate(curve.score)}
    assert curve.coverage[[at[0.0], at[0.3], at[0.31], at[0.7], at[1.0]]].tolist() == [1.0, 0.8, 0.4, 0.4, 0.2]
    assert curve.accuracy[[at[0.0], at[0.3], at[0.31]]].tolist() == [0.6, 0.75, 1.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_score_before_temperature_follows_from_all_probabilities(temperature: float) -> None:
    logits = -np.sort(-np.random.default_rng(3).normal(0, 4, (50, 80)))
    soft = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)  # noqa: E731
    before = metrics.before_temperature(soft(logits / temperature).astype(np.float32), temperature)
    assert np.allclose(before, soft(logits)[:, 0], rtol=1e-4)

"""A head on features, the temperature of its scores, and the metrics of held-out images."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imgbatch.errors import ModelError
from imgbatch.evaluation.calibration import cross_entropy, fit_temperature, softmax
from imgbatch.evaluation.scores import Metrics, Scores
from imgbatch.models import taxonomy
from imgbatch.training import artifacts, head


def clusters(n: int = 300, classes: int = 4, features: int = 12, seed: int = 0, noise: float = 1.5) -> tuple:
    """Return features around a centre a class, on scales that differ by thousands, and their classes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, features))
    truth = rng.integers(0, classes, n)
    x = (centres[truth] + rng.normal(size=(n, features)) * noise) * np.geomspace(0.01, 100, features) + 3
    return x.astype(np.float32), truth


def test_the_solution_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    x, truth = clusters()
    fitted = head.fit(x, truth, 4, l2=1e-2)
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    theirs = LogisticRegression(C=1 / (1e-2 * len(x)), max_iter=1_000, tol=1e-8).fit(z, truth)
    assert np.abs(softmax(fitted.logits(x)) - theirs.predict_proba(z)).max() < 0.01


def test_the_start_does_not_change_the_solution() -> None:
    x, truth = clusters()
    cold = head.fit(x, truth, 4, l2=1e-2)
    warm = head.fit(x, truth, 4, l2=1e-2, start=head.fit(x, truth, 4, l2=1.0))
    assert np.abs(softmax(cold.logits(x)) - softmax(warm.logits(x))).max() < 0.01


def test_the_strength_with_the_lowest_held_out_loss_is_chosen_by_heads_that_were_not_trained_on_the_images() -> None:
    x, truth = clusters(n=90, features=60, noise=2.5)
    fold = np.arange(90) % 3
    fold[:6] = -1
    best = head.choose(x, truth, fold, 4, None)
    losses = [point["held_out_loss"] for point in best.curve]
    assert best.l2 == best.curve[int(np.argmin(losses))]["l2"] and len(losses) == len(head.STRENGTHS)
    assert best.held_out.tolist() == list(range(6, 90))
    seen = head.fit(x, truth, 4, best.l2).logits(x[best.held_out])
    assert (seen.argmax(1) == truth[6:]).mean() > (best.logits.argmax(1) == truth[6:]).mean() + 0.1


def test_features_that_are_nan_are_refused() -> None:
    x, truth = clusters(n=40)
    x[3, 0] = np.nan
    with pytest.raises(ModelError, match="features of the base are infinite or NaN for 1 images"):
        head.choose(x, truth, np.arange(40) % 2, 4, None)


def test_without_held_out_images_the_default_strength_is_used() -> None:
    x, _ = clusters(n=4)
    best = head.choose(x, np.arange(4), np.full(4, -1), 4, None)
    assert len(best.held_out) == 0 and best.logits.shape == (0, 4) and best.curve == [] and best.l2 in head.STRENGTHS


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_scaled_logits_is_fitted(true_temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4_000, 5)) * 2
    truth = np.array([rng.choice(5, p=p) for p in softmax(logits)])
    assert fit_temperature(logits * true_temperature, truth) == pytest.approx(true_temperature, rel=0.1)


def test_a_few_images_that_are_all_right_do_not_give_scores_of_1() -> None:
    logits = np.array([[3.0, 0.0, 0.0]] * 8)
    scores = softmax(logits / fit_temperature(logits, np.zeros(8, np.int64)))
    assert 0.85 < scores[0, 0] < 0.99
    assert fit_temperature(np.zeros((0, 3)), np.zeros(0, np.int64)) == 1.0


def test_cross_entropy_is_that_of_torch_for_large_logits() -> None:
    logits, truth = np.array([[1000.0, 0.0], [0.0, 1.0]]), np.array([1, 1])
    theirs = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(truth))
    assert cross_entropy(logits, truth) == pytest.approx(float(theirs))


def test_metrics_of_four_images_are_those_counted_by_hand() -> None:
    labels = ["Fuji", "Gala", "Lime"]
    tree = taxonomy.read(b"label,kind\nFuji,Apple\nGala,Apple\nLime,Citrus\n", "tree.csv", labels)
    unseen = np.log(np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7]]))
    truth = np.array([0, 1, 0, 2])
    figures = artifacts.metrics_record(Metrics.of(Scores.from_logits(unseen, 1.0, truth, tree)))
    assert (figures["n"], figures["top1"], figures["top5"]) == (4, 0.5, 1.0)
    assert figures["levels"] == {"kind": 1.0, "label": 0.5}  # the third: apples have 0.6 together
    assert figures["top1_interval"] == figures["levels_interval"]["label"] == pytest.approx([0.15, 0.85], abs=1e-3)
    assert figures["loss"] == pytest.approx(-np.log([0.5, 0.35, 0.3, 0.7]).mean())
    # The bins of the scores 0.4 (two images, both wrong), 0.5 and 0.7 (an image each, right).
    assert figures["ece"] == figures["ece_before_temperature"] == pytest.approx((2 * 0.4 + 0.5 + 0.3) / 4)
    assert artifacts.metrics_record(None)["n"] == 0


def test_the_temperature_changes_scores_and_no_label() -> None:
    rng = np.random.default_rng(4)
    logits, truth = rng.normal(0, 3, (200, 7)), rng.integers(0, 7, 200)
    plain, scaled = (Scores.from_logits(logits, temperature, truth, None) for temperature in (1.0, 2.5))
    assert (plain.label == scaled.label).all() and plain.score.mean() > scaled.score.mean()
    assert scaled.score_before is not None and np.allclose(scaled.score_before, plain.score)
    metrics = Metrics.of(scaled)
    assert metrics.calibration_before is not None and metrics.top1 == Metrics.of(plain).top1
    assert metrics.calibration_before.ece == Metrics.of(plain).calibration.ece
    assert metrics.top5 is not None and metrics.top5.value == pytest.approx(
        np.mean([target in np.argsort(-row)[:5] for row, target in zip(logits, truth, strict=True)])
    )


def test_predictions_hold_those_before_and_after_the_refit() -> None:
    unseen, final = np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([[5.0, 0.0], [5.0, 0.0]])
    content = artifacts.predictions(pa.array(["u", "v"]), ["a", "b"], np.array([0, 0]), unseen, final)
    rows = pq.read_table(io.BytesIO(content)).to_pylist()
    assert [(row["uri"], row["truth"], row["label"], row["unseen_label"]) for row in rows] == [
        ("u", "a", "a", "a"), ("v", "a", "a", "b"),
    ]  # fmt: skip
    assert rows[0]["score"] == pytest.approx(1 / (1 + np.exp(-5)), abs=1e-6)

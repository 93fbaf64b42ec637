"""When a row agrees with what the model says of its image now, and when it does not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from imgbatch.verification.comparison import RowComparison, SampleResult, skip_reason, widened_tolerance

LABELS = ("cat", "dog", "cow", "hen")
COMPARISON = RowComparison(LABELS, 0.5)


def answer(*scores: float, k: int = 3, **more: Any) -> dict[str, Any]:
    """Return a row whose classes have these probabilities, in the order of LABELS."""
    best = sorted(range(len(scores)), key=lambda at: -scores[at])[:k]
    top = [{"label": LABELS[at], "label_id": at, "score": scores[at]} for at in best]
    said = {**top[0], "top_k": top, "levels": None, "answer": top[0]["label"], "answer_level": None}
    version = {"size": 3, "etag": "e", "last_modified": None, "reason": None, "stage": None, "message": None}
    return {"uri": "s3://in/x", **said, **version, **more}


NOW = answer(0.1, 0.8, 0.06, 0.04)


def test_the_same_answer_agrees() -> None:
    assert COMPARISON.difference(NOW, NOW) is None
    assert COMPARISON.difference(answer(0.105, 0.795, 0.06, 0.04), NOW) is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (answer(0.8, 0.1, 0.06, 0.04), r"label 'cat' \(0.800\) in the table, 'dog' \(0.800\) now"),
        (answer(0.1, 0.06, 0.04, 0.8), "label 'hen'"),
        (answer(0.2, 0.7, 0.06, 0.04), "label 'dog' with score 0.700 in the table, 0.800 now"),
        (answer(0.1, 0.8, 0.06, 0.04) | {"label": "cow"}, "label 'cow' with label_id 1, which is 'dog'"),
        (answer(0.1, 0.8, 0.06, 0.04) | {"answer": "cow"}, "answer 'cow', but its levels give 'dog'"),
        (answer(0.1, 0.8, 0.06, 0.04) | {"label_id": 7, "label": None}, "label None"),
        (answer(0.06, 0.8, 0.1, 0.04), "top_k has 'cow' with score 0.100 in the table, 0.060 now"),
        (answer(0.1, 0.8, 0.02, 0.08), "top_k has 'hen'"),
    ],
)
def test_other_labels_scores_and_candidates_are_differences(row: dict[str, Any], said: str) -> None:
    difference = COMPARISON.difference(row, NOW)
    assert difference is not None
    assert re.search(said, difference), difference


def test_either_class_of_a_tie_is_right() -> None:
    row, now = answer(0.402, 0.398, 0.1, 0.1), answer(0.398, 0.402, 0.1, 0.1)
    assert COMPARISON.difference(row, now) is None
    assert COMPARISON.difference(answer(0.42, 0.38, 0.1, 0.1), answer(0.38, 0.42, 0.1, 0.1)) is not None


def test_missing_columns_are_not_compared() -> None:
    kept = ("uri", "size", "etag", "last_modified")
    for name, value in (("label", "dog"), ("label_id", 1)):
        assert COMPARISON.difference({**{each: NOW[each] for each in kept}, name: value}, NOW) is None
    for name, value in (("label", "cow"), ("label_id", 0), ("label", "nobody")):
        assert COMPARISON.difference({**{each: NOW[each] for each in kept}, name: value}, NOW) is not None


def test_levels_and_answer_are_compared() -> None:
    levels = [{"level": "kind", "label": "pet", "score": 0.9}, {"level": "label", "label": "dog", "score": 0.8}]
    now = answer(0.1, 0.8, 0.06, 0.04, levels=levels)
    assert COMPARISON.difference(now, now) is None
    other = [{**levels[0], "label": "farm"}, levels[1]]
    assert "level kind: 'farm'" in str(COMPARISON.difference(now | {"levels": other}, now))
    assert "level kind" in str(COMPARISON.difference(now | {"levels": [{**levels[0], "score": 0.7}, levels[1]]}, now))
    assert "but its levels give 'dog'" in str(COMPARISON.difference(now | {"answer": "pet"}, now))
    unsure = [{**levels[0], "score": 0.7}, {**levels[1], "score": 0.4}]
    now = answer(0.35, 0.4, 0.2, 0.05, levels=unsure, answer="pet")
    assert COMPARISON.difference(now, now) is None and COMPARISON.difference(now | {"answer": None}, now) is not None


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({"etag": "f"}, "changed"), ({"size": 4}, "changed"), ({"etag": None}, None), ({}, None),
        ({"reason": "vanished", "stage": "fetch"}, "vanished"), ({"reason": "unsupported", "stage": "decode"}, "unsupported"),
        ({"reason": "truncated", "stage": "decode"}, None), ({"reason": "corrupt", "stage": "fetch"}, "corrupt"),
        ({"reason": "truncated", "stage": "decode", "size": 4}, "changed"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_compared_are_skipped(now: dict[str, Any], reason: str | None) -> None:
    assert skip_reason(NOW, NOW | now) == reason


def test_a_label_of_bytes_that_cannot_be_decoded_is_a_difference() -> None:
    assert "truncated" in str(
        COMPARISON.difference(NOW, NOW | {"reason": "truncated", "stage": "decode", "message": "m"})
    )


def test_the_tolerance_grows_with_the_effect_of_rounding_on_the_image() -> None:
    assert widened_tolerance(NOW, NOW) == pytest.approx(0.05)
    recomputed = answer(0.15, 0.75, 0.06, 0.04)
    assert widened_tolerance(NOW, recomputed) == pytest.approx(0.2)
    row = answer(0.2, 0.7, 0.06, 0.04)
    assert (
        COMPARISON.difference(row, NOW) is not None
        and COMPARISON.difference(row, recomputed, widened_tolerance(NOW, recomputed)) is None
    )


@pytest.mark.parametrize("n", [1, 10, 299, 10_000])
def test_the_bound_is_the_proportion_that_is_detected_with_95_percent_probability(n: int) -> None:
    proportion = SampleResult(compared=n).max_undetected()
    assert 1 - (1 - proportion) ** n == pytest.approx(0.95)

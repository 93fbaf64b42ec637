"""When a row agrees with what the model says of its image now, and when it does not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from imgbatch.verification.agreement import Judge, Outcome, skipped

LABELS = ("cat", "dog", "cow", "hen")
JUDGE = Judge(LABELS, 0.5)


def answer(*scores: float, k: int = 3, **more: Any) -> dict[str, Any]:
    """Return a row whose classes have these probabilities, in the order of LABELS."""
    best = sorted(range(len(scores)), key=lambda at: -scores[at])[:k]
    top = [{"label": LABELS[at], "label_id": at, "score": scores[at]} for at in best]
    said = {**top[0], "top_k": top, "levels": None, "answer": top[0]["label"], "answer_level": None}
    version = {"size": 3, "etag": "e", "last_modified": None, "reason": None, "stage": None, "message": None}
    return {"uri": "s3://in/x", **said, **version, **more}


NOW = answer(0.1, 0.8, 0.06, 0.04)


def test_the_same_answer_agrees() -> None:
    assert JUDGE.fault(NOW, NOW) is None
    assert JUDGE.fault(answer(0.105, 0.795, 0.06, 0.04), NOW) is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (answer(0.8, 0.1, 0.06, 0.04), r"label 'cat' \(0.800\) in the table, 'dog' \(0.800\) now"),
        (answer(0.1, 0.06, 0.04, 0.8), "label 'hen'"),
        (answer(0.2, 0.7, 0.06, 0.04), "label 'dog' with score 0.700 in the table, 0.800 now"),
        (answer(0.1, 0.8, 0.06, 0.04) | {"label": "cow"}, "label 'cow' with label_id 1, which is 'dog'"),
        (answer(0.1, 0.8, 0.06, 0.04) | {"answer": "cow"}, "answer 'cow', where its levels say 'dog'"),
        (answer(0.1, 0.8, 0.06, 0.04) | {"label_id": 7, "label": None}, "label None"),
        (answer(0.06, 0.8, 0.1, 0.04), "top_k has 'cow' with score 0.100 in the table, 0.060 now"),
        (answer(0.1, 0.8, 0.02, 0.08), "top_k has 'hen'"),
    ],
)
def test_other_labels_scores_and_candidates_are_faults(row: dict[str, Any], said: str) -> None:
    fault = JUDGE.fault(row, NOW)
    assert fault is not None
    assert re.search(said, fault), fault


def test_a_tie_may_fall_either_way() -> None:
    row, now = answer(0.402, 0.398, 0.1, 0.1), answer(0.398, 0.402, 0.1, 0.1)
    assert JUDGE.fault(row, now) is None
    assert JUDGE.fault(answer(0.42, 0.38, 0.1, 0.1), answer(0.38, 0.42, 0.1, 0.1)) is not None


def test_columns_that_were_not_asked_for_are_not_compared() -> None:
    kept = ("uri", "size", "etag", "last_modified")
    for name, value in (("label", "dog"), ("label_id", 1)):
        assert JUDGE.fault({**{each: NOW[each] for each in kept}, name: value}, NOW) is None
    for name, value in (("label", "cow"), ("label_id", 0), ("label", "nobody")):
        assert JUDGE.fault({**{each: NOW[each] for each in kept}, name: value}, NOW) is not None


def test_levels_and_the_answer_that_follows_from_them() -> None:
    levels = [{"level": "kind", "label": "pet", "score": 0.9}, {"level": "label", "label": "dog", "score": 0.8}]
    now = answer(0.1, 0.8, 0.06, 0.04, levels=levels)
    assert JUDGE.fault(now, now) is None
    other = [{**levels[0], "label": "farm"}, levels[1]]
    assert "level kind: 'farm'" in str(JUDGE.fault(now | {"levels": other}, now))
    assert "level kind" in str(JUDGE.fault(now | {"levels": [{**levels[0], "score": 0.7}, levels[1]]}, now))
    assert "where its levels say 'dog'" in str(JUDGE.fault(now | {"answer": "pet"}, now))
    unsure = [{**levels[0], "score": 0.7}, {**levels[1], "score": 0.4}]
    now = answer(0.35, 0.4, 0.2, 0.05, levels=unsure, answer="pet")
    assert JUDGE.fault(now, now) is None and JUDGE.fault(now | {"answer": None}, now) is not None


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({"etag": "f"}, "changed"), ({"size": 4}, "changed"), ({"etag": None}, None), ({}, None),
        ({"reason": "vanished", "stage": "fetch"}, "vanished"), ({"reason": "unsupported", "stage": "decode"}, "unsupported"),
        ({"reason": "truncated", "stage": "decode"}, None), ({"reason": "corrupt", "stage": "fetch"}, "corrupt"),
        ({"reason": "truncated", "stage": "decode", "size": 4}, "changed"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_skipped(now: dict[str, Any], reason: str | None) -> None:
    assert skipped(NOW, NOW | now) == reason


def test_a_label_of_bytes_that_nobody_can_decode_is_a_fault() -> None:
    assert "truncated" in str(JUDGE.fault(NOW, NOW | {"reason": "truncated", "stage": "decode", "message": "m"}))


def test_the_tolerance_follows_how_far_rounding_carries_on_an_image() -> None:
    assert JUDGE.widened(NOW, NOW) == pytest.approx(0.05)
    again = answer(0.15, 0.75, 0.06, 0.04)
    assert JUDGE.widened(NOW, again) == pytest.approx(0.2)
    row = answer(0.2, 0.7, 0.06, 0.04)
    assert JUDGE.fault(row, NOW) is not None and JUDGE.fault(row, again, JUDGE.widened(NOW, again)) is None


@pytest.mark.parametrize("n", [1, 10, 299, 10_000])
def test_the_bound_is_the_share_that_would_have_shown_with_95_percent(n: int) -> None:
    share = Outcome(compared=n).bound()
    assert 1 - (1 - share) ** n == pytest.approx(0.95)

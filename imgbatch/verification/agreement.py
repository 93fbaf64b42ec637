"""Values: does a row of labels/ say what the model says of its image now? Pure, on plain rows.

A probability that is computed twice from the same pixels, by the same runtime in the same number format, moves by less than
`TOLERANCE`; in 16 bits on another kind of processor it may move by more (see `Judge.widened`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.01
"""Labels have to agree where the two best classes differ by more than this, and probabilities by no more."""
_CONFIDENCE = 0.95
_ROUNDING = 1e-6
_BASE, _FACTOR = 0.05, 3.0

_UNDECODABLE = ("empty", "not_an_image", "truncated", "corrupt")
"""Reasons that a decoder gives of the bytes alone: an image that did not change had them when it got its label."""

Row = Mapping[str, Any]


def changed(row: Row, now: Row) -> bool:
    """Return whether the image that was read now is another version than the one that the row is about."""
    for name in ("size", "etag"):
        if row[name] is not None and now[name] is not None and row[name] != now[name]:
            return True
    times = row["last_modified"], now["last_modified"]
    tagged = row["etag"] is not None or now["etag"] is not None
    return not tagged and None not in times and times[0] != times[1]


def skipped(row: Row, now: Row) -> str | None:
    """Return why a row cannot be compared; None: it can."""
    if now["reason"] is not None and not (now["stage"] == "decode" and now["reason"] in _UNDECODABLE):
        return str(now["reason"])
    return "changed" if changed(row, now) else None


@dataclass(frozen=True, slots=True)
class Judge:
    """Compares rows with what the model says now."""

    labels: Sequence[str]
    """The model's, in the order of its logits."""
    min_score: float
    """`answer.min_score` of the output."""

    def fault(self, row: Row, now: Row, tolerance: float = TOLERANCE) -> str | None:
        """Return in what a row differs from the answer of now, with both values; None: it does not.

        Rows may lack columns (`output.columns`), which are then not compared.
        """
        if now["reason"] is not None:
            return f"has a label, but is {now['reason']}: {now['message']}"
        return (
            self._label_fault(row, now, tolerance)
            or self._top_fault(row, now, tolerance)
            or self._level_fault(row, now, tolerance)
            or self._answer_fault(row)
        )

    @staticmethod
    def widened(now: Row, again: Row) -> float:
        """Return the tolerance for an image whose probabilities were computed in two number formats.

        By how much they moved between the two tells how far rounding carries on this very image: by 0.01 to 0.3 between
        bfloat16 and float32 (EfficientNet-Lite0). With this rule, rows that OpenVINO had made in bfloat16 were held against
        float32 and torch's bfloat16: of 140 crops of photos none was called wrong, and 14 swapped labels were not seen.
        """
        if now["reason"] is not None or again["reason"] is not None:
            return TOLERANCE
        one, other = _probabilities(now), _probabilities(again)
        floors = {True: _floor(now), False: _floor(again)}
        moved = [
            abs(one.get(each, floors[True]) - other.get(each, floors[False])) for each in one.keys() | other.keys()
        ]
        return _BASE + _FACTOR * max(moved)

    def _label_fault(self, row: Row, now: Row, tolerance: float) -> str | None:
        label, number, score = row.get("label"), row.get("label_id"), row.get("score")
        if number is None and label is not None and label in self.labels:
            number = self.labels.index(label)
        name = self._name(number) if number is not None else label
        best = f"{now['label']!r} ({now['score']:.3f}) now"
        if label is not None and label != name:
            return f"label {label!r} with label_id {number}, which is {name!r}; {best}"
        chances = _probabilities(now)
        chance = chances.get(number, _floor(now)) if number is not None else None
        if (chance is not None and now["score"] - chance > tolerance) or (number is None and label is not None):
            shown = f" ({score:.3f})" if score is not None else ""
            return f"label {name!r}{shown} in the table, {best}"
        if score is not None:
            expected = now["score"] if chance is None else chance
            unlisted = number is not None and number not in chances
            if score - expected > tolerance or (not unlisted and expected - score > tolerance):
                return f"label {name!r} with score {score:.3f} in the table, {expected:.3f} now"
        return None

    def _top_fault(self, row: Row, now: Row, tolerance: float) -> str | None:
        chances, floor = _probabilities(now), _floor(now)
        for each in row.get("top_k") or ():
            number, score = each["label_id"], each["score"]
            if each["label"] != self._name(number):
                return f"top_k has {each['label']!r} with label_id {number}, which is {self._name(number)!r}"
            if score - chances.get(number, floor) > tolerance or chances.get(number, 0.0) - score > tolerance:
                there = f"{chances[number]:.3f}" if number in chances else f"at most {floor:.3f}"
                return f"top_k has {each['label']!r} with score {score:.3f} in the table, {there} now"
        return None

    def _level_fault(self, row: Row, now: Row, tolerance: float) -> str | None:
        for old, new in zip(row.get("levels") or (), now["levels"] or (), strict=False):
            if abs(old["score"] - new["score"]) > tolerance:
                ours, theirs = (f"{each['label']!r} ({each['score']:.3f})" for each in (old, new))
                return f"level {old['level']}: {ours} in the table, {theirs} now"
            if old["label"] != new["label"] and new["score"] > 0.5 + tolerance:  # no other node can be as probable
                return f"level {old['level']}: {old['label']!r} in the table, {new['label']!r} ({new['score']:.3f}) now"
        return None

    def _answer_fault(self, row: Row) -> str | None:
        """Hold the answer against the levels of its own row, which are compared for themselves."""
        if "answer" not in row or not {"label", "levels"} <= row.keys():
            return None
        levels = row["levels"] or [{"label": row["label"], "score": 1.0}]
        if any(abs(each["score"] - self.min_score) < _ROUNDING for each in levels):
            return None
        sure = [each["label"] for each in levels if each["score"] >= self.min_score]
        expected = sure[-1] if sure else None
        return None if row["answer"] == expected else f"answer {row['answer']!r}, where its levels say {expected!r}"

    def _name(self, number: int) -> str | None:
        return self.labels[number] if 0 <= number < len(self.labels) else None


def _probabilities(now: Row) -> dict[int, float]:
    return {each["label_id"]: each["score"] for each in now["top_k"]}


def _floor(now: Row) -> float:
    """Return what a class that is not among the best can have at most."""
    return float(min(each["score"] for each in now["top_k"]))


@dataclass
class Outcome:
    """What a sample came to."""

    drawn: int = 0
    compared: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """By reason: changed, vanished, …"""
    faults: list[tuple[Row, str]] = field(default_factory=list)

    def bound(self) -> float:
        """Return the share of wrong rows of which at least one would have been among the compared ones, with 95 % probability.

        From (1 - share)^n = 0.05; about 3/n.

        >>> f"{Outcome(compared=300).bound():.2%}"
        '0.99%'
        """
        return float(1 - (1 - _CONFIDENCE) ** (1 / self.compared))

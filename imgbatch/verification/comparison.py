"""Values: comparison of rows of labels/ with the current results of the model. Pure functions on plain rows.

A probability that is computed twice from the same pixels, by the same runtime in the same number format, moves by less than
`TOLERANCE`; in 16 bits on another kind of processor it may move by more (see `widened_tolerance`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.01
"""Labels have to agree where the two best classes differ by more than this, and probabilities may differ by this."""
_CONFIDENCE = 0.95
_ROUNDING = 1e-6
_MIN_WIDENED, _WIDENING = 0.05, 3.0

_UNDECODABLE = ("empty", "not_an_image", "truncated", "corrupt")
"""Reasons that follow from the bytes alone: an unchanged image cannot have one of them and a label."""

Row = Mapping[str, Any]


def is_changed(row: Row, current: Row) -> bool:
    """Return whether the image has another version now than in the row."""
    for name in ("size", "etag"):
        if row[name] is not None and current[name] is not None and row[name] != current[name]:
            return True
    times = row["last_modified"], current["last_modified"]
    has_etag = row["etag"] is not None or current["etag"] is not None
    return not has_etag and None not in times and times[0] != times[1]


def skip_reason(row: Row, current: Row) -> str | None:
    """Return why a row cannot be compared; None if it can."""
    if current["reason"] is not None and not (current["stage"] == "decode" and current["reason"] in _UNDECODABLE):
        return str(current["reason"])
    return "changed" if is_changed(row, current) else None


def widened_tolerance(current: Row, recomputed: Row) -> float:
    """Return the tolerance for an image whose probabilities were computed in two number formats.

    The difference between the two shows how much rounding matters for this image: 0.01 to 0.3 between bfloat16 and float32
    (EfficientNet-Lite0). Measured with rows that OpenVINO had computed in bfloat16, against float32 and torch's bfloat16: of
    140 crops of photos none was reported as wrong, and 14 swapped labels were not detected.
    """
    if current["reason"] is not None or recomputed["reason"] is not None:
        return TOLERANCE
    current_probabilities, recomputed_probabilities = _probabilities(current), _probabilities(recomputed)
    current_max, recomputed_max = _max_unlisted(current), _max_unlisted(recomputed)
    differences = [
        abs(current_probabilities.get(label_id, current_max) - recomputed_probabilities.get(label_id, recomputed_max))
        for label_id in current_probabilities.keys() | recomputed_probabilities.keys()
    ]
    return _MIN_WIDENED + _WIDENING * max(differences)


@dataclass(frozen=True, slots=True)
class RowComparison:
    """Compares rows of labels/ with the current results of the model. Columns that a row lacks are ignored."""

    labels: Sequence[str]
    """The model's, in the order of its logits."""
    min_score: float
    """`answer.min_score` of the output."""

    def difference(self, row: Row, current: Row, tolerance: float = TOLERANCE) -> str | None:
        """Return how a row differs from the model's result, with both values; None if it does not."""
        if current["reason"] is not None:
            return f"has a label, but is {current['reason']}: {current['message']}"
        return (
            self._label_difference(row, current, tolerance)
            or self._top_k_difference(row, current, tolerance)
            or self._level_difference(row, current, tolerance)
            or self._answer_difference(row)
        )

    def _label_difference(self, row: Row, current: Row, tolerance: float) -> str | None:
        label, label_id, score = row.get("label"), row.get("label_id"), row.get("score")
        if label_id is None and label is not None and label in self.labels:
            label_id = self.labels.index(label)
        name = self._name(label_id) if label_id is not None else label
        best = f"{current['label']!r} ({current['score']:.3f}) now"
        if label is not None and label != name:
            return f"label {label!r} with label_id {label_id}, which is {name!r}; {best}"
        probabilities = _probabilities(current)
        probability = probabilities.get(label_id, _max_unlisted(current)) if label_id is not None else None
        is_worse = probability is not None and current["score"] - probability > tolerance
        if is_worse or (label_id is None and label is not None):
            shown = f" ({score:.3f})" if score is not None else ""
            return f"label {name!r}{shown} in the table, {best}"
        if score is not None:
            expected = current["score"] if probability is None else probability
            unlisted = label_id is not None and label_id not in probabilities
            if score - expected > tolerance or (not unlisted and expected - score > tolerance):
                return f"label {name!r} with score {score:.3f} in the table, {expected:.3f} now"
        return None

    def _top_k_difference(self, row: Row, current: Row, tolerance: float) -> str | None:
        probabilities, maximum = _probabilities(current), _max_unlisted(current)
        for entry in row.get("top_k") or ():
            label_id, score = entry["label_id"], entry["score"]
            if entry["label"] != self._name(label_id):
                return f"top_k has {entry['label']!r} with label_id {label_id}, which is {self._name(label_id)!r}"
            too_high = score - probabilities.get(label_id, maximum) > tolerance
            if too_high or probabilities.get(label_id, 0.0) - score > tolerance:
                shown = f"{probabilities[label_id]:.3f}" if label_id in probabilities else f"at most {maximum:.3f}"
                return f"top_k has {entry['label']!r} with score {score:.3f} in the table, {shown} now"
        return None

    def _level_difference(self, row: Row, current: Row, tolerance: float) -> str | None:
        for old, new in zip(row.get("levels") or (), current["levels"] or (), strict=False):
            if abs(old["score"] - new["score"]) > tolerance:
                old_text, new_text = (f"{level['label']!r} ({level['score']:.3f})" for level in (old, new))
                return f"level {old['level']}: {old_text} in the table, {new_text} now"
            if old["label"] != new["label"] and new["score"] > 0.5 + tolerance:  # no other node can be as probable
                return f"level {old['level']}: {old['label']!r} in the table, {new['label']!r} ({new['score']:.3f}) now"
        return None

    def _answer_difference(self, row: Row) -> str | None:
        """Compare the answer with the levels of its own row, which are compared with those of the model separately."""
        if "answer" not in row or not {"label", "levels"} <= row.keys():
            return None
        levels = row["levels"] or [{"label": row["label"], "score": 1.0}]
        if any(abs(level["score"] - self.min_score) < _ROUNDING for level in levels):
            return None
        reaching = [level["label"] for level in levels if level["score"] >= self.min_score]
        expected = reaching[-1] if reaching else None
        return None if row["answer"] == expected else f"answer {row['answer']!r}, but its levels give {expected!r}"

    def _name(self, label_id: int) -> str | None:
        return self.labels[label_id] if 0 <= label_id < len(self.labels) else None


def _probabilities(current: Row) -> dict[int, float]:
    return {entry["label_id"]: entry["score"] for entry in current["top_k"]}


def _max_unlisted(current: Row) -> float:
    """Return the maximum probability of a class that is not in `top_k`."""
    return float(min(entry["score"] for entry in current["top_k"]))


@dataclass
class SampleResult:
    """The result of comparing a sample."""

    drawn: int = 0
    compared: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of rows by reason: changed, vanished, …"""
    differences: list[tuple[Row, str]] = field(default_factory=list)

    def max_undetected(self) -> float:
        """Return the proportion of wrong rows above which one of them would be in the sample with 95 % probability.

        From (1 - proportion)^n = 0.05; about 3/n.

        >>> f"{SampleResult(compared=300).max_undetected():.2%}"
        '0.99%'
        """
        return float(1 - (1 - _CONFIDENCE) ** (1 / self.compared))

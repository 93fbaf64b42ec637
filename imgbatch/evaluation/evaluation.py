"""Effects: the figures of an evaluation as `metrics.json` has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.evaluation import metrics
from imgbatch.evaluation.metrics import Calibration, Confusion, Coverage, Estimate, Intervals, PerClass
from imgbatch.evaluation.predictions import TOP, Scored
from imgbatch.evaluation.training_images import UNSEEN, Seen

_MISTAKES = 1_000


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good the labels of n images are."""

    scored: Scored
    top1: Estimate
    top5: Estimate | None
    """None where rows name fewer than five of more classes."""
    levels: dict[str, Estimate]
    """Coarse to fine; empty without a taxonomy."""
    confusion: Confusion
    per_class: PerClass
    calibration: Calibration
    before: Calibration | None
    """As the scores were before temperature scaling; None where there was none, or rows do not hold all probabilities."""
    coverage: Coverage
    seen: Seen | None
    """How many of the images the model has seen in training; None: not known."""
    unseen: Estimate | None
    """Top-1 of the images that it has not seen, and `unseen_images` of them; None unless it has seen some and not others."""
    unseen_images: int

    @classmethod
    def of(cls, scored: Scored) -> Evaluation:
        """Work out all figures."""
        right, classes = scored.right, len(scored.model.labels)
        confusion = Confusion.of(scored.truth, scored.label, classes)
        before = scored.before
        known = before is not None and not np.isnan(before).any()
        levels = {} if (scored.nodes < 0).any() else {
            level.name: metrics.share(scored.right_at(depth)) for depth, level in enumerate(scored.levels)
        }  # fmt: skip
        return cls(
            scored=scored,
            top1=metrics.share(right),
            top5=metrics.share(scored.in_top) if scored.most >= min(TOP, classes) else None,
            levels=levels,
            confusion=confusion,
            per_class=PerClass.of(confusion),
            calibration=metrics.calibration(scored.score, right),
            before=metrics.calibration(before, right) if known and before is not None else None,
            coverage=metrics.coverage(scored.score, right),
            **_seen(scored),
        )

    def answers(self) -> list[dict[str, Any]]:
        """Return for each level how many answers are of it, and how many of them are right; no level: no answer."""
        scored, n = self.scored, len(self.scored.label)
        if not self.levels:
            return []
        found = []
        for depth in (*range(len(scored.levels)), -1):
            of_it = scored.answer_level == depth
            right = metrics.share(scored.right_at(depth)[of_it]) if depth >= 0 and of_it.any() else None
            name = scored.levels[depth].name if depth >= 0 else None
            of_level = {"level": name, "share": np.count_nonzero(of_it) / n, "accuracy": right and right.value}
            found.append(of_level | {"accuracy_interval_95": right and [right.low, right.high]})
        return found

    def public(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        labels, model, per_class = self.scored.model.labels, self.scored.model, self.per_class
        mistakes = self.confusion.mistakes()
        estimates = {"top1": self.top1, "top5": self.top5, "ece": self.calibration.ece}
        interval = {name: [each.low, each.high] for name, each in estimates.items() if each is not None}
        figures = {"precision": per_class.precision, "recall": per_class.recall, "f1": per_class.f1}
        concerned = np.flatnonzero(per_class.support + per_class.predicted)
        return {
            "n": len(self.scored.label),
            "top1": self.top1.value,
            "top5": self.top5 and self.top5.value,
            "levels": {name: each.value for name, each in self.levels.items()},
            "ece": self.calibration.ece.value,
            "ece_before_temperature": self.before and self.before.ece.value,
            "temperature": self.scored.temperature,
            "interval_95": {**interval, "levels": {name: [each.low, each.high] for name, each in self.levels.items()}},
            "macro": {name: per_class.macro(figure) for name, figure in figures.items()},
            "model": {"name": model.name, "digest": model.digest},
            "seen": self._seen_publicly(),
            "answers": self.answers(),
            "calibration": _bins(self.calibration),
            "calibration_before_temperature": self.before and _bins(self.before),
            "coverage": _records(
                score=self.coverage.score,
                coverage=self.coverage.coverage,
                accuracy=self.coverage.accuracy,
                accuracy_interval_95=_pairs(self.coverage.interval),
            ),
            "per_class": _records(
                label=np.array(labels, object)[concerned],
                **{name: figure[concerned] for name, figure in figures.items()},
                precision_interval_95=_pairs(per_class.precision_interval[concerned]),
                recall_interval_95=_pairs(per_class.recall_interval[concerned]),
                support=per_class.support[concerned],
                predicted=per_class.predicted[concerned],
            ),
            "confusion": _records(
                truth=np.array(labels, object)[mistakes.truth[:_MISTAKES]],
                label=np.array(labels, object)[mistakes.predicted[:_MISTAKES]],
                images=mistakes.count[:_MISTAKES],
            ),
        }

    def _seen_publicly(self) -> dict[str, Any] | None:
        if self.seen is None:
            return None
        others = self.unseen and {
            "n": self.unseen_images, "top1": self.unseen.value, "interval_95": [self.unseen.low, self.unseen.high],
        }  # fmt: skip
        return {**self.seen.public(), "unseen": others}


def _seen(scored: Scored) -> dict[str, Any]:
    """Return the fields of an Evaluation that say what the model has seen of the images."""
    known = scored.training_images
    seen = Seen.of(scored.seen, known) if known is not None else None
    others = scored.seen == UNSEEN
    both = seen is not None and others.any() and (scored.seen > UNSEEN).any()
    return {
        "seen": seen,
        "unseen": metrics.share(scored.right[others]) if both else None,
        "unseen_images": int(np.count_nonzero(others)) if both else 0,
    }


def compared(ours: Evaluation, other: Evaluation) -> dict[str, Any]:
    """Return by how much a second model is better or worse on the same images, with the interval of the difference."""
    first, second = ours.scored.right, other.scored.right

    def plain(found: Estimate) -> dict[str, Any]:
        return {"difference": found.value, "interval_95": [found.low, found.high]}

    levels = {
        name: plain(metrics.difference(ours.scored.right_at(depth), other.scored.right_at(depth)))
        for depth, name in enumerate(ours.levels)
        if list(ours.levels) == list(other.levels)
    }
    return {
        "top1": plain(metrics.difference(first, second)),
        "levels": levels,
        "only_first_right": int(np.count_nonzero(first & ~second)),
        "only_second_right": int(np.count_nonzero(second & ~first)),
    }


def _bins(found: Calibration) -> list[dict[str, Any]]:
    return _records(
        low=found.low, high=found.high, images=found.count, score=found.score, accuracy=found.accuracy,
        accuracy_interval_95=_pairs(found.interval),
    )  # fmt: skip


def _pairs(intervals: Intervals) -> npt.NDArray[np.object_]:
    """Return intervals as a column of pairs, None where there is none."""
    found = np.empty(len(intervals), object)
    found[:] = [None if np.isnan(pair).any() else pair.tolist() for pair in intervals]
    return found


def _records(**columns: Any) -> list[dict[str, Any]]:
    """Return a record for each row of columns; what is not a number is null, since JSON has no NaN."""
    plain = {name: [_plain(value) for value in column.tolist()] for name, column in columns.items()}
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value

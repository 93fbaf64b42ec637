"""Effects: an evaluation of a model's labels, and its figures in the form of `metrics.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.evaluation.metrics import (
    Calibration,
    Confusion,
    Coverage,
    Estimate,
    Intervals,
    PerClass,
    difference,
    proportion,
)
from imgbatch.evaluation.predictions import LabelReader
from imgbatch.evaluation.scores import Metrics, Scores
from imgbatch.evaluation.training_images import UNSEEN, Seen
from imgbatch.models.model import Model

_MISTAKES = 1_000


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a model's labels of n images are, and how many of the images it has seen in training."""

    model: Model
    temperature: float | None
    """The temperature that divides its logits; None: unknown."""
    scores: Scores
    metrics: Metrics
    answer_level: npt.NDArray[np.int8]
    """The depth of each image's answer in the taxonomy; -1 without an answer."""
    seen: Seen | None
    """How many of the images the model has seen in training; None: not known."""
    unseen: Estimate | None
    """Top-1 of the images that it has not seen, and `unseen_images` of them; None unless it has seen some and not others."""
    unseen_images: int

    @classmethod
    def of(cls, reader: LabelReader) -> Evaluation:
        """Compute all figures from label tables that were read."""
        scores, images = reader.scores, reader.training_images
        seen = Seen.of(reader.seen, images) if images is not None else None
        unseen = reader.seen == UNSEEN
        is_mixed = seen is not None and unseen.any() and (reader.seen > UNSEEN).any()
        return cls(
            model=reader.model,
            temperature=reader.temperature,
            scores=scores,
            metrics=Metrics.of(scores),
            answer_level=reader.answer_level,
            seen=seen,
            unseen=proportion(scores.right[unseen]) if is_mixed else None,
            unseen_images=int(np.count_nonzero(unseen)) if is_mixed else 0,
        )

    def answers(self) -> list[dict[str, Any]]:
        """Return for each level the proportion of answers at it, and how many of them are right; no level: no answer."""
        scores, records = self.scores, []
        if not self.metrics.levels:
            return []
        for depth in (*range(len(scores.levels)), -1):
            at_level = self.answer_level == depth
            right = proportion(scores.right_at(depth)[at_level]) if depth >= 0 and at_level.any() else None
            records.append({
                "level": scores.levels[depth].name if depth >= 0 else None,
                "share": np.count_nonzero(at_level) / self.metrics.n,
                "accuracy": right and right.value,
                "accuracy_interval_95": right and [right.low, right.high],
            })  # fmt: skip
        return records

    def public(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        metrics = self.metrics
        estimates = {"top1": metrics.top1, "top5": metrics.top5, "ece": metrics.calibration.ece}
        interval: dict[str, Any] = {
            name: _interval(estimate) for name, estimate in estimates.items() if estimate is not None
        }
        interval["levels"] = {name: _interval(estimate) for name, estimate in metrics.levels.items()}
        per_class, before = metrics.per_class, metrics.calibration_before
        figures = {"precision": per_class.precision, "recall": per_class.recall, "f1": per_class.f1}
        return {
            "n": metrics.n,
            "top1": metrics.top1.value,
            "top5": metrics.top5 and metrics.top5.value,
            "levels": {name: estimate.value for name, estimate in metrics.levels.items()},
            "ece": metrics.calibration.ece.value,
            "ece_before_temperature": before and before.ece.value,
            "temperature": self.temperature,
            "interval_95": interval,
            "macro": {name: per_class.macro(figure) for name, figure in figures.items()},
            "model": {"name": self.model.name, "digest": self.model.digest},
            "seen": self._seen_publicly(),
            "answers": self.answers(),
            "calibration": _bins(metrics.calibration),
            "calibration_before_temperature": before and _bins(before),
            "coverage": _coverage(metrics.coverage),
            "per_class": _classes(self.model.labels, per_class),
            "confusion": _mistakes(self.model.labels, metrics.confusion),
        }

    def _seen_publicly(self) -> dict[str, Any] | None:
        if self.seen is None:
            return None
        unseen = self.unseen and {
            "n": self.unseen_images, "top1": self.unseen.value, "interval_95": _interval(self.unseen),
        }  # fmt: skip
        return {**self.seen.public(), "unseen": unseen}


def compared(ours: Evaluation, other: Evaluation) -> dict[str, Any]:
    """Return the difference between two models on the same images, with its interval."""
    first, second = ours.scores.right, other.scores.right

    def plain(estimate: Estimate) -> dict[str, Any]:
        return {"difference": estimate.value, "interval_95": _interval(estimate)}

    levels = {
        name: plain(difference(ours.scores.right_at(depth), other.scores.right_at(depth)))
        for depth, name in enumerate(ours.metrics.levels)
        if list(ours.metrics.levels) == list(other.metrics.levels)
    }
    return {
        "top1": plain(difference(first, second)),
        "levels": levels,
        "only_first_right": int(np.count_nonzero(first & ~second)),
        "only_second_right": int(np.count_nonzero(second & ~first)),
    }


def _interval(estimate: Estimate) -> list[float]:
    return [estimate.low, estimate.high]


def _bins(bins: Calibration) -> list[dict[str, Any]]:
    return _records(
        low=bins.low, high=bins.high, images=bins.count, score=bins.score, accuracy=bins.accuracy,
        accuracy_interval_95=_pairs(bins.interval),
    )  # fmt: skip


def _coverage(curve: Coverage) -> list[dict[str, Any]]:
    return _records(
        score=curve.score, coverage=curve.coverage, accuracy=curve.accuracy, accuracy_interval_95=_pairs(curve.interval)
    )


def _classes(labels: Sequence[str], per_class: PerClass) -> list[dict[str, Any]]:
    """Return the figures of the classes that an image is of, or was predicted as."""
    used = np.flatnonzero(per_class.support + per_class.predicted)
    return _records(
        label=np.array(labels, object)[used],
        precision=per_class.precision[used],
        recall=per_class.recall[used],
        f1=per_class.f1[used],
        precision_interval_95=_pairs(per_class.precision_interval[used]),
        recall_interval_95=_pairs(per_class.recall_interval[used]),
        support=per_class.support[used],
        predicted=per_class.predicted[used],
    )


def _mistakes(labels: Sequence[str], confusion: Confusion) -> list[dict[str, Any]]:
    """Return the pairs of classes that are confused most often."""
    mistakes, names = confusion.mistakes(), np.array(labels, object)
    return _records(
        truth=names[mistakes.truth[:_MISTAKES]],
        label=names[mistakes.predicted[:_MISTAKES]],
        images=mistakes.count[:_MISTAKES],
    )


def _pairs(intervals: Intervals) -> npt.NDArray[np.object_]:
    """Return intervals as a column of pairs, None where there is none."""
    pairs = np.empty(len(intervals), object)
    pairs[:] = [None if np.isnan(pair).any() else pair.tolist() for pair in intervals]
    return pairs


def _records(**columns: Any) -> list[dict[str, Any]]:
    """Return a record for each row of columns; NaN becomes null, since JSON has no NaN."""
    plain = {name: [_plain(value) for value in column.tolist()] for name, column in columns.items()}
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value

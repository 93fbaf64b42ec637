"""Values: predictions of a model for images of known classes, and their metrics, for `evaluate` and `train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgbatch.evaluation import metrics
from imgbatch.evaluation.calibration import cross_entropy, softmax
from imgbatch.evaluation.metrics import Calibration, Confusion, Coverage, Estimate, PerClass

if TYPE_CHECKING:
    from imgbatch.models.taxonomy import Level, Taxonomy

TOP = 5

Ints = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]


@dataclass(slots=True, kw_only=True)
class Scores:
    """The predictions of a model for n images of known classes: 10 bytes an image and 4 a level."""

    number_of_classes: int
    levels: tuple[Level, ...]
    """Of the taxonomy, coarse to fine; empty without one."""
    truth: Ints
    """The true class of each image."""
    label: Ints
    """The predicted class; -1 where it is not known yet."""
    score: Floats
    in_top: Mask
    """Whether the true class is among the `TOP` best."""
    max_candidates: int
    """Maximum number of classes that are known of one image, the best first."""
    nodes: Ints
    """The predicted node at each level, (n, levels); -1 where it is not known."""
    score_before: Floats | None
    """The score before temperature scaling; NaN where it is unknown, None without a temperature."""
    loss: float | None = None
    """Mean cross-entropy; None where not all probabilities are known."""

    @classmethod
    def unknown(cls, truth: Ints, number_of_classes: int, levels: tuple[Level, ...], *, scaled: bool) -> Scores:
        """Return scores with only the true classes; the reader of the labels fills in the rest.

        Args:
            scaled: the logits are divided by a temperature.
        """
        n = len(truth)
        return cls(
            number_of_classes=number_of_classes,
            levels=levels,
            truth=truth,
            label=np.full(n, -1, np.int32),
            score=np.zeros(n, np.float32),
            in_top=np.zeros(n, bool),
            max_candidates=0,
            nodes=np.full((n, len(levels)), -1, np.int32),
            score_before=np.full(n, np.nan) if scaled else None,
        )

    @classmethod
    def from_logits(cls, logits: Floats, temperature: float, truth: Ints, taxonomy: Taxonomy | None) -> Scores:
        """Return the scores of (n, classes) logits.

        Args:
            logits: not divided by the temperature.
        """
        probabilities = softmax(logits / temperature)
        rolled_up = taxonomy.roll_up(probabilities) if taxonomy is not None else []
        nodes = [sums.argmax(1) for sums in rolled_up]
        return cls(
            number_of_classes=logits.shape[1],
            levels=taxonomy.levels if taxonomy is not None else (),
            truth=truth,
            label=probabilities.argmax(1),
            score=probabilities.max(1),
            in_top=(np.argsort(-probabilities, axis=1)[:, :TOP] == truth[:, None]).any(1),
            max_candidates=logits.shape[1],
            nodes=np.stack(nodes, 1) if nodes else np.zeros((len(truth), 0), np.int64),
            score_before=softmax(logits).max(1),
            loss=cross_entropy(logits / temperature, truth),
        )

    @property
    def right(self) -> Mask:
        """Which images have their true class as label."""
        right: Mask = np.equal(self.label, self.truth)
        return right

    def right_at(self, depth: int) -> Mask:
        """Return which images have their true node at a level."""
        true = np.array(self.levels[depth].node_of)[self.truth]
        right: Mask = np.equal(self.nodes[:, depth], true)
        return right


@dataclass(frozen=True, slots=True)
class Metrics:
    """How good the labels of n images are."""

    n: int
    top1: Estimate
    top5: Estimate | None
    """None where fewer than five of more classes are known of each image."""
    levels: dict[str, Estimate]
    """Coarse to fine; empty without a taxonomy."""
    confusion: Confusion
    per_class: PerClass
    calibration: Calibration
    calibration_before: Calibration | None
    """Of the scores before temperature scaling; None where they are not known."""
    coverage: Coverage
    loss: float | None
    """Mean cross-entropy; None where not all probabilities are known."""

    @classmethod
    def of(cls, scores: Scores) -> Metrics:
        """Compute all metrics of one image or more."""
        right, before = scores.right, scores.score_before
        confusion = Confusion.of(scores.truth, scores.label, scores.number_of_classes)
        levels = {}
        if not (scores.nodes < 0).any():
            levels = {
                level.name: metrics.proportion(scores.right_at(depth)) for depth, level in enumerate(scores.levels)
            }
        named_five = scores.max_candidates >= min(TOP, scores.number_of_classes)
        return cls(
            n=len(right),
            top1=metrics.proportion(right),
            top5=metrics.proportion(scores.in_top) if named_five else None,
            levels=levels,
            confusion=confusion,
            per_class=PerClass.of(confusion),
            calibration=metrics.calibration(scores.score, right),
            calibration_before=(
                metrics.calibration(before, right) if before is not None and not np.isnan(before).any() else None
            ),
            coverage=metrics.coverage(scores.score, right),
            loss=scores.loss,
        )

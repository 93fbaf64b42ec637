"""Values: the held-out images of a training run: their scores, their metrics, and examples for the page."""

from __future__ import annotations

from dataclasses import dataclass

from imgbatch.evaluation.examples import Examples, examples
from imgbatch.evaluation.scores import Metrics, Scores


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How good a network labels images that it was not trained on."""

    scores: Scores
    metrics: Metrics
    examples: Examples

    @classmethod
    def of(cls, scores: Scores) -> HeldOut:
        """Compute all figures of the scores."""
        metrics = Metrics.of(scores)
        return cls(scores, metrics, examples(scores, metrics.confusion))

"""Values: the table of confused classes, on the pages of evaluations and trainings."""

from __future__ import annotations

from collections.abc import Sequence

from imgbatch.evaluation.metrics import Confusion
from imgbatch.report.html import table

MAX_DRAWN = 100
"""Maximum number of classes of a confusion matrix that is legible."""

_PAIRS = 20


def confused_pairs(labels: Sequence[str], confusion: Confusion) -> str:
    """Return a table of the pairs of classes that are confused most often, or a sentence if all labels are right."""
    wrong = confusion.mistakes()
    columns = (wrong.truth[:_PAIRS], wrong.predicted[:_PAIRS], wrong.count[:_PAIRS])
    rows = [(labels[truth], labels[predicted], int(count)) for truth, predicted, count in zip(*columns, strict=True)]
    return table(["true", "predicted", "#images"], rows) if rows else "<p>All are right.</p>"

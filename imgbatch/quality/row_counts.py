"""Values: the counts of the rows that some runs wrote: labels, scores and rejects."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.schema import single_chunk

SCORE_BINS = 200
LABEL, SCORE = "label", "score"


@dataclass(frozen=True, slots=True)
class RunRange:
    """The runs with `after` < RUN_ID <= `through`. The ids sort in the order of the runs.

    >>> RunRange("20260101T000000Z-0").contains("20260102T000000Z-0"), RunRange("", "a").contains("b")
    (True, False)
    """

    after: str = ""
    """Empty: from the first run on."""
    through: str | None = None
    """None: to the last run."""

    def contains(self, run_id: str) -> bool:
        """Return whether a run is in the range."""
        return run_id > self.after and (self.through is None or run_id <= self.through)


@dataclass
class RowCounts:
    """The counts of the rows of a range of runs. The memory does not depend on the number of rows."""

    labels: Counter[str] = field(default_factory=Counter)
    scores: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(SCORE_BINS, np.int64))
    """Rows by score, in bins of equal width from 0 to 1."""
    score_sum: float = 0.0
    labelled: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    """Rejects by reason."""
    transient: int = 0
    """Rejects that the next run retries."""
    columns: set[str] = field(default_factory=set)
    """Which of `label` and `score` the table has."""

    @property
    def rejected(self) -> int:
        """The number of rejects."""
        return sum(self.rejects.values())

    @property
    def rows(self) -> int:
        """The number of rows in both tables."""
        return self.labelled + self.rejected

    @property
    def mean_score(self) -> float:
        """The mean probability of the best class."""
        return self.score_sum / self.labelled if self.labelled else 0.0

    def add_labels(self, rows: pa.Table) -> None:
        """Count rows of labels/."""
        self.labelled += len(rows)
        self.columns.update(rows.column_names)
        if LABEL in rows.column_names:
            counted = pc.value_counts(single_chunk(rows[LABEL]).cast(pa.string()))
            for label, number in zip(
                counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True
            ):
                self.labels[label] += number
        if SCORE in rows.column_names:
            scores = np.nan_to_num(rows[SCORE].to_numpy())
            bins = np.clip(scores * SCORE_BINS, 0, SCORE_BINS - 1).astype(np.int64)
            self.scores += np.bincount(bins, minlength=SCORE_BINS)
            self.score_sum += float(scores.sum(dtype=np.float64))

    def add_rejects(self, rows: pa.Table) -> None:
        """Count rows of rejects/."""
        self.rejects.update(rows["reason"].to_pylist())
        self.transient += pc.sum(rows["passing"]).as_py() or 0


def bin_centres() -> npt.NDArray[np.float64]:
    """Return the score in the middle of each bin."""
    return (np.arange(SCORE_BINS) + 0.5) / SCORE_BINS

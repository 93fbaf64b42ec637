"""Values: suspected problems of labelled data on the pages of evaluations and trainings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from imgbatch.evaluation.examples import DOUBTFUL, Examples
from imgbatch.evaluation.scores import Scores
from imgbatch.report.parts import Shown, Table, Thumbnail, short
from imgbatch.terminal.plurals import counted, plural

FEW = 10
"""Below this number of images, figures of a class are hardly reliable."""


@dataclass(frozen=True, slots=True)
class DoubtfulLabels:
    """Images whose given label may be wrong, and classes whose labels look swapped."""

    text: str
    thumbnails: tuple[Thumbnail, ...]
    swapped: Table | None
    to_do: tuple[str, ...]
    """What a reader should do about them."""

    @classmethod
    def of(
        cls, labels: Sequence[str], scores: Scores, examples: Examples, images: Mapping[int, Shown]
    ) -> DoubtfulLabels:
        """Return the doubtful labels of an evaluation.

        Args:
            images: the images of `examples`, by their numbers.
        """
        doubtful = examples.doubtful
        count, total = len(doubtful.images), len(scores.truth)
        text = (
            f"{count:,} of {counted(total, 'image')} {plural(count, 'has', 'have')} a given label that may be wrong: the model "
            "labels the image otherwise, with a score that is not below the mean score of right labels of the predicted class "
            "(confident learning)."
            if count
            else "No given label looks wrong: no wrong prediction is as confident as the right ones of its class."
        )
        thumbnails = tuple(
            images[number].thumbnail(
                f"given: {short(labels[scores.truth[number]], 60)}",
                f"predicted: {short(labels[scores.label[number]], 60)} {scores.score[number]:.2f}",
            )
            for number in doubtful.images[:DOUBTFUL].tolist()
        )
        rows = [
            (labels[pair.first], labels[pair.second], pair.first_as_second, pair.second_as_first)
            for pair in doubtful.swapped
        ]
        head = ["class A", "class B", "#A labelled B", "#B labelled A"]
        table = Table.of("classes with swapped labels", head, rows) if rows else None
        return cls(text, thumbnails, table, tuple(_to_do(count, len(rows))))


def _to_do(doubtful: int, swapped: int) -> Iterator[str]:
    if doubtful:
        yield f"Check {counted(doubtful, 'label')} that may be wrong."
    if swapped:
        yield f"Check {counted(swapped, 'pair')} of classes whose labels look swapped."


@dataclass(frozen=True, slots=True)
class SmallClasses:
    """Classes with few images."""

    text: str
    table: Table | None
    count: int

    @classmethod
    def of(cls, counts: Sequence[tuple[str, int]], kind: str, consequence: str, few: int = FEW) -> SmallClasses:
        """Return the classes that have fewer than `few` images.

        Args:
            counts: name and number of images of each class.
            kind: what the images are, such as "images to train on".
            consequence: what follows for these classes.
        """
        small = sorted((row for row in counts if row[1] < few), key=lambda row: (row[1], row[0]))
        if not small:
            return cls(f"Each class has {few} or more {kind}.", None, 0)
        text = (
            f"{len(small):,} of {counted(len(counts), 'class', 'classes')} {plural(len(small), 'has', 'have')} fewer than "
            f"{few} {kind}: {consequence}."
        )
        return cls(text, Table.of("classes with few images", ["class", f"#{kind}"], small), len(small))

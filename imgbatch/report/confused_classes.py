"""Values: the confused classes on the pages of evaluations and trainings: pairs with pictures, a table, and matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgbatch.evaluation.examples import Examples, Ints, Pair, PairExamples, pairs_of
from imgbatch.evaluation.metrics import Confusion
from imgbatch.evaluation.scores import Scores
from imgbatch.report import figures
from imgbatch.report.parts import Card, Figure, Shown, Table, Thumbnail, percent, short
from imgbatch.terminal.plurals import counted, plural

MAX_DRAWN = 100
"""Maximum number of classes of a confusion matrix that is legible."""

_IN_SMALL_MATRIX = 10
_PAIRS = 100


@dataclass(frozen=True, slots=True)
class ConfusedClasses:
    """What a page shows of wrong labels; without a wrong label only a sentence."""

    lead: str
    pairs: tuple[Card, ...]
    """Two confused classes each, with three pictures."""
    table: Table | None
    figures: tuple[Figure, ...]
    matrix: Figure | None
    """The matrix of all classes of the finest level that is legible."""

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        scores: Scores,
        confusion: Confusion,
        examples: Examples,
        images: Mapping[int, Shown],
    ) -> ConfusedClasses:
        """Return the confused classes of an evaluation.

        Args:
            images: the images of `examples`, by their numbers.
        """
        pairs, n = pairs_of(confusion), int(confusion.count.sum())
        matrix = _whole_matrix(labels, scores, confusion)
        if not pairs:
            return cls("All labels are right.", (), None, (), matrix)
        support = np.bincount(confusion.truth, weights=confusion.count, minlength=len(labels)).astype(int).tolist()
        wrong, of_shown = sum(pair.count for pair in pairs), sum(pair.count for pair in pairs[: len(examples.pairs)])
        lead = (
            f"{counted(wrong, 'label')} of {n:,} {plural(wrong, 'is', 'are')} wrong, in {counted(len(pairs), 'pair')} "
            f"of classes. The {len(examples.pairs)} pairs below have {percent(of_shown / wrong, 0)} of the wrong labels. "
            "The number after a label is its score."
        )
        shown = tuple(_shown_pair(each, labels, support, scores, images) for each in examples.pairs)
        return cls(lead, shown, _table(pairs, labels), (_small_matrix(pairs, labels, support, confusion),), matrix)


def worst_pair(labels: Sequence[str], examples: Examples) -> str:
    """Return a sentence about the two classes that are confused most often; empty if no label is wrong."""
    if not examples.pairs:
        return ""
    pair = examples.pairs[0].pair
    names = [short(labels[number], 60) for number in (pair.first, pair.second)]
    return f" Confused most often: “{names[0]}” and “{names[1]}”, {counted(pair.count, 'image')}."


def confident_errors(
    labels: Sequence[str], scores: Scores, examples: Examples, images: Mapping[int, Shown]
) -> list[Thumbnail]:
    """Return the wrong labels with the highest scores."""
    return [
        images[number].thumbnail(
            f"{short(labels[scores.label[number]], 60)} {scores.score[number]:.2f}",
            f"is {short(labels[scores.truth[number]], 60)}",
        )
        for number in examples.errors.tolist()
    ]


def _shown_pair(
    examples: PairExamples, labels: Sequence[str], support: Sequence[int], scores: Scores, images: Mapping[int, Shown]
) -> Card:
    pair = examples.pair
    first, second = short(labels[pair.first], 60), short(labels[pair.second], 60)
    parts = []
    for count, truth, label, total in (
        (pair.first_as_second, first, second, support[pair.first]),
        (pair.second_as_first, second, first, support[pair.second]),
    ):
        if count:
            parts.append(f"{count:,} of {total:,} “{truth}” {plural(count, 'is', 'are')} labelled “{label}”")
    number = examples.confused

    def labelled(number: int) -> str:
        name = "right" if scores.right[number] else short(labels[scores.label[number]], 60)
        return f"labelled {name} {scores.score[number]:.2f}"

    def other(number: int | None, name: str) -> Thumbnail:
        if number is None:
            return Thumbnail(name, (), "", "no other image of this class", "")
        return images[number].thumbnail(name, labelled(number))

    confused = images[number].thumbnail("Confused", f"is {short(labels[scores.truth[number]], 60)}", labelled(number))
    thumbnails = (other(examples.first, first), confused, other(examples.second, second))
    return Card(f"{first} and {second}", f"{'; '.join(parts)}.", thumbnails)


def _table(pairs: Sequence[Pair], labels: Sequence[str]) -> Table:
    rows = []
    for pair in pairs[:_PAIRS]:
        rows.append((labels[pair.first], labels[pair.second], pair.count, pair.first_as_second, pair.second_as_first))
    head = ["class A", "class B", "#confused", "#A as B", "#B as A"]
    return Table.of("confused pairs of classes", head, rows, total=len(pairs))


def _small_matrix(pairs: Sequence[Pair], labels: Sequence[str], support: Sequence[int], confusion: Confusion) -> Figure:
    """Draw the matrix of the classes of the first pairs."""
    chosen: list[int] = []
    for pair in pairs:
        added = [each for each in (pair.first, pair.second) if each not in chosen]
        if len(chosen) + len(added) > _IN_SMALL_MATRIX:
            break
        chosen += added
    position = {number: at for at, number in enumerate(chosen)}
    matrix = np.zeros((len(chosen), len(chosen) + 1), np.int64)
    in_rows = np.flatnonzero(np.isin(confusion.truth, chosen))
    for truth, predicted, count in zip(
        confusion.truth[in_rows].tolist(), confusion.predicted[in_rows].tolist(), confusion.count[in_rows].tolist(),
        strict=True,
    ):  # fmt: skip
        matrix[position[truth], position.get(predicted, len(chosen))] += count
    return figures.worst_confusions(matrix, [labels[each] for each in chosen], [support[each] for each in chosen])


def _whole_matrix(labels: Sequence[str], scores: Scores, confusion: Confusion) -> Figure | None:
    """Draw the matrix of the finest level whose classes in use are at most MAX_DRAWN."""
    shown = [("label", confusion, labels)]
    known = not (scores.nodes < 0).any()
    for depth in reversed(range(len(scores.levels) - 1)) if known else ():
        level = scores.levels[depth]
        truth = np.array(level.node_of)[scores.truth]
        shown.append((level.name, Confusion.of(truth, scores.nodes[:, depth], len(level.nodes)), level.nodes))
    for name, of_level, names in shown:
        used = np.union1d(of_level.truth, of_level.predicted)
        if 1 < len(used) <= MAX_DRAWN:
            return figures.confusion(_counts(of_level, used), [names[node] for node in used], name)
    return None


def _counts(confusion: Confusion, used: Ints) -> Ints:
    """Return the matrix of the classes in use, whose numbers are ascending."""
    matrix = np.zeros((len(used), len(used)), np.int64)
    matrix[np.searchsorted(used, confusion.truth), np.searchsorted(used, confusion.predicted)] = confusion.count
    return matrix

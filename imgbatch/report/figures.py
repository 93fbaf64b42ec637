"""Values: the figures of evaluations and trainings: each with a conclusion, and with its numbers in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.evaluation.metrics import Calibration, Coverage, Estimate
from imgbatch.report.parts import Figure, Series, Table, percent, percent_with_interval, short
from imgbatch.report.svg import WIDTH, Axis, Drawing, Plot
from imgbatch.terminal.plurals import counted, plural

_TARGET = 0.95
_SMALL = 0.03
"""Strengths of L2 whose losses differ by less than this proportion are equally good."""
_WIDE = 1_060
"""Width of a figure that needs the width of a page, in CSS pixels."""


def reliability(curves: Mapping[str, Calibration], accuracy: Estimate) -> Figure:
    """Draw the accuracy of each bin of scores, with the number of images below; calibrated scores are on the diagonal.

    Args:
        curves: by their name, that of the final scores first.
        accuracy: of all images.
    """
    first = next(iter(curves.values()))
    conclusion = _calibration_in_words(first, accuracy)
    drawing = Drawing(f"Accuracy by score, with the number of images. {conclusion}", height=356)
    scores = Axis.of_proportions("score")
    plot = Plot(drawing, scores, Axis.of_proportions("accuracy"), bottom=216)
    plot.axes(x_texts=False)
    plot.drawing.line([plot.at(0, 0), plot.at(1, 1)], "guide")
    for number, curve in reversed([*enumerate(curves.values())]):
        for score, (low, high) in zip(curve.score.tolist(), curve.interval.tolist(), strict=True):
            if number == 0:
                plot.bar(score, low, high, number)
        plot.curve(zip(curve.score.tolist(), curve.accuracy.tolist(), strict=True), number, dots=True)
    below = Plot(drawing, scores, Axis.of_counts("images", int(first.count.max())), top=236, bottom=314)
    below.axes()
    right = np.rint(first.count * first.accuracy)
    for low, high, part, count in zip(first.low, first.high, right, first.count, strict=True):
        below.column(low, high, 0, part, "column right")
        below.column(low, high, part, count, "column wrong")
    rows = [
        (name, f"{low:.2f} to {high:.2f}", int(count), f"{score:.3f}", percent_with_interval(accurate, *ends))
        for name, curve in curves.items()
        for low, high, count, score, accurate, ends in zip(
            curve.low, curve.high, curve.count, curve.score, curve.accuracy, curve.interval.tolist(), strict=True
        )
    ]
    head = ["scores", "bin", "#images", "#mean score", "#accuracy"]
    legend = [
        Series(f"{name}, ECE {curve.ece.value:.3f}", number) for number, (name, curve) in enumerate(curves.items())
    ]
    return Figure(
        "Reliability", conclusion, drawing.svg(), Table.of("bins of scores", head, rows),
        (*legend, Series("ideal", 2), Series("images: right", 3), Series("wrong (on top)", 4)),
    )  # fmt: skip


def _calibration_in_words(curve: Calibration, accuracy: Estimate) -> str:
    mean = float((curve.count * curve.score).sum() / curve.count.sum())
    found = f"The mean score is {percent(mean)}, the accuracy {percent(accuracy.value)}"
    if accuracy.low <= mean <= accuracy.high:
        return f"{found}: on average, scores are neither too high nor too low."
    if mean > accuracy.value:
        return f"{found}: the model is overconfident, its scores are too high."
    return f"{found}: the model is underconfident, its scores are too low."


def coverage(curves: Mapping[str, Coverage]) -> Figure:
    """Draw accuracy, with its 95 % interval, over the proportion of images that reach a minimum score, as that rises."""
    lowest = min(float(np.nanmin([*curve.accuracy, curve.interval[0, 0]])) for curve in curves.values())
    conclusion = _coverage_in_words(next(iter(curves.values())))
    drawing = Drawing(f"Accuracy by coverage. {conclusion}", height=300)
    plot = Plot(
        drawing,
        Axis.of_proportions("coverage: images that reach the minimum score"),
        Axis.of_proportions("accuracy of these", max(0.0, min(lowest - 0.02, 0.9))),
        bottom=258,
    )
    plot.axes()
    rows = []
    for number, (name, curve) in enumerate(curves.items()):
        used = ~np.isnan(curve.accuracy)
        x, y, ends = (values[used].tolist() for values in (curve.coverage, curve.accuracy, curve.interval))
        plot.band(x, [low for low, _ in ends], [high for _, high in ends], number)
        plot.curve(zip(x, y, strict=True), number)
        half = int(np.searchsorted(curve.score, 0.5))
        if used[half]:
            drawing.dot(plot.at(curve.coverage[half], curve.accuracy[half]), f"dot c{number}", 4.5)
        for at in range(0, len(curve.score), 5):
            ends_at = curve.interval[at].tolist()
            accurate = percent_with_interval(float(curve.accuracy[at]), *ends_at)
            rows.append((name, f"{curve.score[at]:.2f}", percent(float(curve.coverage[at])), accurate))
    table = Table.of("minimum scores", ["model", "#minimum score", "#coverage", "#accuracy"], rows)
    legend = [Series(short(name, 40), number) for number, name in enumerate(curves)]
    return Figure(
        "Coverage and accuracy", f"{conclusion} The dot is a minimum score of 0.5; shaded: 95% intervals.", drawing.svg(),
        table, tuple(legend) if len(legend) > 1 else (),
    )  # fmt: skip


def _coverage_in_words(curve: Coverage) -> str:
    half = int(np.searchsorted(curve.score, 0.5))
    if np.isnan(curve.accuracy[half]):
        return "No image has a score of 0.5 or more."
    text = (
        f"{percent(float(curve.coverage[half]))} of the images have a score of 0.5 or more, and "
        f"{percent(float(curve.accuracy[half]))} of these labels are right."
    )
    good = np.flatnonzero(np.nan_to_num(curve.accuracy) >= _TARGET)
    if not len(good):
        return f"{text} No minimum score reaches an accuracy of {_TARGET:.0%}."
    first = int(good[0])
    return (
        f"{text} A minimum score of {curve.score[first]:.2f} gives an accuracy of {_TARGET:.0%} or more; "
        f"{percent(float(curve.coverage[first]))} of the images reach it."
    )


def learning(curve: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draw the loss and the accuracy of each point of a training run: epochs, or strengths of L2."""
    is_l2 = "l2" in curve[0]
    x = "L2 (strength of regularisation)" if is_l2 else "epoch"
    positions = [float(point["l2"]) for point in curve] if is_l2 else [float(n) for n in range(1, len(curve) + 1)]
    axis = Axis.logarithmic(x, positions) if is_l2 else Axis.of_numbers(x, len(curve))
    drawn = []
    for name in ("loss", "accuracy"):
        lines = {}
        for line, key in (("held-out images", f"held_out_{name}"), ("training images", name)):
            points = [
                (at, point[key]) for at, point in zip(positions, curve, strict=True) if point.get(key) is not None
            ]
            if points:
                lines[line] = points
        if not lines:
            continue
        values = [value for points in lines.values() for _, value in points]
        low, high = max(0.0, min(values) - 0.05), min(1.0, max(values) + 0.05)
        y = Axis.of_values(name, values) if name == "loss" else Axis.of_proportions(name, low, high)
        conclusion = _strengths_in_words(name, curve) if is_l2 else _epochs_in_words(name, lines)
        drawing = Drawing(f"The {name} by {'L2' if is_l2 else 'epoch'}. {conclusion}")
        plot = Plot(drawing, axis, y)
        plot.axes()
        for number, points in reversed([*enumerate(lines.values())]):
            plot.curve(sorted(points), number, dots=True)
        form = "{:.1%}" if name == "accuracy" else "{:.4f}"
        rows = [(line, f"{at:g}", form.format(value)) for line, points in lines.items() for at, value in points]
        table = Table.of(f"points of the {name}", ["images", f"#{'L2' if is_l2 else 'epoch'}", f"#{name}"], rows)
        legend = tuple(Series(line, number) for number, line in enumerate(lines))
        drawn.append(Figure(name.capitalize(), conclusion, drawing.svg(), table, legend))
    return drawn


def _strengths_in_words(name: str, curve: Sequence[Mapping[str, Any]]) -> str:
    """Return what follows from the points of all strengths of L2: that with the lowest loss is selected."""
    selected = min(curve, key=lambda point: point["held_out_loss"])
    best = max(curve, key=lambda point: point["held_out_accuracy"])
    accuracy, highest = selected["held_out_accuracy"], best["held_out_accuracy"]
    if name == "accuracy":
        text = f"With the selected L2, {selected['l2']:g}, {accuracy:.1%} of the held-out images are labelled right"
        return f"{text}; the best is {highest:.1%}, with {best['l2']:g}." if highest > accuracy else f"{text}."
    loss, l2 = selected["held_out_loss"], [point["l2"] for point in curve]
    text = f"An L2 of {selected['l2']:g} is selected: it has the lowest loss on held-out images, {loss:.3f}."
    if len(l2) == 1:
        return f"The L2 of {l2[0]:g} was given; the loss on held-out images is {loss:.3f}."
    if selected["l2"] in (min(l2), max(l2)):
        which, other = ("weakest", "lower") if selected["l2"] == min(l2) else ("strongest", "higher")
        return f"{text} It is the {which} that was tried: a {other} train.l2 might be better."
    spread = max(point["held_out_loss"] for point in curve) - loss
    return f"{text} The strength matters little here." if spread < _SMALL * loss else text


def _epochs_in_words(name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    best = min if name == "loss" else max
    if "held-out images" not in lines:
        at, value = lines["training images"][-1]
        return f"At epoch {at:g} the {name} on training images is {value:.3f}. No image was held out."
    held_out = lines["held-out images"]
    at, value = best(held_out, key=lambda point: point[1])
    shown = f"{value:.1%}" if name == "accuracy" else f"{value:.3f}"
    text = f"The best {name} on held-out images is {shown}, at epoch {at:g}"
    if len(held_out) > 1 and at == held_out[-1][0]:
        return f"{text}, the last one: more epochs might improve it further."
    return f"{text}."


def classes_by_f1(f1: npt.NDArray[np.floating[Any]]) -> Figure:
    """Draw how many classes have which F1.

    Args:
        f1: of the classes that have images; NaN counts as zero.
    """
    values = np.nan_to_num(f1)
    count = np.bincount(np.minimum((values * 10).astype(int), 9), minlength=10)
    poor = int(count[:5].sum())
    conclusion = (
        f"{poor:,} of {counted(len(values), 'class', 'classes')} {plural(poor, 'has', 'have')} an F1 below 50%; the median is "
        f"{percent(float(np.median(values)))}."
    )
    drawing = Drawing(f"Number of classes by F1. {conclusion}", height=230)
    plot = Plot(drawing, Axis.of_proportions("F1"), Axis.of_counts("classes", int(count.max())), bottom=188)
    plot.axes()
    for number, classes in enumerate(count.tolist()):
        plot.column(number / 10, (number + 1) / 10, 0, classes, "column c0")
    rows = [(f"{number * 10} to {number * 10 + 10}%", classes) for number, classes in enumerate(count.tolist())]
    return Figure("Classes by F1", conclusion, drawing.svg(), Table.of("classes by F1", ["#F1", "#classes"], rows))


def worst_confusions(matrix: npt.NDArray[np.integer[Any]], names: Sequence[str], support: Sequence[int]) -> Figure:
    """Draw the counts of the classes that are confused most often, with a column for all other classes.

    Args:
        matrix: (n, n + 1) counts, a row for each true class; the last column is of all other predictions.
        support: number of images of each class.
    """
    n, left, cell = len(names), 138, 18
    cell = min(cell, (WIDTH - left - 4) // (n + 1))
    right = int(np.trace(matrix))
    conclusion = f"Of the {sum(support):,} images of these {n} classes, {right:,} are labelled right (on the diagonal)."
    height = 26 + n * cell + 18
    drawing = Drawing(f"Confusion matrix of the classes that are confused most often. {conclusion}", height=height)
    for column in range(n + 1):
        text = str(column + 1) if column < n else "…"
        drawing.text((left + (column + 0.5) * cell, 18), text, anchor="middle", style="t small")
    for row, name in enumerate(names):
        y = 24 + row * cell
        drawing.text((left - 6, y + cell * 0.7), f"{short(name, 20)} {row + 1}", anchor="end", style="t small")
        for column in range(n + 1):
            value = int(matrix[row, column])
            style = "cell right" if row == column else "cell wrong"
            share = value / max(support[row], 1)
            x = left + column * cell
            drawing.rectangle(x, y, cell - 1, cell - 1, "cell empty")
            if value:
                drawing.rectangle(x, y, cell - 1, cell - 1, style, opacity=0.15 + 0.4 * share)
                text = str(value) if value < 1_000 else f"{value // 1_000}k"
                drawing.text((x + cell / 2 - 0.5, y + cell * 0.7), text, anchor="middle", style="t small")
    drawing.text((left, height - 6), "predicted class, by number; …: others", style="t small name")
    head = ["true class", *(f"#{number}" for number in range(1, n + 1)), "#others", "#images"]
    rows: list[tuple[str | int, ...]] = [
        (f"{row + 1} {name}", *matrix[row].tolist(), support[row]) for row, name in enumerate(names)
    ]
    table = Table.of("confusion matrix", head, rows)
    return Figure("Classes that are confused most often", conclusion, drawing.svg(), table)


def confusion(matrix: npt.NDArray[np.integer[Any]], names: Sequence[str], level: str) -> Figure:
    """Draw the proportions of each true class that were predicted as each class; the diagonal is right."""
    n, left, top, margin = len(names), 190, 130, 70
    cell = min((_WIDE - left - margin) / n, 26)
    support = matrix.sum(1, keepdims=True)
    proportions = matrix / np.maximum(support, 1)
    used = int(np.count_nonzero(support))
    below = used - int(np.count_nonzero(np.diag(proportions) >= 0.5))
    conclusion = (
        f"{below:,} of {counted(used, 'class', 'classes')} {plural(below, 'has', 'have')} less than half of their images on "
        "the diagonal, where labels are right. The darker a cell, the larger its part of the true class."
    )
    side = n * cell
    drawing = Drawing(
        f"Confusion matrix of level {level}. {conclusion}", width=left + side + margin, height=top + side + 10
    )
    size = "small" if cell >= 11 else "tiny"
    for number, name in enumerate(names):
        middle = (number + 0.5) * cell
        drawing.text((left - 5, top + middle + 3), short(name, 30), anchor="end", style=f"t {size}")
        drawing.text((left + middle + 3, top - 5), short(name, 24), style=f"t {size}", turned=-60)
        drawing.line([(left, top + middle), (left + side, top + middle)], "rule")
    for row, column in np.argwhere(matrix).tolist():
        style = "cell right" if row == column else "cell wrong"
        opacity = 0.15 + 0.85 * float(proportions[row, column])
        drawing.rectangle(left + column * cell, top + row * cell, cell - 0.5, cell - 0.5, style, opacity=opacity)
    wrong = [(int(matrix[row, column]), row, column) for row, column in np.argwhere(matrix).tolist() if row != column]
    rows = [(names[row], names[column], count) for count, row, column in sorted(wrong, key=lambda cell: -cell[0])]
    table = Table.of(f"wrong labels of level {level}", ["true class", "predicted class", "#images"], rows)
    return Figure(f"Confusion matrix, level {level}", conclusion, drawing.svg(), table, is_wide=True)

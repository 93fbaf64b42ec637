"""Effects: the page of an evaluation: one HTML file without scripts, with its figures and a few pictures in it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from imgbatch.evaluation.evaluation import Evaluation
from imgbatch.evaluation.metrics import Confusion, Coverage, Estimate, Floats, Intervals
from imgbatch.evaluation.training_images import NOT_KNOWN
from imgbatch.report import figures
from imgbatch.report.confused_classes import MAX_DRAWN, confused_pairs
from imgbatch.report.html import document, table


def page(
    ours: Evaluation,
    other: Evaluation | None,
    comparison: Mapping[str, Any] | None,
    pictures: Iterable[tuple[Any, bytes]],
) -> str:
    """Return the page of an evaluation.

    Args:
        other: a second model on the same images.
        comparison: the differences between both models.
        pictures: rows of wrongly labelled images, each with a JPEG; empty if the image could not be read.
    """
    name = ours.model.name
    parts = [
        f"<h1>Evaluation of {escape(name)}</h1>",
        f"<p>{ours.metrics.n:,} images, {np.count_nonzero(ours.metrics.per_class.support):,} of "
        f"{len(ours.model.labels):,} classes.</p>",
        _training_notes(ours, other),
        _headline(ours),
        '<p class="note">In parentheses: 95 % intervals. Those of proportions are Wilson\'s score intervals, those of the '
        "calibration error and of differences between models come from a bootstrap over images.</p>",
        _comparison(ours, other, comparison) if other is not None and comparison is not None else "",
        "<h2>Calibration: are scores probabilities?</h2>",
        _calibration(ours),
        "<h2>Accuracy and coverage at a minimum score</h2>",
        f'<div class="side">{figures.coverage(_coverage(ours, other))}{_answers(ours)}</div>'
        '<p class="note">Shaded: 95 % intervals.</p>',
        "<h2>Confused classes</h2>",
        _confusion(ours),
        "<h2>Wrong labels with the highest scores</h2>",
        _pictures(pictures),
        "<h2>Classes, lowest F1 first</h2>",
        _classes(ours),
    ]
    return document(f"Evaluation of {name}", parts)


def _coverage(ours: Evaluation, other: Evaluation | None) -> dict[str, Coverage]:
    """Return the coverage curve of each model, by its name."""
    evaluations = [ours] if other is None else [ours, other]
    names = [evaluation.model.name.rstrip("/").rpartition("/")[2] for evaluation in evaluations]
    if len(set(names)) < len(names):
        names = [evaluation.model.reference for evaluation in evaluations]
    return {name: evaluation.metrics.coverage for name, evaluation in zip(names, evaluations, strict=True)}


def _proportion(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1%}"


def _proportions(values: Floats, intervals: Intervals) -> list[str]:
    """Return proportions with their intervals."""
    return [
        f"{_proportion(value)} ({low:.1%} to {high:.1%})" if not np.isnan(low) else _proportion(value)
        for value, (low, high) in zip(values.tolist(), intervals.tolist(), strict=True)
    ]


def _training_notes(ours: Evaluation, other: Evaluation | None) -> str:
    """Return notes on images that the models were trained on: a warning if there are any."""
    notes = []
    for evaluation in [ours] if other is None else [ours, other]:
        name = "" if other is None else f"{escape(evaluation.model.name)}: "
        if evaluation.seen is None:
            notes.append(f'<p class="note">{name}{NOT_KNOWN.capitalize()}.</p>')
        elif not evaluation.seen.trained + evaluation.seen.selected:
            notes.append(f'<p class="note">{name}{str(evaluation.seen).capitalize()}.</p>')
        else:
            scope = "All figures below include them"
            if evaluation.unseen is not None:
                scope += f"; top-1 of {evaluation.unseen_images:,} images that were not is <b>{evaluation.unseen}</b>"
            ability = (
                "remembers its training images" if evaluation.seen.trained else "fits images that it was selected on"
            )
            notes.append(
                f'<p class="warning"><b>{name}{str(evaluation.seen).capitalize()}.</b> Figures on such images show how well '
                f"the model {ability}, not how good it is on new images. {scope}.</p>"
            )
    return "".join(notes)


def _headline(ours: Evaluation) -> str:
    rows = [("top-1", str(ours.metrics.top1))]
    rows += [("top-5", str(ours.metrics.top5))] if ours.metrics.top5 is not None else []
    coarser = [*ours.metrics.levels.items()][:-1]  # the finest level is top-1
    rows += [(f"level {name}", str(estimate)) for name, estimate in coarser]
    per_class, ece = ours.metrics.per_class, ours.metrics.calibration.ece
    rows += [("macro F1", _proportion(per_class.macro(per_class.f1)))]
    rows += [("mean recall of classes", _proportion(per_class.macro(per_class.recall)))]
    rows += [("calibration error (ECE)", f"{ece.value:.3f} ({ece.low:.3f} to {ece.high:.3f})")]
    return table(["figure", "value"], rows)


def _comparison(ours: Evaluation, other: Evaluation, comparison: Mapping[str, Any]) -> str:
    def row(
        name: str, this_estimate: Estimate, other_estimate: Estimate, difference: Mapping[str, Any]
    ) -> tuple[str, ...]:
        low, high = difference["interval_95"]
        marker = "" if low <= 0 <= high else " *"
        points = f"{100 * difference['difference']:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}){marker}"
        return name, _proportion(this_estimate.value), _proportion(other_estimate.value), points

    rows = [row("top-1", ours.metrics.top1, other.metrics.top1, comparison["top1"])]
    for name, difference in comparison["levels"].items():
        rows.append(row(name, ours.metrics.levels[name], other.metrics.levels[name], difference))
    return (
        f"<h2>Against {escape(other.model.name)}</h2>"
        + table(["figure", "#this model", "#other model", "difference"], rows)
        + f"<p>On the same images: {comparison['only_first_right']:,} are right only with this model, "
        f"{comparison['only_second_right']:,} only with the other. * The interval does not contain zero.</p>"
    )


def _calibration(ours: Evaluation) -> str:
    curves = {"score": ours.metrics.calibration}
    note = ""
    if ours.metrics.calibration_before is not None:
        curves = {"after temperature": ours.metrics.calibration, "before": ours.metrics.calibration_before}
    elif ours.temperature is not None:
        note = "The rows do not name all classes, so scores before temperature scaling cannot be computed."
    return f'{figures.reliability(curves)}<p class="note">The larger a dot, the more images. {note}</p>'


def _answers(ours: Evaluation) -> str:
    rows = [
        (
            record["level"] or "no answer",
            _proportion(record["share"]),
            *_proportions(
                np.array([np.nan if record["accuracy"] is None else record["accuracy"]]),
                np.array([record["accuracy_interval_95"] or (np.nan, np.nan)]),
            ),
        )
        for record in reversed(ours.answers())
    ]
    return f"<div>{table(['answer is of level', '#images', '#right'], rows)}</div>" if rows else ""


def _confusion(ours: Evaluation) -> str:
    """Return the matrix of the finest level that is legible, and the pairs that are confused most often."""
    pairs = confused_pairs(ours.model.labels, ours.metrics.confusion)
    return f'<div class="side">{_drawn_matrix(ours)}<div>{pairs}</div></div>'


def _drawn_matrix(ours: Evaluation) -> str:
    scores = ours.scores
    shown = [("label", ours.metrics.confusion, ours.model.labels)]
    for depth in reversed(range(len(scores.levels) - 1)) if ours.metrics.levels else ():
        level = scores.levels[depth]
        truth = np.array(level.node_of)[scores.truth]
        shown.append((level.name, Confusion.of(truth, scores.nodes[:, depth], len(level.nodes)), level.nodes))
    for name, confusion, names in shown:
        used = np.union1d(confusion.truth, confusion.predicted)
        if 1 < len(used) <= MAX_DRAWN:
            drawn = figures.confusion(confusion.matrix()[np.ix_(used, used)], [names[node] for node in used])
            return f'<div>{drawn}<p class="note">Level {escape(name)}.</p></div>'
    return ""


def _pictures(pictures: Iterable[tuple[Any, bytes]]) -> str:
    shown = []
    for row, jpeg in pictures:
        data = base64.b64encode(jpeg).decode()
        image = f'<img alt="" src="data:image/jpeg;base64,{data}">' if jpeg else "<p>(not shown)</p>"
        shown.append(
            f"<figure>{image}<figcaption>{escape(row['label'])} {row['score']:.2f}, true class <b>{escape(row['truth'])}</b>"
            f"<br>{escape(row['uri'].rpartition('/')[2])}</figcaption></figure>"
        )
    return f'<div class="pictures">{"".join(shown)}</div>' if shown else "<p>None: all are right.</p>"


def _classes(ours: Evaluation) -> str:
    per_class, labels = ours.metrics.per_class, ours.model.labels
    used = np.flatnonzero(per_class.support)
    order = used[np.argsort(per_class.f1[used], kind="stable")]
    precision = _proportions(per_class.precision[order], per_class.precision_interval[order])
    recall = _proportions(per_class.recall[order], per_class.recall_interval[order])
    rows = [
        (labels[i], precision[at], recall[at], _proportion(per_class.f1[i]), int(per_class.support[i]))
        for at, i in enumerate(order)
    ]
    return table(["class", "#precision", "#recall", "#F1", "#images"], rows)

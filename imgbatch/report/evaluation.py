"""Effects: the page of an evaluation: one HTML file with its figures and a few pictures in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from imgbatch.evaluation.evaluation import Evaluation
from imgbatch.evaluation.examples import Examples
from imgbatch.evaluation.metrics import Coverage, Estimate
from imgbatch.evaluation.training_images import NOT_KNOWN
from imgbatch.report import figures
from imgbatch.report.confused_classes import ConfusedClasses, confident_errors, worst_pair
from imgbatch.report.data_problems import DoubtfulLabels, SmallClasses
from imgbatch.report.page import render
from imgbatch.report.parts import (
    MAX_ROWS,
    KeyFigure,
    Notice,
    Shown,
    Table,
    Verdict,
    interval,
    percent,
    percent_with_interval,
    short,
)
from imgbatch.terminal.plurals import counted


def page(
    ours: Evaluation,
    other: Evaluation | None,
    comparison: Mapping[str, Any] | None,
    examples: Examples,
    images: Mapping[int, Shown],
) -> str:
    """Return the page of an evaluation.

    Args:
        other: a second model on the same images.
        comparison: the differences between both models.
        examples: the images to show.
        images: these images, by their numbers.
    """
    metrics, labels, scores = ours.metrics, ours.model.labels, ours.scores
    support = metrics.per_class.support
    curves = {"scores": metrics.calibration}
    if metrics.calibration_before is not None:
        curves = {"after temperature": metrics.calibration, "before": metrics.calibration_before}
    used = np.flatnonzero(support)
    counts = [(labels[number], int(support[number])) for number in used]
    doubtful = DoubtfulLabels.of(labels, scores, examples, images)
    return render(
        "evaluation.html",
        title=f"Evaluation of {ours.model.name}",
        kind="Evaluation",
        heading=_short_name(ours),
        verdict=Verdict(_verdict(ours, examples), to_do=doubtful.to_do),
        model=ours.model,
        images_and_classes=f"{counted(metrics.n, 'image')}, {len(used):,} of {counted(len(labels), 'class', 'classes')}",
        notices=_training_notices(ours, other),
        key_figures=_key_figures(ours),
        comparison=_comparison(ours, other, comparison) if other is not None and comparison is not None else None,
        reliability=figures.reliability(curves, metrics.top1),
        temperature_unknown=metrics.calibration_before is None and ours.temperature is not None,
        coverage=figures.coverage(_coverage(ours, other)),
        answers=_answers(ours),
        confused=ConfusedClasses.of(labels, scores, metrics.confusion, examples, images),
        errors=confident_errors(labels, scores, examples, images),
        number_of_errors=int(np.count_nonzero(~scores.right)),
        doubtful=doubtful,
        small=SmallClasses.of(counts, "images here", "their figures are uncertain"),
        by_f1=figures.classes_by_f1(metrics.per_class.f1[used]),
        classes=_classes(ours),
    )


def _short_name(evaluation: Evaluation) -> str:
    return short(evaluation.model.name.rstrip("/").rpartition("/")[2])


def _verdict(ours: Evaluation, examples: Examples) -> str:
    metrics = ours.metrics
    right = (
        f"{percent(metrics.top1.value)} of {counted(metrics.n, 'label')} are right (95% interval "
        f"{interval(metrics.top1.low, metrics.top1.high)})."
    )
    return f"{right}{worst_pair(ours.model.labels, examples)}"


def _coverage(ours: Evaluation, other: Evaluation | None) -> dict[str, Coverage]:
    """Return the coverage curve of each model, by its name."""
    evaluations = [ours] if other is None else [ours, other]
    names = [evaluation.model.name.rstrip("/").rpartition("/")[2] for evaluation in evaluations]
    if len(set(names)) < len(names):
        names = [evaluation.model.reference.rpartition("/")[2] for evaluation in evaluations]
    return {name: evaluation.metrics.coverage for name, evaluation in zip(names, evaluations, strict=True)}


def _training_notices(ours: Evaluation, other: Evaluation | None) -> list[Notice]:
    """Return notices of images that the models were trained on: a warning if there are any."""
    notices = []
    for evaluation in [ours] if other is None else [ours, other]:
        name = "" if other is None else f"{evaluation.model.name}: "
        if evaluation.seen is None:
            notices.append(Notice(f"{name}{NOT_KNOWN.capitalize()}.", ""))
        elif not evaluation.seen.trained + evaluation.seen.selected:
            notices.append(Notice(f"{name}{str(evaluation.seen).capitalize()}.", ""))
        else:
            scope = "All figures below include them"
            if evaluation.unseen is not None:
                scope += f"; top-1 of {evaluation.unseen_images:,} images that were not is {evaluation.unseen}"
            ability = (
                "remembers its training images" if evaluation.seen.trained else "fits images that it was selected on"
            )
            text = (
                f"Figures on such images show how well the model {ability}, not how good it is on new images. {scope}."
            )
            notices.append(Notice(f"{name}{str(evaluation.seen).capitalize()}.", text, is_warning=True))
    return notices


def _key_figures(ours: Evaluation) -> list[KeyFigure]:
    metrics, per_class, ece = ours.metrics, ours.metrics.per_class, ours.metrics.calibration.ece
    estimates = [("top-1", metrics.top1)]
    estimates += [("top-5", metrics.top5)] if metrics.top5 is not None else []
    estimates += [(f"level {name}", value) for name, value in [*metrics.levels.items()][:-1]]  # the finest is top-1
    return [
        *(KeyFigure(name, percent(value.value), interval(value.low, value.high)) for name, value in estimates),
        KeyFigure("macro F1", percent(per_class.macro(per_class.f1)), "mean over classes"),
        KeyFigure("mean recall of classes", percent(per_class.macro(per_class.recall)), "balanced accuracy"),
        KeyFigure("calibration error", f"{ece.value:.3f}", f"ECE; {ece.low:.3f} to {ece.high:.3f}"),
    ]


def _comparison(ours: Evaluation, other: Evaluation, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return the differences between two models: a sentence, and a table."""

    def row(
        name: str, this_estimate: Estimate, other_estimate: Estimate, difference: Mapping[str, Any]
    ) -> tuple[str, ...]:
        low, high = difference["interval_95"]
        certain = "no" if low <= 0 <= high else "yes"
        points = f"{100 * difference['difference']:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
        return name, percent(this_estimate.value), percent(other_estimate.value), points, certain

    top1 = comparison["top1"]
    low, high = top1["interval_95"]
    if low <= 0 <= high:
        verdict = "The data do not show which model is better: the interval of the difference contains zero."
    else:
        better = "This model" if low > 0 else "The other model"
        verdict = f"{better} is better: top-1 differs by {abs(100 * top1['difference']):.2f} points."
    rows = [row("top-1", ours.metrics.top1, other.metrics.top1, top1)]
    for name, difference in comparison["levels"].items():
        rows.append(row(name, ours.metrics.levels[name], other.metrics.levels[name], difference))
    head = ["figure", "#this model", "#other model", "#difference", "interval excludes zero"]
    return {
        "title": f"Against {short(other.model.name)}",
        "lead": f"{verdict} On the same images, {comparison['only_first_right']:,} are right only with this model and "
        f"{comparison['only_second_right']:,} only with the other one.",
        "table": Table.of("differences between the models", head, rows),
    }


def _answers(ours: Evaluation) -> Table | None:
    rows = []
    for record in reversed(ours.answers()):
        accuracy = np.nan if record["accuracy"] is None else record["accuracy"]
        low, high = record["accuracy_interval_95"] or (np.nan, np.nan)
        rows.append((
            record["level"] or "no answer", percent(record["share"]), percent_with_interval(accuracy, low, high),
        ))  # fmt: skip
    return Table.of("answers by level", ["level of the answer", "#of the images", "#right"], rows) if rows else None


def _classes(ours: Evaluation) -> Table:
    """Return a table of the classes that have images, the lowest F1 first."""
    per_class, labels = ours.metrics.per_class, ours.model.labels
    used = np.flatnonzero(per_class.support)
    order = used[np.argsort(per_class.f1[used], kind="stable")]
    precision, recall = per_class.precision_interval, per_class.recall_interval
    rows = [
        (
            labels[number],
            percent(float(per_class.f1[number])),
            percent_with_interval(float(per_class.precision[number]), *precision[number].tolist()),
            percent_with_interval(float(per_class.recall[number]), *recall[number].tolist()),
            int(per_class.support[number]),
            int(per_class.predicted[number]),
        )
        for number in order[:MAX_ROWS]
    ]
    head = ["class", "#F1", "#precision", "#recall", "#images", "#predicted"]
    return Table.of("classes", head, rows, total=len(order))

"""Values: the page of a training run: one HTML file without scripts, with its figures in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from imgbatch.evaluation.metrics import Confusion
from imgbatch.evaluation.scores import Metrics
from imgbatch.report import figures
from imgbatch.report.confused_classes import MAX_DRAWN, confused_pairs
from imgbatch.report.html import document, table
from imgbatch.sources.split_words import SPLIT_NAMES

_PROPORTIONS = (("top-1", "top1"), ("top-5", "top5"))


def page(facts: Mapping[str, Any], labels: Sequence[str], metrics: Metrics | None) -> str:
    """Return the page of a training run.

    Args:
        facts: the content of `training.json`.
        metrics: of the held-out images; None: no image was held out.
    """
    parts = [
        f"<h1>Training, {escape(facts['way'])}, from {escape(facts['base']['name'])}</h1>",
        f"<p>{facts['images']:,} images of {len(labels):,} classes, {facts['data']['rejected']:,} more could not be read. "
        f"{_held_out(facts)}</p>",
        _headline(facts),
    ]
    if facts["curve"]:
        parts += ["<h2>Learning curve</h2>", figures.learning(facts["curve"])]
    if metrics is not None:
        curves = {"after temperature": metrics.calibration}
        if metrics.calibration_before is not None:
            curves["before"] = metrics.calibration_before
        parts += ["<h2>Calibration: are scores probabilities?</h2>", figures.reliability(curves)]
        parts += ["<h2>Confused classes</h2>", _confusion(labels, metrics.confusion)]
    parts += ["<h2>Classes and splits</h2>", *_classes(facts["data"])]
    return document("Training", parts)


def _classes(data: Mapping[str, Any]) -> list[str]:
    """Return tables of the images of each class and split, and of where labels and splits come from."""
    by_split = data["classes_by_split"]
    used = [name for name in SPLIT_NAMES if any(name in counts for counts in by_split.values())]
    rows = [(name, *(counts.get(split, 0) for split in used)) for name, counts in by_split.items()]
    origins = [(source["uri"], source["labels"], source["splits"]) for source in data["sources"]]
    parts = [table(["input", "labels from", "splits from"], origins), table(["class", *(f"#{n}" for n in used)], rows)]
    if data["unlabelled"]:
        parts.append(
            f"<p>{data['unlabelled']:,} images have no label, such as {escape(data['unlabelled_example'])}.</p>"
        )
    return parts


def _held_out(facts: Mapping[str, Any]) -> str:
    text = f"All figures are of {facts['metrics']['n']:,} images that were held out"
    if facts["config"]["train"]["refit"]:
        return f"{text}; the final model was then trained on these as well, and labels them better than new images."
    return f"{text}; the model was not trained on them."


def _headline(facts: Mapping[str, Any]) -> str:
    metrics = facts["metrics"]
    if not metrics["n"]:
        return "<p>No image was held out.</p>"

    def proportion(value: float, interval: Sequence[float]) -> str:
        low, high = interval
        return f"{value:.1%} ({low:.1%} to {high:.1%})"

    rows = [(title, proportion(metrics[name], metrics[f"{name}_interval"])) for title, name in _PROPORTIONS]
    levels = [*metrics["levels"].items()][:-1]
    rows += [(f"level {name}", proportion(value, metrics["levels_interval"][name])) for name, value in levels]
    rows += [
        ("calibration error (ECE)", f"{metrics['ece']:.3f}"),
        ("the same before temperature", f"{metrics['ece_before_temperature']:.3f}"),
        ("temperature", f"{facts['temperature']:.3f}"),
    ]
    note = "In parentheses: 95 % intervals of proportions (Wilson's score intervals)."
    return f'{table(["figure", "value"], rows)}<p class="note">{note}</p>'


def _confusion(labels: Sequence[str], confusion: Confusion) -> str:
    drawn = figures.confusion(confusion.matrix(), labels) if len(labels) <= MAX_DRAWN else ""
    return f'<div class="side">{drawn}{confused_pairs(labels, confusion)}</div>'

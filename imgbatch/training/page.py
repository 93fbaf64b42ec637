"""Values: the page of a training run: one HTML file without scripts, with its figures in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.evaluation.calibration import softmax
from imgbatch.evaluation.metrics import Confusion, calibration
from imgbatch.report import figures
from imgbatch.report.html import document, table
from imgbatch.sources.split_words import SPLIT_NAMES

_MOST_DRAWN = 100  # classes of a confusion matrix that can still be read
_PAIRS = 20
_PROPORTIONS = (("top-1", "top1"), ("top-5", "top5"))

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


def page(facts: Mapping[str, Any], labels: Sequence[str], truths: Ints, unseen: Floats, temperature: float) -> str:
    """Return the page.

    Args:
        facts: what `training.json` holds.
        truths: the classes of the held-out images.
        unseen: their logits from networks that had not seen them, not calibrated.
    """
    parts = [
        f"<h1>Training, {escape(facts['way'])}, from {escape(facts['base']['name'])}</h1>",
        f"<p>{facts['images']:,} images of {len(labels):,} classes, {facts['data']['rejected']:,} more could not be read. "
        f"{_what_was_seen(facts)}</p>",
        _headline(facts),
    ]
    if facts["curve"]:
        parts += ["<h2>How it was learned</h2>", figures.learning(facts["curve"])]
    if len(truths):
        scores, raw = softmax(unseen / temperature), softmax(unseen)
        right = scores.argmax(1) == truths
        curves = {
            name: calibration(each.max(1), right) for name, each in (("after temperature", scores), ("before", raw))
        }
        parts += ["<h2>Are scores probabilities?</h2>", figures.reliability(curves)]
        parts += ["<h2>What is taken for what</h2>", _confusion(labels, truths, scores.argmax(1))]
    parts += ["<h2>Classes and splits</h2>", *_classes(facts["data"])]
    return document("Training", parts)


def _classes(data: Mapping[str, Any]) -> list[str]:
    """Return the images of each class and split, and where labels and splits come from."""
    by_split = data["classes_by_split"]
    used = [name for name in SPLIT_NAMES if any(name in counts for counts in by_split.values())]
    rows = [(name, *(counts.get(split, 0) for split in used)) for name, counts in by_split.items()]
    origins = [(each["uri"], each["labels"], each["splits"]) for each in data["sources"]]
    parts = [table(["input", "labels from", "splits from"], origins), table(["class", *(f"#{n}" for n in used)], rows)]
    if data["unlabelled"]:
        parts.append(
            f"<p>{data['unlabelled']:,} images have no label, such as {escape(data['unlabelled_example'])}.</p>"
        )
    return parts


def _what_was_seen(facts: Mapping[str, Any]) -> str:
    held = f"All figures are of {facts['metrics']['n']:,} images that were held out"
    if facts["config"]["train"]["refit"]:
        return f"{held}; the model itself was then trained on them as well, and says more about them than about others."
    return f"{held}; the model has not learned from them."


def _headline(facts: Mapping[str, Any]) -> str:
    found = facts["metrics"]
    if not found["n"]:
        return "<p>No image was held out.</p>"

    def proportion(value: float, interval: Sequence[float]) -> str:
        low, high = interval
        return f"{value:.1%} ({low:.1%} to {high:.1%})"

    rows = [(shown, proportion(found[name], found[f"{name}_interval"])) for shown, name in _PROPORTIONS]
    levels = [*found["levels"].items()][:-1]
    rows += [(f"level {name}", proportion(value, found["levels_interval"][name])) for name, value in levels]
    rows += [
        ("calibration error (ECE)", f"{found['ece']:.3f}"),
        ("the same before temperature", f"{found['ece_before_temperature']:.3f}"),
        ("temperature", f"{facts['temperature']:.3f}"),
    ]
    note = "In parentheses: 95 % intervals of proportions (Wilson's score intervals)."
    return f'{table(["figure", "value"], rows)}<p class="note">{note}</p>'


def _confusion(labels: Sequence[str], truths: Ints, said: Ints) -> str:
    found = Confusion.of(truths, said, len(labels))
    wrong = found.mistakes()
    pairs = [
        (labels[truth], labels[other], int(count))
        for truth, other, count in zip(
            wrong.truth[:_PAIRS], wrong.predicted[:_PAIRS], wrong.count[:_PAIRS], strict=True
        )
    ]
    drawn = figures.confusion(found.matrix(), labels) if len(labels) <= _MOST_DRAWN else ""
    return f'<div class="side">{drawn}{table(["true", "said", "#images"], pairs) if pairs else "<p>All are right.</p>"}</div>'

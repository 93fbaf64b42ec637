"""Pages for the tests: those of a small training and its evaluation, and pages of generated predictions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from imgbatch.evaluation.evaluation import Evaluation
from imgbatch.evaluation.examples import examples
from imgbatch.evaluation.scores import Metrics, Scores
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.report import figures
from imgbatch.report.evaluation import page
from imgbatch.report.page import environment, render
from imgbatch.report.parts import Card, Command, KeyFigure, Notice, Picture, Shown, Table, Verdict
from imgbatch.training import page as training_page
from imgbatch.training.held_out import HeldOut
from imgbatch.training.near_duplicates import near_duplicates
from imgbatch.training.splits import ALWAYS
from imgbatch.training.strategies import Trained
from tests.conftest import ROOT, clean_environment, write_model
from tests.unit.pictures import encode, scene

SCRIPT = "<script>document.title = 'run'</script>"
MODEL = "<img src=x onerror=alert(1)>"
HOSTILE = (
    SCRIPT,
    "\"'><img src=x onerror=\"document.title = 'run'\">",
    "تفاح أخضر",
    "x" * 300,
    "long label " * 27,
    "${7*7} {{ 7*7 }}",
    *(f"class {number}" for number in range(20)),
)
"""Labels with markup, in Arabic, and of 300 characters with and without spaces."""


def of_jobs(place: Path) -> dict[str, str]:
    """Train a model on generated pictures, and evaluate it; return both pages."""
    base = write_model(place / "base", seed=0)
    for number, name in enumerate(("blue", "green", "red")):
        (place / "data" / name).mkdir(parents=True)
        for image in range(10):
            pixels = scene(96, 64, seed=100 * number + image)
            pixels[..., number] = 255 if image % 3 else 90
            (place / "data" / name / f"{image:02d}.jpg").write_bytes(encode(pixels, "JPEG"))
    _run("train", "--input", place / "data", "--output", place / "model", "--base", base)
    _run("evaluate", "--input", place / "data", "--output", place / "evaluation", "--model", place / "model")
    return {
        "training": (place / "model" / "training.html").read_text(encoding="utf-8"),
        "evaluation": (place / "evaluation" / "evaluation.html").read_text(encoding="utf-8"),
    }


def _run(job: str, *arguments: object) -> None:
    command = [sys.executable, f"jobs/{job}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean_environment(), timeout=240)
    assert done.returncode == 0, done.stderr


def predictions(labels: Sequence[str], n: int) -> Scores:
    """Return predictions of which some are wrong: neighbouring classes are confused."""
    draw = np.random.default_rng(0)
    truth = draw.integers(0, len(labels), n)
    logits = draw.normal(0, 1, (n, len(labels))).astype(np.float32)
    logits[np.arange(n), truth] += 4
    logits[np.arange(n), truth ^ 1 if len(labels) % 2 == 0 else truth] += draw.random(n) * 4
    return Scores.from_logits(logits, 1.3, truth, None)


def evaluation(labels: Sequence[str], n: int) -> str:
    """Return the page of an evaluation of n images."""
    return evaluation_of(predictions(labels, n), labels)


def evaluation_of(scores: Scores, labels: Sequence[str]) -> str:
    """Return the page of an evaluation."""
    n = len(scores.truth)
    model = Model(
        name=f"s3://bucket/{MODEL}", digest="0" * 64, labels=tuple(labels), network=list,
        preprocess=Preprocess(height=8, width=8, resize=(8,)),
    )  # fmt: skip
    metrics = Metrics.of(scores)
    ours = Evaluation(
        model=model, temperature=1.3, scores=scores, metrics=metrics, answer_level=np.full(n, -1, np.int8), seen=None,
        unseen=None, unseen_images=0,
    )  # fmt: skip
    chosen = examples(scores, metrics.confusion)
    return page(ours, None, None, chosen, _shown(chosen.images.tolist()))


def training(labels: Sequence[str], n: int) -> str:
    """Return the page of a training run."""
    scores = predictions(labels, n)
    held_out = HeldOut.of(scores)
    features = np.random.default_rng(1).normal(0, 1, (2 * n, 64)).astype(np.float32)
    features[:3] = features[n : n + 3]
    found = near_duplicates(features, np.array([0] * n + [ALWAYS] * n))
    numbers = np.arange(n)
    uris = pa.chunked_array([[f"s3://bucket/{SCRIPT}/{number}.jpg" for number in range(2 * n)]])
    curve = [{"l2": l2, "held_out_loss": 1 + l2, "held_out_accuracy": 0.7 - l2} for l2 in (0.1, 0.03, 0.01)]
    trained = Trained(
        net=None, temperature=1.3, held_out=numbers, unseen=np.zeros((n, len(labels)), np.float32),
        final=np.zeros((n, len(labels)), np.float32), learned=numbers + n, curve=curve, facts={}, near_duplicates=found,
    )  # fmt: skip
    metrics = held_out.metrics
    interval = [metrics.top1.low, metrics.top1.high]
    facts = {
        "config": {"output": f"s3://bucket/{MODEL}", "train": {"refit": True}},
        "base": {"name": SCRIPT, "digest": "0" * 64},
        "way": "head", "seed": 0, "temperature": 1.3, "images": n, "curve": curve,
        "near_duplicates": found.public(uris),
        "data": {
            "rejected": 3, "unlabelled": 2, "unlabelled_example": SCRIPT,
            "classes_by_split": {label: {"train": 10 + number, "val": 5} for number, label in enumerate(labels)},
            "sources": [{"uri": SCRIPT, "labels": "folders", "splits": "folders"}],
        },
        "metrics": {
            "n": n, "top1": metrics.top1.value, "top1_interval": interval, "top5": None, "top5_interval": None,
            "levels": {}, "levels_interval": {}, "ece": 0.1, "ece_before_temperature": 0.2,
        },
    }  # fmt: skip
    images = _shown([*range(n + 3)])
    return training_page.page(facts, labels, held_out, trained, images)


def _shown(numbers: Sequence[int]) -> dict[int, Shown]:
    """Return a picture for each image; one of seven cannot be shown."""
    pictures = [Picture(webp=encode(scene(60, 40, seed=number), "WEBP")) for number in range(6)]
    pictures.append(Picture(reason="vanished"))
    return {number: Shown(f"s3://bucket/{SCRIPT}/{number}.jpg", pictures[number % 7]) for number in numbers}


COMPONENTS = """
{% extends "page.html" %}
{% set anchors = [("classes", "Classes")] %}
{% block main %}
{% for each in verdicts %}{{ parts.verdict(each) }}{% endfor %}
{{ parts.notices(notices) }}
{% call parts.section("classes", "Classes", "A lead.") %}
{{ parts.key_figures(key_figures) }}
{{ parts.figure(figure) }}
{{ parts.cards(cards) }}
{{ parts.table(table, is_filtered=True) }}
{{ parts.commands(commands) }}
{% endcall %}
{% endblock %}
"""


def components() -> str:
    """Return a page of the components that a page may use, in all of their states."""
    images = _shown([*range(7)])
    thumbnails = tuple(images[number].thumbnail(SCRIPT, MODEL, command=f"explain '{SCRIPT}'") for number in images)
    return render(
        environment().from_string(COMPONENTS),
        title="Components", kind="Components", heading="Components", verdict=Verdict("No state."),
        verdicts=[
            Verdict(SCRIPT, "good", "succeeded"), Verdict("Look.", "warning", "held back", (SCRIPT, "Do this.")),
            Verdict("Nothing was written.", "bad", "failed", ("Do that.",)),
        ],
        notices=[Notice("A note.", SCRIPT), Notice("A warning.", SCRIPT, is_warning=True)],
        figure=figures.classes_by_f1(np.linspace(0, 1, 60)),
        key_figures=[KeyFigure("images", "5,000", "4,990 yesterday"), KeyFigure(SCRIPT, "1")],
        cards=[Card("A card", "With pictures.", thumbnails[:3]), Card("Without", SCRIPT), Card("", "", thumbnails[3:])],
        table=Table.of("classes", ["class", "#F1"], [(f"class {number}", f"{number}%") for number in range(60)]),
        commands=[Command("Explain an image", "imgbatch explain OUTPUT " + "x" * 200), Command("Run again", SCRIPT)],
    )  # fmt: skip


GENERATED = {
    "components": components,
    "hostile evaluation": lambda: evaluation(HOSTILE, 400),
    "hostile training": lambda: training(HOSTILE, 400),
    "large evaluation": lambda: evaluation([f"class number {number}" for number in range(1_000)], 20_000),
}
"""Functions that return pages of generated predictions, by their names."""

"""The parts of pages: what is chosen, what is said of it, and what happens with many classes and long names."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from imgbatch.config.results import ReportConfig
from imgbatch.config.sections import Config, StorageConfig
from imgbatch.evaluation import metrics
from imgbatch.evaluation.examples import Pair, examples, pairs_of
from imgbatch.evaluation.metrics import Confusion
from imgbatch.evaluation.scores import Metrics, Scores
from imgbatch.report import figures
from imgbatch.report.confused_classes import ConfusedClasses
from imgbatch.report.data_problems import DoubtfulLabels, SmallClasses
from imgbatch.report.page import render
from imgbatch.report.parts import MAX_ROWS, Picture, Shown, Table
from imgbatch.report.pictures import of_listing
from imgbatch.report.svg import Axis
from imgbatch.schema import LISTING
from imgbatch.sources.recognise import recognise
from imgbatch.storage.stores import Stores
from imgbatch.training.near_duplicates import THRESHOLD, near_duplicates
from imgbatch.training.splits import ALWAYS
from tests.browser import pages

LABELS = ("Apple", "Pear", "Plum")
TEMPLATES = Path(figures.__file__).parent / "templates"


def scores_of(truth: list[int], label: list[int], score: list[float], classes: int = 3) -> Scores:
    """Return predictions of images of known classes."""
    scores = Scores.unknown(np.array(truth), classes, (), scaled=False)
    scores.label, scores.score = np.array(label), np.array(score, np.float32)
    scores.max_candidates = 1
    return scores


def images_of(numbers: list[int]) -> dict[int, Shown]:
    return {number: Shown(f"s3://b/{number}.jpg", Picture(webp=b"RIFF")) for number in numbers}


def test_pairs_and_errors_are_those_with_the_most_images_and_the_highest_scores() -> None:
    scores = scores_of([0, 0, 0, 1, 1, 1, 2, 2], [1, 1, 0, 0, 1, 1, 2, 0], [0.6, 0.9, 0.8, 0.7, 0.95, 0.5, 0.4, 0.99])
    chosen = examples(scores, Confusion.of(scores.truth, scores.label, 3))
    first, second = chosen.pairs
    assert first.pair == Pair(0, 1, 2, 1) and (first.first, first.confused, first.second) == (2, 1, 4)
    assert second.pair == Pair(0, 2, 0, 1) and (second.first, second.confused, second.second) == (2, 7, 6)
    assert chosen.errors.tolist() == [7, 1, 3, 0]
    # Right labels as Apple have a mean score of 0.8, as Pear of 0.725.
    assert chosen.doubtful.images.tolist() == [7, 1] and not chosen.doubtful.swapped[1:]
    assert chosen.images.tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_classes_of_which_most_images_have_each_other_s_label_look_swapped() -> None:
    truth, label = [0] * 5 + [1] * 5 + [2] * 5, [1, 1, 1, 0, 0] + [0, 0, 0, 1, 2] + [2] * 5
    scores = scores_of(truth, label, [0.9] * 15)
    chosen = examples(scores, Confusion.of(scores.truth, scores.label, 3))
    assert chosen.doubtful.swapped == (Pair(0, 1, 3, 3),)
    found = DoubtfulLabels.of(LABELS, scores, chosen, images_of(chosen.images.tolist()))
    assert found.swapped is not None and found.swapped.rows == (("Apple", "Pear", "3", "3"),)
    assert found.text.startswith("7 of 15 images have a given label that may be wrong")


def test_predictions_without_a_mistake_have_no_pair_and_a_matrix() -> None:
    scores = scores_of([0, 1, 2], [0, 1, 2], [0.9, 0.8, 0.7])
    confusion = Confusion.of(scores.truth, scores.label, 3)
    chosen = examples(scores, confusion)
    assert not chosen.pairs and not len(chosen.images)
    confused = ConfusedClasses.of(LABELS, scores, confusion, chosen, {})
    assert confused.lead == "All labels are right." and confused.matrix is not None


def test_a_class_without_a_right_label_shows_another_image_or_a_placeholder() -> None:
    scores = scores_of([0, 0, 1, 2], [1, 1, 1, 1], [0.9, 0.8, 0.7, 0.6])
    confusion = Confusion.of(scores.truth, scores.label, 3)
    chosen = examples(scores, confusion)
    first, second = ConfusedClasses.of(LABELS, scores, confusion, chosen, images_of(chosen.images.tolist())).pairs
    assert [each.title for each in first.thumbnails] == ["Apple", "Confused", "Pear"]
    assert [each.uri for each in first.thumbnails] == ["s3://b/1.jpg", "s3://b/0.jpg", "s3://b/2.jpg"]
    assert [each.lines[-1] for each in first.thumbnails] == [
        "labelled Pear 0.80", "labelled Pear 0.90", "labelled right 0.70",
    ]  # fmt: skip
    assert first.text == "2 of 2 “Apple” are labelled “Pear”."
    assert [each.title for each in second.thumbnails] == ["Pear", "Confused", "Plum"]
    assert second.thumbnails[2].reason == "no other image of this class" and second.thumbnails[1].source


def test_pairs_of_a_thousand_classes_are_counted_in_both_directions() -> None:
    draw = np.random.default_rng(0)
    truth, label = draw.integers(0, 1_000, (2, 50_000))
    confusion = Confusion.of(truth, label, 1_000)
    pairs = pairs_of(confusion)
    assert sum(pair.count for pair in pairs) == np.count_nonzero(truth != label)
    matrix = confusion.matrix()
    for pair in (pairs[0], pairs[-1]):
        assert pair.first_as_second == matrix[pair.first, pair.second]
        assert pair.second_as_first == matrix[pair.second, pair.first]
    assert [pair.count for pair in pairs] == sorted((pair.count for pair in pairs), reverse=True)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (0.95, "The mean score is 95.0%, the accuracy 70.0%: the model is overconfident, its scores are too high."),
        (0.3, "the model is underconfident, its scores are too low."),
        (0.7, "on average, scores are neither too high nor too low."),
    ],
)
def test_the_caption_of_the_reliability_says_what_to_conclude(score: float, words: str) -> None:
    right = np.arange(200) < 140
    curve = metrics.calibration(np.full(200, score), right)
    figure = figures.reliability({"scores": curve}, metrics.proportion(right))
    assert figure.conclusion.endswith(words)
    assert figure.table is not None and figure.table.rows[0][2] == "200"


def test_the_caption_of_the_coverage_names_the_minimum_score_of_the_wanted_accuracy() -> None:
    score = np.linspace(0, 1, 1_001)
    curve = metrics.coverage(score, score > 0.4)
    conclusion = figures.coverage({"model": curve}).conclusion
    assert "50.0% of the images have a score of 0.5 or more, and 100.0% of these labels are right." in conclusion
    assert "A minimum score of 0.37 gives an accuracy of 95% or more; 63.0% of the images reach it." in conclusion
    poor = metrics.coverage(score, np.zeros(1_001, bool))
    assert "No minimum score reaches an accuracy of 95%." in figures.coverage({"model": poor}).conclusion


def test_the_captions_of_the_learning_curve_name_the_best_point() -> None:
    epochs = [
        {"loss": 2.0, "accuracy": 0.3, "held_out_loss": 1.5, "held_out_accuracy": 0.5},
        {"loss": 0.5, "accuracy": 0.9, "held_out_loss": 0.9, "held_out_accuracy": 0.7},
        {"loss": 0.1, "accuracy": 1.0, "held_out_loss": 1.1, "held_out_accuracy": 0.75},
    ]
    loss, accuracy = figures.learning(epochs)
    assert loss.conclusion == "The best loss on held-out images is 0.900, at epoch 2."
    assert 'aria-label="The loss by epoch.' in loss.svg
    assert accuracy.conclusion.endswith("at epoch 3, the last one: more epochs might improve it further.")
    (loss,) = figures.learning([{"loss": 1.0}, {"loss": 0.5}])
    assert loss.conclusion == "At epoch 2 the loss on training images is 0.500. No image was held out."


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (
            [0.94, 0.92, 0.93],
            "An L2 of 0.01 is selected: it has the lowest loss on held-out images, 0.920. The strength",
        ),
        ([1.3, 0.92, 1.2], "An L2 of 0.01 is selected: it has the lowest loss on held-out images, 0.920."),
        ([0.9, 0.92, 0.93], "0.900. It is the strongest that was tried: a higher train.l2 might be better."),
        ([0.94, 0.92, 0.5], "0.500. It is the weakest that was tried: a lower train.l2 might be better."),
        ([0.94], "The L2 of 0.1 was given; the loss on held-out images is 0.940."),
    ],
)
def test_the_captions_of_strengths_of_l2_say_which_is_selected(losses: list[float], words: str) -> None:
    curve = [
        {"l2": l2, "held_out_loss": loss, "held_out_accuracy": 1 - l2}
        for l2, loss in zip((0.1, 0.01, 0.001), losses, strict=False)
    ]
    loss, accuracy = figures.learning(curve)
    assert words in loss.conclusion
    selected = min(curve, key=lambda point: point["held_out_loss"])
    assert (
        f"With the selected L2, {selected['l2']:g}, {selected['held_out_accuracy']:.1%} of the" in accuracy.conclusion
    )
    assert ("the best is" in accuracy.conclusion) == (selected is not curve[-1])


def all_figures(names: list[str]) -> list[figures.Figure]:
    """Return a figure of each kind."""
    scores = pages.predictions(names, 300)
    computed = Metrics.of(scores)
    chosen = examples(scores, computed.confusion)
    confused = ConfusedClasses.of(names, scores, computed.confusion, chosen, images_of(chosen.images.tolist()))
    assert confused.matrix is not None
    curve = [{"l2": l2, "held_out_loss": 1.0, "held_out_accuracy": 0.5} for l2 in (0.1, 0.01)]
    return [
        figures.reliability({names[0]: computed.calibration}, computed.top1),
        figures.coverage({names[0]: computed.coverage, names[1]: computed.coverage}),
        figures.classes_by_f1(computed.per_class.f1),
        *figures.learning(curve),
        *confused.figures,
        confused.matrix,
    ]


def test_figures_are_svg_with_a_text_and_no_script() -> None:
    for figure in all_figures(list(pages.HOSTILE)):
        drawing = ElementTree.fromstring(figure.svg)
        assert drawing.get("role") == "img" and drawing.get("aria-label")
        assert {each.tag for each in drawing.iter()} <= {"svg", "polyline", "polygon", "rect", "circle", "text"}
        width, height = (float(value) for value in (drawing.get("viewBox") or "").split()[2:])
        for mark in drawing.iter("circle"):
            assert 0 <= float(mark.get("cx", -1)) <= width and 0 <= float(mark.get("cy", -1)) <= height
        assert figure.table is not None and figure.table.rows


@pytest.mark.parametrize("highest", [1, 3, 7, 10, 29, 95, 1_000, 123_456])
def test_an_axis_of_counts_ends_at_a_round_number_above_the_highest(highest: int) -> None:
    axis = Axis.of_counts("images", highest)
    values = [value for value, _ in axis.ticks]
    assert highest <= axis.high <= 3 * highest + 1 and 2 <= len(values) <= 5
    assert all(float(value).is_integer() for value in values) and axis.fraction(axis.high) == 1


def test_near_duplicates_are_found_between_folds_and_not_within_one() -> None:
    draw = np.random.default_rng(0)
    features = np.abs(draw.normal(0, 1, (9_000, 32))).astype(np.float32) ** 4
    fold = np.full(len(features), ALWAYS)
    fold[:100], fold[100:200] = 0, 1
    features[3] = features[8_500] * 7  # of a training image, in another block
    features[4] = features[5]  # of the same fold
    features[6] = features[150]  # of another fold
    expected = {(3, 8_500), (6, 150), (150, 6)}
    found = near_duplicates(features, fold)
    assert found.compared == 200 and (found.similarity >= THRESHOLD).all()
    assert expected <= set(zip(found.held_out.tolist(), found.trained.tolist(), strict=True))
    assert not {(4, 5), (5, 4)} & set(zip(found.held_out.tolist(), found.trained.tolist(), strict=True))
    by_hand = features / np.linalg.norm(features, axis=1, keepdims=True)
    products = by_hand[:100] @ by_hand[100:].T
    of_first = found.held_out < 100
    assert set(found.held_out[of_first].tolist()) == set(np.flatnonzero(products.max(1) >= THRESHOLD).tolist())
    assert near_duplicates(features[:5], np.full(5, ALWAYS)).compared == 0


def test_small_classes_are_listed_the_smallest_first() -> None:
    found = SmallClasses.of([("Apple", 12), ("Pear", 3), ("Plum", 0)], "images", "their figures are uncertain", few=10)
    assert found.table is not None and found.table.rows == (("Plum", "0"), ("Pear", "3"))
    assert found.text == "2 of 3 classes have fewer than 10 images: their figures are uncertain."
    assert SmallClasses.of([("Apple", 12)], "images", "their figures are uncertain", few=10).table is None


def test_a_long_table_and_long_names_are_cut() -> None:
    table = Table.of("classes", ["class", "#images"], [("x" * 300, n) for n in range(MAX_ROWS + 5)])
    assert len(table.rows) == MAX_ROWS and table.total == MAX_ROWS + 5
    assert len(table.rows[0][0]) == 90 and "…" in table.rows[0][0]


def test_the_script_is_small_and_nothing_is_loaded_or_handled_inline() -> None:
    assert len((TEMPLATES / "page.js").read_bytes()) <= 5_000
    for path in TEMPLATES.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "http" not in text.replace("http-equiv", "") and not re.search(r"\son[a-z]+=", text), path


def test_pages_of_twenty_thousand_classes_stay_below_a_megabyte() -> None:
    names = [f"<&\"'>{'ل' * 295}{number}" for number in range(20_000)]
    draw = np.random.default_rng(0)
    truth = draw.permutation(np.arange(40_000) % 20_000)
    label = np.where(draw.random(40_000) < 0.6, truth, draw.integers(0, 20_000, 40_000))
    scores = scores_of(truth.tolist(), label.tolist(), draw.random(40_000).tolist(), 20_000)
    assert len(pages.evaluation_of(scores, names).encode()) < 1_000_000


def test_every_component_escapes_names() -> None:
    text = pages.components()
    assert pages.SCRIPT not in text and pages.MODEL not in text
    assert text.count("&lt;script&gt;document.title") >= 10 and text.count("&lt;img src=x") >= 7
    assert 'class="verdict is-bad"' in text and "<strong>held back</strong>" in text


def test_a_page_must_get_all_values() -> None:
    with pytest.raises(Exception, match="is undefined"):
        render("evaluation.html", title="x")


def test_thumbnails_are_small_whatever_the_picture_and_say_why_there_is_none(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.fromarray(noise[:1, :1]).save(tmp_path / "pixel.png")
    (tmp_path / "text.png").write_text("text")
    Image.fromarray(noise).save(tmp_path / "zchanged.png")
    stores, config = Stores(StorageConfig()), Config()
    (source,) = recognise(stores, [str(tmp_path)], config.source)
    table = pa.Table.from_batches([each.batch for each in source.list_images()]).select(LISTING.names).sort_by("uri")
    Image.fromarray(noise[::2]).save(tmp_path / "zchanged.png")
    (tmp_path / "pixel.png").unlink()
    found = of_listing(stores, config, table)
    assert found is not None
    pictures = [found[uri] for uri in table["uri"].to_pylist()]
    assert [each.reason for each in pictures] == ["", "vanished", "not_an_image", "the image has changed"]
    content = pictures[0].webp
    assert content[:4] == b"RIFF" and len(content) < 15_000 and not pictures[1].webp
    assert max(Image.open(io.BytesIO(content)).size) == 192
    assert of_listing(stores, replace(config, report=ReportConfig(thumbnails=False)), table) is None

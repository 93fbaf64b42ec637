"""Effects: the page of a training run: one HTML file with its figures and a few pictures of held-out images in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config.training import Training
from imgbatch.ledger.listing_pages import Pages
from imgbatch.report import figures
from imgbatch.report.confused_classes import ConfusedClasses, confident_errors, worst_pair
from imgbatch.report.data_problems import DoubtfulLabels, SmallClasses
from imgbatch.report.page import render
from imgbatch.report.parts import (
    Card,
    Figure,
    KeyFigure,
    Notice,
    Picture,
    Shown,
    Table,
    Verdict,
    interval,
    percent,
    percent_with_interval,
    short,
    shown,
)
from imgbatch.report.pictures import of_listing
from imgbatch.sources.split_words import SPLIT_NAMES
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal.plurals import counted, plural
from imgbatch.training.held_out import HeldOut
from imgbatch.training.near_duplicates import NearDuplicates

if TYPE_CHECKING:
    from imgbatch.training.strategies import Trained

_DUPLICATES = 6
"""Maximum number of pairs of near duplicates with pictures."""
_FEW = 20

Images = Mapping[int, Shown]
"""Images by their numbers: rows of the prepared images."""


def images_of(
    stores: Stores, config: Training, listing: Folder, prepared: pa.Table, trained: Trained, held_out: HeldOut | None
) -> Images:
    """Return the images that the page shows; each is fetched again and reduced.

    Args:
        listing: the folder of the listing's pages.
        prepared: the images of the training run, of which the numbers are rows.
    """
    numbers: list[npt.NDArray[np.integer[Any]]] = (
        [] if held_out is None else [trained.held_out[held_out.examples.images]]
    )
    if (found := trained.near_duplicates) is not None:
        numbers += [found.held_out[:_DUPLICATES], found.trained[:_DUPLICATES]]
    rows = np.unique(np.concatenate(numbers)) if numbers else np.zeros(0, np.int64)
    table = prepared.take(pa.array(rows))
    in_tar = np.asarray(pc.is_valid(table["offset"]))
    images: dict[int, Shown] = {}
    for number, uri in zip(rows[in_tar].tolist(), table["uri"].filter(pa.array(in_tar)).to_pylist(), strict=True):
        images[number] = Shown(uri, Picture(reason="a member of a tar") if config.report.thumbnails else None)
    if in_tar.all():
        return images
    listed = Pages(listing).rows(table["index"].to_numpy()[~in_tar])
    pictures = of_listing(stores, config.shared(), listed)
    return images | shown(rows[~in_tar].tolist(), listed["uri"].to_pylist(), pictures)


def page(
    facts: Mapping[str, Any], labels: Sequence[str], held_out: HeldOut | None, trained: Trained, images: Images
) -> str:
    """Return the page of a training run.

    Args:
        facts: the content of `training.json`.
        held_out: of the held-out images; None: no image was held out.
        images: from `images_of`.
    """
    name = facts["config"]["output"].rstrip("/").rpartition("/")[2]
    by_score = {number: images[row] for number, row in enumerate(trained.held_out.tolist()) if row in images}
    counts = [(label, count.get("train", 0)) for label, count in facts["data"]["classes_by_split"].items()]
    small = SmallClasses.of(counts, "images to train on", "they may be learned badly", _FEW)
    sections = _sections(labels, held_out, by_score) if held_out is not None else None
    return render(
        "training.html",
        title=f"Training of {name}",
        kind="Training",
        heading=short(name),
        verdict=Verdict(_verdict(facts, labels, held_out), to_do=tuple(_to_do(trained, sections, small))),
        facts=facts,
        notices=[_held_out_notice(facts)],
        key_figures=_key_figures(facts),
        learning=figures.learning(facts["curve"]) if facts["curve"] else [],
        held_out=sections,
        duplicates=_near_duplicates(facts, trained.near_duplicates, images),
        small=small,
        origins=_origins(facts["data"]),
        unlabelled=_count_of_images(facts["data"]["unlabelled"]),
        rejected=_count_of_images(facts["data"]["rejected"]),
        classes=_classes(facts["data"], labels, held_out),
        by_f1=_by_f1(held_out) if held_out is not None else None,
    )


def _count_of_images(count: int) -> str:
    return counted(count, "image") if count else ""


def _verdict(facts: Mapping[str, Any], labels: Sequence[str], held_out: HeldOut | None) -> str:
    trained_on = f"Trained on {counted(facts['images'], 'image')} of {counted(len(labels), 'class', 'classes')}."
    if held_out is None:
        return f"{trained_on} No image was held out, so the accuracy is not known."
    top1 = held_out.metrics.top1
    return (
        f"{trained_on} {percent(top1.value)} of {counted(held_out.metrics.n, 'held-out image')} are labelled right (95% "
        f"interval {interval(top1.low, top1.high)}).{worst_pair(labels, held_out.examples)}"
    )


def _to_do(trained: Trained, sections: Mapping[str, Any] | None, small: SmallClasses) -> Iterator[str]:
    """Yield what a reader should do about the data."""
    if sections is not None:
        yield from sections["doubtful"].to_do
    if trained.near_duplicates is not None and (count := len(trained.near_duplicates.held_out)):
        yield f"Keep near duplicates in one split: {counted(count, 'held-out image')} {plural(count, 'has', 'have')} one."
    if small.count:
        yield f"Add images of {counted(small.count, 'class', 'classes')} with fewer than {_FEW}."


def _held_out_notice(facts: Mapping[str, Any]) -> Notice:
    n = facts["metrics"]["n"]
    if not n:
        return Notice("No image was held out.", "Evaluate the model on images that it was not trained on.")
    title = f"All figures are of {counted(n, 'image')} that {plural(n, 'was', 'were')} held out."
    if facts["config"]["train"]["refit"]:
        return Notice(
            title, "The final model was then trained on these as well, and labels them better than new images."
        )
    return Notice(title, "The model was not trained on them. It was selected and calibrated on them.")


def _key_figures(facts: Mapping[str, Any]) -> list[KeyFigure]:
    metrics = facts["metrics"]
    method = KeyFigure("method", facts["way"], f"from {short(facts['base']['name'], 40)}")
    if not metrics["n"]:
        return [method]
    found = [KeyFigure("top-1", percent(metrics["top1"]), interval(*metrics["top1_interval"]))]
    if metrics["top5"] is not None:
        found.append(KeyFigure("top-5", percent(metrics["top5"]), interval(*metrics["top5_interval"])))
    for name, value in [*metrics["levels"].items()][:-1]:  # the finest level is top-1
        found.append(KeyFigure(f"level {name}", percent(value), interval(*metrics["levels_interval"][name])))
    before = f"{metrics['ece_before_temperature']:.3f} before temperature"
    return [
        *found,
        KeyFigure("calibration error", f"{metrics['ece']:.3f}", f"ECE; {before}"),
        KeyFigure("temperature", f"{facts['temperature']:.3f}", "folded into the weights"),
        method,
    ]


def _sections(labels: Sequence[str], held_out: HeldOut, images: Images) -> dict[str, Any]:
    """Return the parts that show the labels of the held-out images."""
    scores, metrics, examples = held_out.scores, held_out.metrics, held_out.examples
    curves = {"after temperature": metrics.calibration}
    if metrics.calibration_before is not None:
        curves["before"] = metrics.calibration_before
    return {
        "reliability": figures.reliability(curves, metrics.top1),
        "coverage": figures.coverage({"model": metrics.coverage}),
        "confused": ConfusedClasses.of(labels, scores, metrics.confusion, examples, images),
        "errors": confident_errors(labels, scores, examples, images),
        "number_of_errors": int(np.count_nonzero(~scores.right)),
        "doubtful": DoubtfulLabels.of(labels, scores, examples, images),
    }


def _by_f1(held_out: HeldOut) -> Figure:
    per_class = held_out.metrics.per_class
    return figures.classes_by_f1(per_class.f1[per_class.support > 0])


def _near_duplicates(facts: Mapping[str, Any], found: NearDuplicates | None, images: Images) -> dict[str, Any] | None:
    """Return what the page shows of near duplicates across splits; None: images were not compared."""
    if found is None or not found.compared:
        return None
    record = facts["near_duplicates"]
    count = record["found"]
    if count:
        text = (
            f"{count:,} of {counted(found.compared, 'held-out image')} {plural(count, 'is', 'are')} almost equal to a training "
            f"image (cosine similarity of their features of {record['threshold']:g} or more). Figures on such images are too "
            "good: keep pictures of one object in one split."
        )
    else:
        text = (
            f"None of {counted(found.compared, 'held-out image')} is almost equal to a training image (cosine similarity of "
            f"their features of {record['threshold']:g} or more)."
        )
    pairs: list[Card] = []
    for at in range(min(_DUPLICATES, count)):
        held_out, training = images[int(found.held_out[at])], images[int(found.trained[at])]
        similarity = f"similarity {found.similarity[at]:.3f}"
        both = held_out.thumbnail("Held out", similarity), training.thumbnail("Training", similarity)
        pairs.append(Card("", "", both))
    rows = [(pair["held_out"], pair["trained"], f"{pair['similarity']:.3f}") for pair in record["pairs"]]
    table = Table.of("near duplicates", ["held-out image", "training image", "#similarity"], rows, total=count)
    return {"text": text, "pairs": pairs, "table": table if count else None}


def _origins(data: Mapping[str, Any]) -> Table:
    rows = [(source["uri"], source["labels"], source["splits"]) for source in data["sources"]]
    return Table.of("where labels and splits come from", ["input", "labels from", "splits from"], rows)


def _classes(data: Mapping[str, Any], labels: Sequence[str], held_out: HeldOut | None) -> Table:
    """Return a table of the images of each class and split, with its figures on held-out images: the lowest F1 first."""
    by_split = data["classes_by_split"]
    used = [name for name in SPLIT_NAMES if any(name in counts for counts in by_split.values())]
    head = ["class", *(f"#{name}" for name in used)]
    rows: list[tuple[str | int, ...]] = [
        (name, *(counts.get(split, 0) for split in used)) for name, counts in by_split.items()
    ]
    if held_out is None:
        return Table.of("classes", head, rows)
    per_class = held_out.metrics.per_class
    number_of = {label: number for number, label in enumerate(labels)}
    f1 = np.append(np.where(per_class.support > 0, per_class.f1, np.nan), np.nan)  # the last: of classes not learned
    numbers = np.array([number_of.get(str(row[0]), -1) for row in rows], np.int64)

    def proportion(values: npt.NDArray[np.floating[Any]], ends: npt.NDArray[np.floating[Any]], number: int) -> str:
        return "–" if number < 0 else percent_with_interval(float(values[number]), *ends[number].tolist())

    precision, recall = per_class.precision_interval, per_class.recall_interval
    shown_rows = [
        (
            *rows[at],
            percent(float(f1[numbers[at]])),
            proportion(per_class.precision, precision, int(numbers[at])),
            proportion(per_class.recall, recall, int(numbers[at])),
        )
        for at in np.argsort(f1[numbers], kind="stable").tolist()
    ]
    return Table.of("classes", [*head, "#F1", "#precision", "#recall"], shown_rows)

"""Effects: the canary on the driver: its images and their classes, checked before any work, and the end of a run that fails it.

Only names and labels are read here. Workers read and label the images: `inference/canary.py`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.concurrency.monitor import tick
from imgbatch.config.secrets import masked
from imgbatch.config.sections import Config, SourceConfig
from imgbatch.config.worker import ReadOptions
from imgbatch.errors import GuardError, InputError
from imgbatch.evaluation.classes import Classes
from imgbatch.evaluation.labelled_inputs import Relisted, Resolver, relisted
from imgbatch.inference.canary import CLASSES, Canary
from imgbatch.ledger.listing_pages import page_name
from imgbatch.models.model import Model
from imgbatch.schema import LISTING, single_chunk
from imgbatch.sources import recognise, tars
from imgbatch.sources.base import is_stream
from imgbatch.sources.labelled import TRUTH
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal import console

MAX_IMAGES = 2_000
"""The maximum number of images: each node labels all of them before its first image."""


def prepare_canary(stores: Stores, config: Config, model: Model, folder: Folder | None) -> Canary | None:
    """Return the canary of a run, None without `guard.canary`. Its listing and classes are written for the workers.

    Args:
        stores: of the run.
        config: of the run. Of `source.*`, the options about labels apply; the form of the canary is recognised.
        model: which must have all of its classes.
        folder: where they are written; None: they are only checked.

    Raises:
        InputError: the model lacks a class, an image has none, or the canary is empty, too large or ambiguous.
    """
    uri, min_accuracy = config.guard.canary, config.guard.canary_accuracy
    if uri is None or min_accuracy is None:
        return None
    console.step("reading the classes of the canary")
    source = replace(
        config.source,
        format="auto", image_column=None, suffixes=SourceConfig().suffixes, uri_column=None, uri_template=None,
        allow_empty=False,
    )  # fmt: skip
    try:
        inputs = recognise.recognise(stores, [uri], source)
        with relisted(stores, inputs, source, _all, splits=False) as listed:
            entries, images = _entries_and_images(listed)
            classes = _numbers(images, model, source)
    except InputError as error:
        raise InputError(f"guard.canary={masked(uri)}: {str(error).removeprefix('--input: ')}") from error
    if folder is None:
        return None
    folder.put(page_name(0), _parquet(entries.select(LISTING.names)))
    folder.put(CLASSES, _parquet(pa.table({"uri": single_chunk(images["uri"]), "class": classes})))
    options = ReadOptions(
        suffixes=source.suffixes, image_column=None, label_column=source.label_column, split_column=source.split_column
    )
    return Canary(folder, tuple(is_stream(entries).to_pylist()), min_accuracy, options)


def require_canary(notes: Iterable[Mapping[str, Any]]) -> None:
    """Require that the canary has passed wherever these notes of workers are from.

    Raises:
        GuardError: with the accuracy, and examples of wrong labels.
    """
    failed = next((note["canary"] for note in notes if not note.get("canary", {}).get("passed", True)), None)
    if failed is None:
        return
    place = ", ".join(str(failed[key]) for key in ("runtime", "device", "dtype") if key in failed)
    wrong = "; ".join(
        f"{image['uri']} is {image['truth'][:60]!r}, "
        + (f"not {image['label'][:60]!r}" if image["label"] is not None else "and could not be decoded")
        for image in failed["wrong"]
    )
    raise GuardError(
        f"held back by guard.canary: node {failed['host']} ({place}) labelled {failed['right']:,} of {failed['images']:,} "
        f"images correctly ({failed['accuracy']:.1%}), guard.canary_accuracy={failed['required']:g} is required. No row of "
        f"it is committed. Wrong are: {wrong}. Compare the model's weights, preprocessing and labels with those that "
        "were evaluated; imgbatch evaluate with the canary as --input shows all mistakes"
    )


def _all(rows: pa.Table, splits: npt.NDArray[np.int64]) -> pa.Array:
    """Return a mask that selects each row."""
    return pa.array(np.ones(len(rows), bool))


def _entries_and_images(listed: Relisted) -> tuple[pa.Table, pa.Table]:
    """Return the rows of the listing, and the images with their labels: members in place of tars.

    Raises:
        InputError: there is no image, or there are too many.
    """
    members = _members_of_tars(listed.resolver)
    batches = []
    for batch in listed.source.list_images():
        tick()
        batches.append(batch.batch)
        _require_few(sum(map(len, batches)))
    entries = pa.Table.from_batches(batch for batch in batches if len(batch)) if any(map(len, batches)) else None
    if entries is None:
        raise InputError("it holds no image")
    images = [entries.filter(pc.invert(is_stream(entries))).select(["uri", TRUTH])]
    for table in members:
        labels, _ = listed.resolver.apply(table)
        images.append(pa.table({"uri": table["uri"], TRUTH: labels}))
    labelled = pa.concat_tables(images, promote_options="permissive")
    if not len(labelled):
        raise InputError("its tars hold no image")
    _require_few(len(labelled))
    return entries, labelled


def _members_of_tars(resolver: Resolver) -> list[pa.Table]:
    """Return the members of all tars with their sidecars, and decide with them where labels come from."""
    tables, total = [], 0
    for uri, number in resolver.tars.items():
        tick()
        rows, _ = tars.read_members(resolver.stores, uri, resolver.config.suffixes, max_images=MAX_IMAGES + 1)
        total += len(rows)
        _require_few(total)
        numbers = pa.repeat(pa.scalar(number, pa.int32()), len(rows))
        tables.append(resolver.members(rows, pa.repeat(uri, len(rows)), numbers))
    for table in tables:
        resolver.add(table)
    if tables:
        resolver.decide()
    return tables


def _require_few(images: int) -> None:
    if images > MAX_IMAGES:
        raise InputError(
            f"it holds more than {MAX_IMAGES:,} images, and each node labels all of them before its first image: "
            "use a smaller sample"
        )


def _numbers(images: pa.Table, model: Model, source: SourceConfig) -> npt.NDArray[np.int32]:
    """Return the class of each image."""
    classes = Classes(model.labels, model.name, label_is=source.label_is)
    numbers = classes.truths(images)
    classes.require_known()
    return numbers


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()

"""Effects: the labelled images of a training run: listed, and their classes, splits and groups as the inputs declare them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.monitor import tick
from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.evaluation.labelled_inputs import AGREE, Resolver
from imgbatch.ledger.candidates import candidates, no_image
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing, WorkPlan
from imgbatch.ledger.listing_pages import pages
from imgbatch.schema import whole
from imgbatch.sources import tars
from imgbatch.sources.base import Source
from imgbatch.sources.labelled import GROUP, OBJECT_OF, SPLIT, TABLE_OF, TRUTH, Columns, is_tar, labelled_sources
from imgbatch.sources.split_words import TEST, split_of_folder
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal.plurals import counted
from imgbatch.training import labels as labels_module
from imgbatch.training.cache import PROBLEM
from imgbatch.training.labels import NO_CLASS, Labelled

if TYPE_CHECKING:
    from imgbatch.training.cache_build import Prepared

log = logging.getLogger(__name__)

_PREVIEWED_TARS, _PREVIEWED_MEMBERS = 8, 2_000
"""Of a dry run: how many tars are opened, and how many members of each are read."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What training is given: the sources, and where they are listed."""

    stores: Stores
    sources: Sequence[Source]
    config: SourceConfig


@dataclass(frozen=True, slots=True)
class Listed:
    """The images of all inputs: their URIs and carried columns, in an order that repeats."""

    inputs: Inputs
    table: pa.Table
    pages: Folder
    work_plan: WorkPlan
    fingerprint: str
    """Tells these images, their versions and their labels from others."""
    columns: Sequence[Columns]

    def resolver(self) -> Resolver:
        """Return what decides where labels and splits come from; it has not learned of any image."""
        return Resolver(self.inputs.stores, self.inputs.sources, self.columns, self.inputs.config)


def list_images(inputs: Inputs, folder: Folder) -> Listed:
    """List the inputs onto numbered pages.

    Raises:
        InputError: there is not one image.
    """
    given, columns = labelled_sources(inputs.sources, inputs.config)
    listing = Listing(Ledger(folder.folder("none"), {}, read_only=True).open(), folder, agree=AGREE)
    with candidates(given, allow_empty=inputs.config.allow_empty) as batches:
        listing.take(batches)
    counts = listing.counts
    if not counts.listed and not counts.tars:
        raise InputError(no_image(counts, list(inputs.sources)))
    log.info(
        "%s listed, %s ignored, %s",
        counted(counts.listed, "image"),
        counted(counts.ignored, "object"),
        counted(counts.duplicates, "duplicate"),
    )
    digest, kept = hashlib.sha256(), []
    for page in pages(folder):
        tick()
        digest.update(json.dumps(page.to_pydict(), default=str).encode())
        kept.append(page.drop_columns(["size", "etag", "last_modified"]))
    return Listed(inputs, pa.concat_tables(kept), folder, listing.work_plan(), digest.hexdigest(), columns)


def wanted(listed: Listed) -> tuple[Mask, Labelled | None]:
    """Return which entries of the listing are to be made ready, and what is known of them; None: tars are to be read first.

    Raises:
        InputError: what the inputs say can be meant in two ways, or training cannot use it.
    """
    resolver = listed.resolver()
    resolver.add(listed.table)
    resolver.decide()
    labels, splits = resolver.apply(listed.table)
    if listed.work_plan.tars:
        # A tar that is named after a split may hold all of them, if there is nothing else.
        others = bool((splits != TEST).any())
        images = ~np.asarray(resolver.is_ignored(listed.table))
        mask: Mask = listed.work_plan.pending & images & ((splits != TEST) | (not others))
        return mask, None
    found = labels_module.read(labels, splits, whole(listed.table[GROUP]))
    say(resolver)
    mask = (found.classes != NO_CLASS) & (found.splits != TEST)
    return mask, found


def say(resolver: Resolver) -> None:
    """Log what was understood of the inputs."""
    log.info("what the inputs hold:\n%s", "\n".join(resolver.lines()))


def read(listed: Listed, made: Prepared) -> tuple[Labelled, Resolver]:
    """Return the classes, splits and groups of images that were made ready, members of tars among them.

    Raises:
        InputError: what the inputs say can be meant in two ways, or training cannot use it.
    """
    entries = listed.table.take(made.images["index"])
    members = is_tar(entries)
    columns = {
        name: pc.if_else(members, whole(made.images[name]), whole(entries[name])) for name in (TRUTH, SPLIT, GROUP)
    }
    columns |= {name: whole(entries[name]) for name in (OBJECT_OF, TABLE_OF, "container")}
    columns |= {"uri": whole(made.images["uri"]), "tar": pc.if_else(members, whole(entries["uri"]), None)}
    table = pa.table(columns)
    resolver = listed.resolver()
    resolver.add(table)
    resolver.add_problems(table, whole(made.images[PROBLEM]))
    resolver.decide()
    labels, splits = resolver.apply(table)
    return labels_module.read(labels, splits, whole(table[GROUP])), resolver


def preview(listed: Listed) -> tuple[list[str], Sequence[str] | None]:
    """Return what is understood of the inputs, as lines, and the labels; None: not all tars were read.

    Of tars the headers of the first members of the first ones are read.

    Raises:
        InputError: see `read`.
    """
    resolver, tables, every = listed.resolver(), [listed.table], True
    all_tars = listed.work_plan.tars
    opened = list(all_tars.items())[:_PREVIEWED_TARS]
    for number, tar in opened:
        tick()
        rows, whole_tar = tars.read_members(
            listed.inputs.stores, tar.uri, listed.inputs.config.suffixes, max_images=_PREVIEWED_MEMBERS
        )
        source, every = listed.table[OBJECT_OF][number], every and whole_tar
        tables.append(resolver.members(rows, pa.repeat(tar.uri, len(rows)), pa.repeat(source, len(rows))))
    every = every and len(opened) == len(all_tars)
    for table in tables:
        resolver.add(table)
    looked_at = f"{len(opened):,} of {len(all_tars):,} tars were opened, up to {_PREVIEWED_MEMBERS:,} images of each"
    try:
        resolver.decide()
        found = [resolver.apply(table) for table in tables]
    except InputError as error:
        if every:
            raise
        return [looked_at, f"from these images alone: {error}"], None
    if not every:
        return [*resolver.lines(), looked_at], None
    masks = [pc.invert(is_tar(listed.table)), *(pa.array(np.ones(len(table), bool)) for table in tables[1:])]
    names = pa.concat_arrays([labels.filter(mask) for (labels, _), mask in zip(found, masks, strict=True)])
    splits = np.concatenate([codes[np.asarray(mask)] for (_, codes), mask in zip(found, masks, strict=True)])
    groups = pa.concat_arrays([whole(table[GROUP]).filter(mask) for table, mask in zip(tables, masks, strict=True)])
    learned = labels_module.read(names, splits, groups)
    return [*resolver.lines(), *([looked_at] if opened else [])], learned.labels


def say_what_is_empty(inputs: Inputs, uris: pa.ChunkedArray) -> None:
    """Name the folders directly below an input, or its splits, that hold no image."""
    for root in (source.uri for source in inputs.sources if source.kind == "folder"):
        folders = Folder(inputs.stores, root).folders()
        splits = [f"{root}/{name}" for name in folders if split_of_folder(name) is not None]
        for place in (root, *splits):
            for name in labels_module.empty_folders(place, Folder(inputs.stores, place).folders(), uris):
                log.warning("%s/%s holds no image: it is no class", place, name)

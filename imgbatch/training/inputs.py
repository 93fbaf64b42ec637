"""Effects: the labelled images of a training run: their listing, and their classes, splits and groups."""

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
from imgbatch.ledger.listing import Listing
from imgbatch.ledger.listing_pages import pages
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.schema import single_chunk
from imgbatch.sources import tars
from imgbatch.sources.base import Source, is_stream
from imgbatch.sources.labelled import GROUP, OBJECT_OF, SPLIT, TABLE_OF, TRUTH, Columns, labelled_sources
from imgbatch.sources.split_words import TEST, split_of_folder
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal.plurals import counted
from imgbatch.training.cache import PROBLEM
from imgbatch.training.labels import NO_CLASS, Labelled, empty_folders, number_classes

if TYPE_CHECKING:
    from imgbatch.training.cache_build import Prepared

log = logging.getLogger(__name__)

_PREVIEWED_TARS, _PREVIEWED_MEMBERS = 8, 2_000
"""Maximum number of tars that a dry run opens, and of members that it reads of each."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The sources of a training run, and how they are read."""

    stores: Stores
    sources: Sequence[Source]
    config: SourceConfig


@dataclass(frozen=True, slots=True)
class Listed:
    """The images of all inputs: their URIs and carried columns, in an order that is the same in each run."""

    inputs: Inputs
    table: pa.Table
    pages: Folder
    work_plan: WorkPlan
    fingerprint: str
    """Changes with the images, their versions and their labels."""
    columns: Sequence[Columns]

    def resolver(self) -> Resolver:
        """Return a new resolver of labels and splits, without images."""
        return Resolver(self.inputs.stores, self.inputs.sources, self.columns, self.inputs.config)


def list_images(inputs: Inputs, folder: Folder) -> Listed:
    """List the inputs onto numbered pages.

    Raises:
        InputError: the inputs contain no image.
    """
    sources, columns = labelled_sources(inputs.sources, inputs.config)
    listing = Listing(Ledger(folder.folder("none"), {}, read_only=True).open(), folder, agree=AGREE)
    with candidates(sources, allow_empty=inputs.config.allow_empty) as batches:
        listing.take(batches)
    counts = listing.counts
    if not counts.listed and not counts.streams:
        raise InputError(no_image(counts, list(inputs.sources)))
    log.info(
        "%s listed, %s ignored, %s",
        counted(counts.listed, "image"),
        counted(counts.ignored, "object"),
        counted(counts.duplicates, "duplicate"),
    )
    digest, tables = hashlib.sha256(), []
    for page in pages(folder):
        tick()
        digest.update(json.dumps(page.to_pydict(), default=str).encode())
        tables.append(page.drop_columns(["size", "etag", "last_modified"]))
    return Listed(inputs, pa.concat_tables(tables), folder, listing.work_plan(), digest.hexdigest(), columns)


def select_entries(listed: Listed) -> tuple[Mask, Labelled | None]:
    """Return a mask of the entries of the listing to prepare, and their classes; None: members of tars are not known yet.

    Raises:
        InputError: the inputs are ambiguous, or training cannot use them.
    """
    resolver = listed.resolver()
    resolver.add(listed.table)
    resolver.decide()
    labels, splits = resolver.apply(listed.table)
    if listed.work_plan.streams:
        # A tar with the name of the test split is not read, unless all inputs are such: then it may hold images of all splits.
        has_others = bool((splits != TEST).any())
        images = ~np.asarray(resolver.is_ignored(listed.table))
        mask: Mask = listed.work_plan.pending & images & ((splits != TEST) | (not has_others))
        return mask, None
    labelled = number_classes(labels, splits, single_chunk(listed.table[GROUP]))
    log_understood(resolver)
    mask = (labelled.classes != NO_CLASS) & (labelled.splits != TEST)
    return mask, labelled


def log_understood(resolver: Resolver) -> None:
    """Log a summary of the inputs."""
    log.info("contents of the inputs:\n%s", "\n".join(resolver.lines()))


def labels_of(listed: Listed, prepared: Prepared) -> tuple[Labelled, Resolver]:
    """Return the classes, splits and groups of prepared images, including members of tars.

    Raises:
        InputError: the inputs are ambiguous, or training cannot use them.
    """
    entries = listed.table.take(prepared.images["index"])
    members = is_stream(entries)
    columns = {
        name: pc.if_else(members, single_chunk(prepared.images[name]), single_chunk(entries[name]))
        for name in (TRUTH, SPLIT, GROUP)
    }
    columns |= {name: single_chunk(entries[name]) for name in (OBJECT_OF, TABLE_OF, "container")}
    columns |= {
        "uri": single_chunk(prepared.images["uri"]),
        "tar": pc.if_else(members, single_chunk(entries["uri"]), None),
    }
    table = pa.table(columns)
    resolver = listed.resolver()
    resolver.add(table)
    resolver.add_problems(table, single_chunk(prepared.images[PROBLEM]))
    resolver.decide()
    labels, splits = resolver.apply(table)
    return number_classes(labels, splits, single_chunk(table[GROUP])), resolver


def preview(listed: Listed) -> tuple[list[str], Sequence[str] | None]:
    """Return a summary of the inputs, as lines, and the labels; None: not all tars were read.

    Of tars, only the first members of the first ones are read.

    Raises:
        InputError: see `labels_of`.
    """
    resolver, tables, is_complete = listed.resolver(), [listed.table], True
    streams = listed.work_plan.streams
    opened = list(streams.items())[:_PREVIEWED_TARS]
    for number, tar in opened:
        tick()
        rows, read_to_end = tars.read_members(
            listed.inputs.stores, tar.uri, listed.inputs.config.suffixes, max_images=_PREVIEWED_MEMBERS
        )
        source, is_complete = listed.table[OBJECT_OF][number], is_complete and read_to_end
        tables.append(resolver.members(rows, pa.repeat(tar.uri, len(rows)), pa.repeat(source, len(rows))))
    is_complete = is_complete and len(opened) == len(streams)
    for table in tables:
        resolver.add(table)
    scope = f"{len(opened):,} of {len(streams):,} tars were opened, up to {_PREVIEWED_MEMBERS:,} images of each"
    try:
        resolver.decide()
        resolved = [resolver.apply(table) for table in tables]
    except InputError as error:
        if is_complete:
            raise
        return [scope, f"from these images alone: {error}"], None
    if not is_complete:
        return [*resolver.lines(), scope], None
    masks = [pc.invert(is_stream(listed.table)), *(pa.array(np.ones(len(table), bool)) for table in tables[1:])]
    names = pa.concat_arrays([labels.filter(mask) for (labels, _), mask in zip(resolved, masks, strict=True)])
    splits = np.concatenate([codes[np.asarray(mask)] for (_, codes), mask in zip(resolved, masks, strict=True)])
    groups = pa.concat_arrays(
        [single_chunk(table[GROUP]).filter(mask) for table, mask in zip(tables, masks, strict=True)]
    )
    labelled = number_classes(names, splits, groups)
    return [*resolver.lines(), *([scope] if opened else [])], labelled.labels


def warn_of_empty_folders(inputs: Inputs, uris: pa.ChunkedArray) -> None:
    """Log the folders directly below an input, or below its split folders, that hold no image."""
    for root in (source.uri for source in inputs.sources if source.kind == "folder"):
        folders = Folder(inputs.stores, root).folders()
        splits = [f"{root}/{name}" for name in folders if split_of_folder(name) is not None]
        for place in (root, *splits):
            for name in empty_folders(place, Folder(inputs.stores, place).folders(), uris):
                log.warning("%s/%s holds no image: it is no class", place, name)

"""Effects: the steps before images are labelled: checks of config, model, inputs and output, and the listing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from imgbatch.concurrency.monitor import on_tick
from imgbatch.config import reading, sections
from imgbatch.errors import BadPath, InputError, NotFound, UsageError
from imgbatch.ledger.candidates import candidates, no_image
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing, OnListed
from imgbatch.models import loading
from imgbatch.models.model import Model
from imgbatch.schema import CARRIED, labels_with, require_carried
from imgbatch.sources import recognise
from imgbatch.sources.base import Source
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute, is_local
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted

log = logging.getLogger("imgbatch")


@dataclass(frozen=True, slots=True)
class Job:
    """A run whose config, model and inputs have been checked."""

    config: sections.Config
    stores: Stores
    output: Folder
    model: Model
    sources: list[Source]
    ledger: Ledger


def open_output(config: sections.Config, *, read_only: bool = False) -> Job:
    """Check the run and its output, which must exist and grant access.

    Args:
        read_only: the ledger writes nothing.
    """
    job = prepare(config, read_only=read_only)
    with naming_the_output(job):
        job.output.folders()
    if not job.output.conditional:
        log.warning("%s has no conditional writes: make sure that only one run writes there at a time", job.output.uri)
    return job


def prepare(config: sections.Config, *, read_only: bool = False) -> Job:
    """Check everything that can be checked without the output.

    Raises:
        ImgbatchError: the model, an input or a value of the config cannot be used.
    """
    stores = Stores(config.storage)
    for flag, uris in (("--input", config.input), ("--output", [config.output.uri])):
        for uri in uris:
            recognise.require_utf8(uri, flag)
    console.step("loading the model")
    model = loading.load(config.model, stores)
    config = reading.fill_output_template(config, model=model.slug)
    if not config.output.uri:
        raise UsageError("no --output: set where the label tables are written")
    output = Folder(stores, absolute(config.output.uri))
    sources = sources_beside(output, config.input, config.source)
    ledger = Ledger(
        output,
        {
            **model.fingerprint(),
            "top_k": config.top_k,
            "answer.min_score": config.answer.min_score,
            "output.embeddings": config.output.embeddings,
            "output.columns": sorted(config.output.columns),
            **({"source.image_column": config.source.image_column} if config.source.image_column else {}),
            **({"output.content_hash": True} if config.output.content_hash else {}),
        },
        retry=config.rejects.retry,
        read_only=read_only,
        label_columns=labels_with(
            config.output.columns,
            model.width() if config.output.embeddings else None,
            hashed=config.output.content_hash,
        ),
        carried=config.output.columns,
    )
    return Job(config, stores, output, model, sources, ledger)


def sources_beside(output: Folder, uris: Sequence[str], config: sections.SourceConfig) -> list[Source]:
    """Return the sources of a run.

    Raises:
        UsageError: a source would list the files that the run writes.
    """
    sources = recognise.recognise(output.stores, uris, config)
    for source in sources:
        if recognise.would_list(source, output):
            raise UsageError(f"--output {output.uri} is inside --input {source.uri}: choose a location outside of it")
    return sources


@contextmanager
def naming_the_output(job: Job) -> Iterator[None]:
    """Report an output that does not exist as a wrong flag. The block makes the first requests to it."""
    try:
        yield
    except (NotFound, BadPath) as error:
        raise UsageError(f"--output {job.output.uri}: {error}") from error


def list_images(job: Job, folder: Folder | None, on_listed: OnListed = lambda first, batch, pending: None) -> Listing:
    """List the inputs, compare them with the rows in the ledger, and write numbered pages.

    Args:
        folder: where the pages are written; None: a temporary folder.
        on_listed: called for each batch of listed images.

    Raises:
        InputError: there are no images.
    """
    console.step("reading the tables of earlier runs")
    job.ledger.open()
    console.step("listing")
    label = CARRIED + (job.config.source.label_column or "label")
    listing = Listing(job.ledger, folder, job.config.limit, agree=(label,), on_listed=on_listed)

    def show() -> None:
        console.show(f"{listing.counts.listed:,} images so far")

    with on_tick(show), candidates(job.sources, allow_empty=job.config.source.allow_empty) as batches:
        listing.take(batches)
    counts = listing.counts
    log.info(
        "%s listed, %s already done, %s ignored, %s",
        counted(counts.listed, "image"),
        f"{counts.already_done:,}",
        counted(counts.ignored, "object"),
        counted(counts.duplicates, "duplicate"),
    )
    if counts.unversioned:
        log.warning(
            "%s of the images already done have neither size nor ETag in the input: changes of these images cannot be "
            "detected. Give the manifest the columns size or etag, or name the folder of the images as a second --input",
            f"{counts.unversioned:,}",
        )
    if not counts.listed and not counts.streams and not job.config.source.allow_empty:
        raise InputError(f"{no_image(counts, job.sources)}; source.allow_empty=true makes an empty input a success")
    if counts.listed and not listing.full:  # with a limit, images beyond it may have the column
        require_carried(job.config.output.columns, listing.carried)
    return listing


def warn_of_local_paths(output: Folder, sources: list[Source], nodes: int) -> None:
    """Warn if paths of this machine have to be shared by all nodes."""
    local = [uri for uri in (output.uri, *(source.uri for source in sources)) if is_local(uri)]
    if nodes > 1 and local:
        log.warning("%s must be the same shared folder on all %d nodes", ", ".join(local), nodes)

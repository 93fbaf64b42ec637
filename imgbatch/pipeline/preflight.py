"""Effects: a run before its work: what it is made of, checked, and what is listed. Nothing is labelled in here."""

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
from imgbatch.ledger.listing import Listing
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
    """A run that may start: its config is sound, its model known, its inputs there."""

    config: sections.Config
    stores: Stores
    output: Folder
    model: Model
    sources: list[Source]
    ledger: Ledger


def prepare(chosen: sections.Config) -> Job:
    """Check everything that can be checked before any work."""
    stores = Stores(chosen.storage)
    for what, uris in (("--input", chosen.input), ("--output", [chosen.output.uri])):
        for uri in uris:
            recognise.require_utf8(uri, what)
    console.step("loading the model")
    model = loading.load(chosen.model, stores)
    chosen = reading.fill_output_template(chosen, model=model.slug)
    if not chosen.output.uri:
        raise UsageError("no --output: say where the label tables go")
    output = Folder(stores, absolute(chosen.output.uri))
    found = sources_beside(output, chosen.input, chosen.source)
    ledger = Ledger(
        output,
        {
            **model.fingerprint(),
            "top_k": chosen.top_k,
            "answer.min_score": chosen.answer.min_score,
            "output.embeddings": chosen.output.embeddings,
            "output.columns": sorted(chosen.output.columns),
            **({"source.image_column": chosen.source.image_column} if chosen.source.image_column else {}),
            **({"output.content_hash": True} if chosen.output.content_hash else {}),
        },
        retry=chosen.rejects.retry,
        label_columns=labels_with(
            chosen.output.columns,
            model.width() if chosen.output.embeddings else None,
            hashed=chosen.output.content_hash,
        ),
        carried=chosen.output.columns,
    )
    return Job(chosen, stores, output, model, found, ledger)


def sources_beside(output: Folder, uris: Sequence[str], chosen: sections.SourceConfig) -> list[Source]:
    """Return the sources of a run.

    Raises:
        UsageError: one of them would find what the run writes.
    """
    found = recognise.recognise(output.stores, uris, chosen)
    for source in found:
        if recognise.would_list(source, output):
            raise UsageError(f"--output {output.uri} lies inside --input {source.uri}: choose a place beside it")
    return found


@contextmanager
def naming_the_output(job: Job) -> Iterator[None]:
    """Touch the output for the first time: a bucket that is not there is a wrong flag, not a store that is away."""
    try:
        yield
    except (NotFound, BadPath) as error:
        raise UsageError(f"--output {job.output.uri}: {error}") from error


def list_images(job: Job, folder: Folder | None) -> Listing:
    """List the inputs against what the ledger says is done, onto numbered pages in the folder.

    Raises:
        InputError: there is not one image.
    """
    console.step("reading the tables of earlier runs")
    job.ledger.open()
    console.step("listing")
    label = CARRIED + (job.config.source.label_column or "label")
    listing = Listing(job.ledger, folder, job.config.limit, agree=(label,))

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
            "%s of the images already done have neither size nor ETag in the input: if they have changed, that cannot be seen. "
            "Give the manifest the columns size or etag, or name the folder of the images as a second --input",
            f"{counts.unversioned:,}",
        )
    if not counts.listed and not counts.tars and not job.config.source.allow_empty:
        raise InputError(f"{no_image(counts, job.sources)}; source.allow_empty=true makes an empty input a success")
    if counts.listed and not listing.full:  # else a column may be one of those that were not listed
        require_carried(job.config.output.columns, listing.carried)
    job.ledger.listed = listing.carried
    return listing


def warn_of_local_paths(output: Folder, found: list[Source], nodes: int) -> None:
    """Say that a path of this machine is read and written by all nodes."""
    local = [uri for uri in (output.uri, *(source.uri for source in found)) if is_local(uri)]
    if nodes > 1 and local:
        log.warning("%s must be the same shared folder on all %d nodes", ", ".join(local), nodes)

"""Effects: a dry run: it lists the inputs, compares them with the ledger, and writes nothing."""

from __future__ import annotations

from imgbatch.config.sections import Config
from imgbatch.ledger.corrections import corrections, count_rows
from imgbatch.pipeline.canary import prepare_canary
from imgbatch.pipeline.preflight import list_images, open_output
from imgbatch.terminal.plurals import counted, plural


def dry_run(config: Config) -> str:
    """Return a summary of the work that a run would do."""
    job = open_output(config, read_only=True)
    prepare_canary(job.stores, job.config, job.model, None)
    listing = list_images(job, None)
    counts, work = listing.counts, listing.work_plan()
    changed = corrections(job.ledger, listing.pages, listing.carried, work.pending, limited=listing.full)
    updated_rows = sum(map(count_rows, changed))
    images = work.remaining - counts.streams
    size = f"{counts.bytes / 1e6:,.1f} MB" if counts.bytes else "size unknown"
    tars = f" and the images in {plural(counts.streams, 'a tar', f'{counts.streams:,} tars')}" if counts.streams else ""
    updated = f" ({updated_rows:,} of these to get other carried values)" if updated_rows else ""
    stale = f", {counts.stale:,} of the {images:,} to classify changed or to be tried again" if counts.stale else ""
    return (
        f"model {job.model.summary()}\n"
        f"would classify {images:,} of {counted(counts.listed, 'image')}{tars} "
        f"({size}) with {job.model.reference} into {job.output.uri}: "
        f"{counts.already_done:,} already done{updated}{stale}, {counted(counts.ignored, 'object')} ignored, "
        f"{counted(counts.duplicates, 'duplicate')}; nothing was written"
    )

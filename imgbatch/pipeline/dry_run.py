"""Effects: what a run would do, without doing it: the inputs are listed against the ledger, and nothing is written."""

from __future__ import annotations

from imgbatch.config.sections import Config
from imgbatch.ledger.corrections import corrections, count_rows
from imgbatch.pipeline.preflight import list_images, open_output
from imgbatch.terminal.plurals import counted, plural


def dry_run(config: Config) -> str:
    """Return what a run would do, for people."""
    job = open_output(config, read_only=True)
    listing = list_images(job, None)
    counts, work = listing.counts, listing.work_plan()
    changed = corrections(job.ledger, listing.pages, listing.carried, work.pending, limited=listing.full)
    updated_rows = sum(map(count_rows, changed))
    images = work.remaining - counts.tars
    size = f"{counts.bytes / 1e6:,.1f} MB" if counts.bytes else "size not known"
    tars = f" and what {plural(counts.tars, 'a tar holds', f'{counts.tars:,} tars hold')}" if counts.tars else ""
    updated = f" ({updated_rows:,} of these to get other carried values)" if updated_rows else ""
    stale = f", {counts.stale:,} of the {images:,} to classify changed or to be tried again" if counts.stale else ""
    return (
        f"model {job.model.summary()}\n"
        f"would classify {images:,} of {counted(counts.listed, 'image')}{tars} "
        f"({size}) with {job.model.reference} into {job.output.uri}: "
        f"{counts.already_done:,} already done{updated}{stale}, {counted(counts.ignored, 'object')} ignored, "
        f"{counted(counts.duplicates, 'duplicate')}; nothing was written"
    )

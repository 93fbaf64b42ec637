"""Effects: listing of all sources, in batches of images."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.polling import poll_items
from imgbatch.errors import BadPath, InputError, NotFound
from imgbatch.ledger.listing import Counts
from imgbatch.sources import recognise
from imgbatch.sources.base import ListingBatch, Source
from imgbatch.terminal.plurals import counted


@contextmanager
def candidates(sources: list[Source], *, allow_empty: bool) -> Iterator[Iterator[ListingBatch]]:
    """Provide an iterator over the images of the sources, in batches. It calls `tick` regularly even if their stores are slow.

    Raises:
        InputError: a source does not exist, or one of several holds no image and may not be empty.
    """

    def listed() -> Generator[ListingBatch, None, None]:
        try:
            yield from recognise.list_all(sources, allow_empty=allow_empty)
        except (NotFound, BadPath) as error:
            raise InputError(f"--input: {error}") from error

    def with_ticks() -> Generator[ListingBatch, None, None]:
        # The sources list in a thread, so that a signal does not wait for a slow store.
        with closing(poll_items(listed(), math.inf, closes=True)) as ticks:
            for batch in ticks:
                tick()
                if batch is not None:
                    yield batch

    with closing(with_ticks()) as batches:  # otherwise the thread would keep running after an error
        yield batches


def no_image(counts: Counts, sources: list[Source]) -> str:
    """Return the message for sources without a single image."""
    named = ", ".join(source.uri for source in sources)
    if not counts.ignored and all(source.kind in ("folder", "glob") for source in sources):
        reason = (
            "no object matches it"
            if all(source.kind == "glob" for source in sources)
            else "there is no object below it"
        )
        return f"no image in {named}: {reason}; check the name"
    example = f", such as {counts.ignored_example}" if counts.ignored_example else ""
    return (
        f"no image in {named} ({counted(counts.ignored, 'other object')} ignored{example}): check the prefix. Names need an "
        'image suffix or none (source.suffixes="*" takes all; of archives only tars are read), and hidden folders '
        "below the input are ignored"
    )

"""Effects: what all sources list, in batches, however slow their stores are."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.polling import ticking
from imgbatch.errors import BadPath, InputError, NotFound
from imgbatch.ledger.listing import Counts
from imgbatch.sources import recognise
from imgbatch.sources.base import ListingBatch, Source
from imgbatch.terminal.plurals import counted


@contextmanager
def candidates(found: list[Source], *, allow_empty: bool) -> Iterator[Iterator[ListingBatch]]:
    """Give what the sources list, in batches; `tick` is called however slow their stores are.

    Raises:
        InputError: a source is not there, or one of several holds no image and may not be empty.
    """

    def listed() -> Generator[ListingBatch, None, None]:
        try:
            yield from recognise.list_all(found, allow_empty=allow_empty)
        except (NotFound, BadPath) as error:
            raise InputError(f"--input: {error}") from error

    def pulsing() -> Generator[ListingBatch, None, None]:
        # In a thread, so that a store that is slow, or fails, keeps no signal waiting.
        with closing(ticking(listed(), math.inf, closes=True)) as ticks:
            for batch in ticks:
                tick()
                if batch is not None:
                    yield batch

    with closing(pulsing()) as batches:  # or what is drawn ahead would not end with an error
        yield batches


def no_image(counts: Counts, found: list[Source]) -> str:
    """Return what to say of sources in which there is not one image."""
    named = ", ".join(source.uri for source in found)
    if not counts.ignored and all(source.kind in ("folder", "glob") for source in found):
        nothing = (
            "no object matches it" if all(source.kind == "glob" for source in found) else "there is no object below it"
        )
        return f"no image in {named}: {nothing}; is the name right?"
    example = f", such as {counts.ignored_example}" if counts.ignored_example else ""
    return (
        f"no image in {named} ({counted(counts.ignored, 'other object')} ignored{example}): is the prefix right? Names need an "
        'image suffix or none (source.suffixes="*" takes all; of archives only tars are read), and hidden folders '
        "below the input are left out"
    )

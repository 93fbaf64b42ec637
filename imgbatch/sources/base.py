"""Values: what a source is, and the batches in which it lists images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class ListingBatch:
    """A batch of candidates from a source, as LISTING with carried columns, and how many objects were ignored."""

    batch: pa.RecordBatch
    ignored: int = 0
    example: str = ""
    """One of those ignored."""
    whole: bool = False
    """The batch is read as a whole: it is handed to one worker."""
    sidecar: str = ""
    """One of the ignored objects that may say the label of an image beside it."""
    by_table: bool = False
    """A table names these images: a manifest, or metadata beside them."""
    unread: bool = False
    """The batch is a Parquet file itself, whose rows could not be read."""
    origin: str = ""
    """The file or input that it came from, for messages."""


@dataclass(frozen=True, slots=True)
class Source:
    """One input: what it is, and how to list it."""

    uri: str
    kind: str
    list_images: Callable[[], Iterator[ListingBatch]]
    group: int = 0
    """The number of the input as it was given: `{000..099}` gives several sources."""
    probe: Callable[[], Iterator[ListingBatch]] | None = None
    """What is asked whether the store answers, if listing it is not the way to find out."""

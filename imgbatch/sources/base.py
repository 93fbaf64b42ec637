"""Values: the interface of sources, and the batches in which they list images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.schema import TAR, single_chunk


@dataclass(frozen=True, slots=True)
class ListingBatch:
    """A batch of candidates from a source, as LISTING with carried columns, and the number of ignored objects."""

    batch: pa.RecordBatch
    ignored: int = 0
    example: str = ""
    """One of the ignored objects."""
    whole: bool = False
    """One worker must read the whole batch, such as a row group."""
    sidecar: str = ""
    """One of the ignored objects that may hold the label of an image."""
    by_table: bool = False
    """The images are named by a table: a manifest, or a metadata file in their folder."""
    unread: bool = False
    """The batch is a Parquet file whose rows could not be read."""
    origin: str = ""
    """The file or input that the batch comes from, for messages."""


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How a worker reached the end of a stream: a container whose images only reading it shows, such as a tar."""

    number: int
    """The stream's number in the listing."""
    last_offset: int
    """The offset of the last row."""
    whole: bool
    """Whether nothing is left to read: false where the store failed."""
    ignored: int = 0
    """Members that are no image candidates."""
    unpaired: int = 0
    """Sidecars that are not next to an image with their key."""
    unpaired_example: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """One input: its kind, and how to list it."""

    uri: str
    kind: str
    list_images: Callable[[], Iterator[ListingBatch]]
    group: int = 0
    """The number of the input on the command line: `{000..099}` expands to several sources with one number."""
    probe: Callable[[], Iterator[ListingBatch]] | None = None
    """Called in place of `list_images` to check that the store can be reached."""
    annotated: bool = False
    """Whether it is an export of Label Studio: training and evaluation omit tasks without a label."""


def is_stream(listed: pa.RecordBatch | pa.Table) -> pa.Array:
    """Return a mask of the rows of a listing that are streams, in place of the images in them."""
    return pc.fill_null(pc.equal(single_chunk(listed["container"]), TAR), False)

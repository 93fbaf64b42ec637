"""The listing: what the store holds at the start of a run, as numbered Parquet pages below the run.

An image's number in the listing is its name within the run: page `number // PAGE_ROWS`, row `number % PAGE_ROWS`. The
driver keeps 16 bytes of a new image and one of every image; the rest is in the pages, from which workers read.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.ledger import DONE, DUPLICATE, NEW, STALE, Ledger
from imgbatch.schema import LISTING, carried_fields, with_carried
from imgbatch.storage import Folder
from imgbatch.uris import UriIndex, first_of_each, uri_keys

PAGE_ROWS = 8_192

Mask = npt.NDArray[np.bool_]
Wholes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Found:
    """A batch of candidates from a source, as LISTING with carried columns, and how many objects were passed over."""

    batch: pa.RecordBatch
    ignored: int = 0
    example: str = ""
    """One of those passed over."""
    whole: bool = False
    """The batch is read as a whole, so that one worker should have it all."""


@dataclass
class Counts:
    """What a listing came to."""

    listed: int = 0
    ignored: int = 0
    duplicates: int = 0
    already_done: int = 0
    stale: int = 0
    bytes: int = 0
    """Of the images that are to be done, as far as their sizes are known."""
    ignored_example: str = ""


@dataclass
class Listing:
    """Takes what sources find, once each, and says which images are to be done."""

    ledger: Ledger
    folder: Folder | None
    """Where the pages go; None: nowhere, for a dry run."""
    carried: pa.Schema
    limit: int | None = None
    counts: Counts = field(default_factory=Counts)
    _new: UriIndex = field(default_factory=UriIndex)
    _pending: list[Mask] = field(default_factory=list)
    _rows: list[pa.RecordBatch] = field(default_factory=list)
    _buffered: int = 0
    _pages: int = 0
    _wholes: list[tuple[int, int]] = field(default_factory=list)

    def take(self, found: Iterable[Found]) -> None:
        """List everything, or up to the limit, and write the pages."""
        for each in found:
            self.counts.ignored += each.ignored
            self.counts.ignored_example = self.counts.ignored_example or each.example
            batch = each.batch
            first = self.counts.listed
            while len(batch) and not self.full:
                room = len(batch) if self.limit is None else min(len(batch), self.limit - self.counts.listed)
                self._take(batch.slice(0, room))
                batch = batch.slice(room)
            if each.whole:
                self._wholes.append((first, self.counts.listed))
            if self.full:
                break
        while self._buffered:
            self._write_page()

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self.counts.listed >= self.limit

    def pending(self) -> Mask:
        """Return a mask over all image numbers: those that are to be done."""
        return np.concatenate(self._pending) if self._pending else np.zeros(0, bool)

    def wholes(self) -> Wholes:
        """Return (first, end) of the image numbers of each batch that is read as a whole, ascending; n×2."""
        return np.array(self._wholes, np.int64).reshape(-1, 2)

    def _take(self, batch: pa.RecordBatch) -> None:
        keys = uri_keys(batch["uri"])
        once = first_of_each(keys)
        self.counts.duplicates += int(np.count_nonzero(~once))
        batch, keys = batch.filter(pa.array(once)), keys[once]
        status = self.ledger.visit(batch, keys)
        fresh = np.flatnonzero(status == NEW)
        added = self._new.add(keys[fresh])
        status[fresh[~added]] = DUPLICATE
        self.counts.duplicates += int(np.count_nonzero(status == DUPLICATE))
        batch, status = batch.filter(pa.array(status != DUPLICATE)), status[status != DUPLICATE]
        if not len(batch):
            return
        pending = status != DONE
        self._pending.append(pending)
        self.counts.listed += len(batch)
        self.counts.already_done += int(np.count_nonzero(~pending))
        self.counts.stale += int(np.count_nonzero(status == STALE))
        self.counts.bytes += pc.sum(batch["size"].filter(pa.array(pending))).as_py() or 0
        if self.folder is not None:
            self._rows.append(batch)
            self._buffered += len(batch)
            while self._buffered >= PAGE_ROWS:
                self._write_page()

    def _write_page(self) -> None:
        assert self.folder is not None
        whole = pa.Table.from_batches(self._rows).combine_chunks()
        page, rest = whole.slice(0, PAGE_ROWS), whole.slice(PAGE_ROWS)
        sink = io.BytesIO()
        pq.write_table(page, sink, compression="zstd", use_dictionary=carried_fields(page.schema).names)
        self.folder.put(page_name(self._pages), sink.getvalue())
        self._pages += 1
        self._rows, self._buffered = rest.to_batches(), len(rest)


def page_name(number: int) -> str:
    """Return the name of a page in the listing's folder."""
    return f"page-{number:06d}.parquet"


def read_page(folder: Folder, number: int) -> pa.Table:
    """Return one page of a listing."""
    return pq.ParquetFile(pa.BufferReader(folder.read(page_name(number)))).read(use_threads=False)


def pages(folder: Folder) -> Iterator[pa.Table]:
    """Yield the pages of a listing, in order."""
    for number in range(len([name for name in folder.names() if name.endswith(".parquet")])):
        yield read_page(folder, number)


def conform(batch: pa.RecordBatch, carried: pa.Schema) -> pa.RecordBatch:
    """Return the batch with exactly the carried columns of the run: absent ones null, others cast."""
    schema = with_carried(LISTING, carried)
    columns = [
        batch[entry.name].cast(entry.type) if entry.name in batch.schema.names else pa.nulls(len(batch), entry.type)
        for entry in schema
    ]
    return pa.record_batch(columns, schema=schema)

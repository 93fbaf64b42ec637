"""The listing: what the store holds at the start of a run, as numbered Parquet pages below the run.

An image's number in the listing is its name within the run: page `number // PAGE_ROWS`, row `number % PAGE_ROWS`. The
driver keeps 16 bytes of a new image and one of every image; the rest is in the pages, from which workers read.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.ledger import Ledger, Status
from imgbatch.schema import LISTING, TAR, carried_fields, with_carried
from imgbatch.shards import DONE, DUPLICATE, NEW, STALE, OpenShard, Progress, version_of
from imgbatch.storage import Folder
from imgbatch.uris import UriIndex, first_of_each, uri_keys

PAGE_ROWS = 8_192

Mask = npt.NDArray[np.bool_]
Wholes = npt.NDArray[np.int64]
Counted = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Found:
    """A batch of candidates from a source, as LISTING with carried columns, and how many objects were passed over."""

    batch: pa.RecordBatch
    ignored: int = 0
    example: str = ""
    """One of those passed over."""
    whole: bool = False
    """The batch is read as a whole, so that one worker should have it all."""
    by_table: bool = False
    """A table names these images: a manifest, or metadata beside them."""
    unread: bool = False
    """The batch is a Parquet file itself, whose rows could not be read."""


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
    tars: int = 0
    """Tars that are to be read: their images are counted as they come."""
    unread: list[str] = field(default_factory=list)
    """Parquet files whose rows could not be read."""
    unpaired: int = 0
    """Sidecars in tars that do not lie beside an image of their name."""


@dataclass(frozen=True, slots=True)
class Todo:
    """What a run has to do, by the numbers of its listing."""

    pending: Mask
    """The images, and tars, whose rows are to come; set to False as they do."""
    wholes: Wholes
    """(first, end) of what is read as a whole, such as a row group of a Parquet file; ascending, n×2."""
    shards: dict[int, OpenShard]
    """The tars among them."""


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
    _entries: int = 0
    _shards: dict[int, OpenShard] = field(default_factory=dict)

    def take(self, found: Iterable[Found]) -> None:
        """List everything, or up to the limit, and write the pages."""
        for each in found:
            self.counts.ignored += each.ignored
            self.counts.ignored_example = self.counts.ignored_example or each.example
            if each.unread:
                self.counts.unread += each.batch["uri"].to_pylist()
            batch = each.batch
            first = self._entries
            while len(batch) and not self.full:
                room = len(batch) if self.limit is None else min(len(batch), self.limit - self.counts.listed)
                self._take(batch.slice(0, room))
                batch = batch.slice(room)
            if each.whole:
                self._wholes.append((first, self._entries))
            if self.full:
                break
        while self._buffered:
            self._write_page()

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self.counts.listed >= self.limit

    def todo(self) -> Todo:
        """Return what is to be done."""
        pending = np.concatenate(self._pending) if self._pending else np.zeros(0, bool)
        return Todo(pending, np.array(self._wholes, np.int64).reshape(-1, 2), self._shards)

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
        images, done = self._images(batch, status)
        pending = status != DONE
        self._pending.append(pending)
        self._entries += len(batch)
        self.counts.listed += int(images.sum())
        self.counts.already_done += int(done.sum())
        self.counts.stale += int(np.count_nonzero(status == STALE))
        self.counts.bytes += pc.sum(batch["size"].filter(pa.array(pending))).as_py() or 0
        if self.folder is not None:
            self._rows.append(batch)
            self._buffered += len(batch)
            while self._buffered >= PAGE_ROWS:
                self._write_page()

    def _images(self, batch: pa.RecordBatch, status: Status) -> tuple[Counted, Counted]:
        """Return how many images each row stands for, as far as that is known, and how many of them are done.

        The status of a tar that is read to its end becomes DONE here; others become shards.
        """
        images = np.ones(len(batch), np.int64)
        done = (status == DONE).astype(np.int64)
        for at in np.flatnonzero(np.asarray(pc.fill_null(pc.equal(batch["container"], TAR), False))).tolist():
            row = batch.slice(at, 1).to_pylist()[0]
            version = version_of(row["etag"], row["last_modified"])
            found = self.ledger.visit_tar(row["uri"], version, again=status[at] == STALE)
            refused = int(status[at] == DONE)  # the tar itself has a reject, for good
            images[at] = done[at] = found.rows + refused
            if isinstance(found, Progress) or refused:
                status[at] = DONE
            else:
                found.refused = bool(status[at] == STALE)
                self._shards[self._entries + at] = found
                self.counts.tars += 1
        return images, done

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


class Pages:
    """The listing's pages as a worker reads them: the last few are kept."""

    def __init__(self, folder: Folder) -> None:
        self._page = lru_cache(maxsize=4)(lambda number: read_page(folder, number))

    def rows(self, numbers: npt.NDArray[np.int64]) -> pa.Table:
        """Return the listing's rows of ascending image numbers."""
        pages = numbers // PAGE_ROWS
        return pa.concat_tables(
            self._page(page).take(pa.array(numbers[pages == page] - page * PAGE_ROWS))
            for page in np.unique(pages).tolist()
        )

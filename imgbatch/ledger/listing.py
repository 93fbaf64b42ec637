"""Effects: the listing: the images that the store contains at the start of a run, and which of them are pending.

The driver keeps 16 bytes of a new image and one byte of every image; the rest is in the pages (`listing_pages`). At the end
all pages have one schema, the union of the columns of all batches. If several rows name an image, its row has the values of
all of them. Pages that were written before these values arrived are rewritten.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.prefetch import prefetch_calls
from imgbatch.config.sections import StorageConfig
from imgbatch.ledger import listing_pages
from imgbatch.ledger.carried import CarriedColumns
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing_pages import page_name, read_page
from imgbatch.ledger.repeats import Fill, Repeats
from imgbatch.ledger.row_index import Status
from imgbatch.ledger.status import DONE, DUPLICATE, NEW, STALE
from imgbatch.ledger.streams import Stream, StreamCounts
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.schema import PARQUET, carried_fields, single_chunk
from imgbatch.sources.base import ListingBatch, is_stream
from imgbatch.storage.stores import Folder, Stores
from imgbatch.uri_index import UriIndex, first_of_each, uri_keys

_PREFETCHED_PAGES = 4

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
OnListed = Callable[[int, pa.RecordBatch, Mask], object]
"""Called for each batch of listed images with the number of the first one, the batch, and which of them are pending."""


@dataclass
class Counts:
    """The counts of a listing."""

    listed: int = 0
    ignored: int = 0
    duplicates: int = 0
    already_done: int = 0
    stale: int = 0
    bytes: int = 0
    """The sum of the sizes of the pending images, as far as these are known."""
    ignored_example: str = ""
    unversioned: int = 0
    """Done images without size, ETag and time in the input: changes of these images cannot be detected."""
    updated: int = 0
    """Rows of done images that got other carried values."""
    streams: int = 0
    """Streams that will be read. Their images are counted as they arrive."""
    unread: list[str] = field(default_factory=list)
    """Parquet files whose rows could not be read."""
    unpaired: int = 0
    """Sidecars in streams that are not next to an image of their name."""

    def with_streams(self, found: StreamCounts) -> Counts:
        """Return the counts with what a run found in streams."""
        return replace(
            self,
            listed=self.listed + found.rows,
            ignored=self.ignored + found.ignored,
            unpaired=self.unpaired + found.unpaired,
        )


@dataclass
class Listing:
    """Takes the batches of sources, lists each image once, and determines which images are pending."""

    ledger: Ledger
    folder: Folder | None
    """Where the pages go; None: into a temporary folder of this machine, for a dry run."""
    limit: int | None = None
    agree: Sequence[str] = ()
    """Carried columns in which two rows of an image may not differ."""
    on_listed: OnListed = lambda first, batch, pending: None
    counts: Counts = field(default_factory=Counts)
    _columns: CarriedColumns = field(default_factory=CarriedColumns)
    _repeats: Repeats = field(init=False)
    _new: UriIndex = field(default_factory=UriIndex)
    _pending: list[Mask] = field(default_factory=list)
    _rows: list[pa.RecordBatch] = field(default_factory=list)
    _buffered: int = 0
    _schemas: list[pa.Schema] = field(default_factory=list)
    """The schema of each page that is written."""
    _row_group_ranges: list[tuple[int, int]] = field(default_factory=list)
    _entries: int = 0
    _streams: dict[int, Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._repeats = Repeats(self.agree)

    def take(self, batches: Iterable[ListingBatch]) -> None:
        """List everything, or up to the limit, and write the pages.

        Batches beyond the limit are not read, so values of later rows of an image are unknown then.

        Raises:
            InputError: a column has types without a common one, or rows of an image differ where they may not.
        """
        for listing_batch in batches:
            self.counts.ignored += listing_batch.ignored
            self.counts.ignored_example = self.counts.ignored_example or listing_batch.example
            if listing_batch.unread:
                self.counts.unread += listing_batch.batch["uri"].to_pylist()
            batch = listing_batch.batch
            first = self._entries
            while len(batch) and not self.full:
                count = len(batch) if self.limit is None else min(len(batch), self.limit - self.counts.listed)
                self._take(batch.slice(0, count), listing_batch.origin)
                batch = batch.slice(count)
                if self._repeats.full:
                    self._rework(self._repeats.drain(self._columns))
            if listing_batch.whole:
                self._row_group_ranges.append((first, self._entries))
            if self.full:
                break
        while self._buffered:
            self._write_page()
        fill = self._repeats.drain(self._columns)
        self._columns.settle()
        self._test_casts()
        self._rework(fill, is_last=True)
        self._repeats.warn()

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self.counts.listed >= self.limit

    @property
    def carried(self) -> pa.Schema:
        """The carried columns: the union over all batches."""
        return self._columns.carried

    @property
    def pages(self) -> Folder:
        """The folder of the pages."""
        if self.folder is None:
            path = tempfile.mkdtemp(prefix="imgbatch-listing-")
            weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
            self.folder = Folder(Stores(StorageConfig(), {}), path)
        return self.folder

    def work_plan(self) -> WorkPlan:
        """Return the pending images and streams."""
        return WorkPlan(self._all_pending(), np.array(self._row_group_ranges, np.int64).reshape(-1, 2), self._streams)

    def _all_pending(self) -> Mask:
        self._pending = [np.concatenate(self._pending) if self._pending else np.zeros(0, bool)]
        return self._pending[0]

    def _take(self, batch: pa.RecordBatch, origin: str) -> None:
        self._columns.take(batch.schema, _file_of(batch, origin))
        keys = uri_keys(batch["uri"])
        unique = first_of_each(keys)
        status = np.full(len(batch), DUPLICATE, np.uint8)
        of_unique = self.ledger.index.mark_seen(batch.filter(pa.array(unique)), keys[unique])
        new_rows = np.flatnonzero(of_unique == NEW)
        of_unique[new_rows[~self._new.add(keys[unique][new_rows])]] = DUPLICATE
        status[unique] = of_unique
        duplicate = status == DUPLICATE
        repeated, batch, status = (
            batch.filter(pa.array(duplicate)),
            batch.filter(pa.array(~duplicate)),
            status[~duplicate],
        )
        self._repeats.note(batch)
        self.counts.duplicates += len(repeated)
        self._repeats.add(repeated, keys[duplicate])
        if len(batch):
            self._list(batch, status)

    def _list(self, batch: pa.RecordBatch, status: Status) -> None:
        images, done = self._images(batch, status)
        pending = status != DONE
        self._pending.append(pending)
        self.on_listed(self._entries, batch, pending)
        self._entries += len(batch)
        self.counts.listed += int(images.sum())
        self.counts.already_done += int(done.sum())
        self.counts.stale += int(np.count_nonzero(status == STALE))
        self.counts.bytes += pc.sum(batch["size"].filter(pa.array(pending))).as_py() or 0
        self.counts.unversioned += int(np.count_nonzero(_unversioned(batch) & ~pending))
        self._rows.append(batch)
        self._buffered += len(batch)
        while self._buffered >= listing_pages.PAGE_ROWS:
            self._write_page()

    def _images(self, batch: pa.RecordBatch, status: Status) -> tuple[Numbers, Numbers]:
        """Return the number of images of each row, as far as it is known, and how many of them are done.

        The status of a stream that is read to its end becomes DONE here.
        """
        images = np.ones(len(batch), np.int64)
        done = (status == DONE).astype(np.int64)
        for at in np.flatnonzero(np.asarray(is_stream(batch))).tolist():
            opened = self.ledger.open_stream(batch.slice(at, 1).to_pylist()[0], int(status[at]))
            images[at] = done[at] = opened.rows
            status[at] = opened.status
            if opened.stream is not None:
                self._streams[self._entries + at] = opened.stream
                self.counts.streams += 1
        return images, done

    def _write_page(self) -> None:
        rows = self._buffer()
        page, remaining = rows.slice(0, listing_pages.PAGE_ROWS), rows.slice(listing_pages.PAGE_ROWS)
        self._schemas.append(page.schema)
        self._put(len(self._schemas) - 1, page)
        self._rows, self._buffered = remaining.to_batches(), len(remaining)

    def _buffer(self) -> pa.Table:
        """Return the rows that were not written to a page yet."""
        tables = [self._columns.cast(batch) for batch in self._rows]
        # Cast again: a column may have become text with a later batch.
        return pa.concat_tables([self._columns.cast(table) for table in tables]).combine_chunks()

    def _put(self, number: int, page: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(page, sink, compression="zstd", use_dictionary=carried_fields(page.schema).names)
        self.pages.put(page_name(number), sink.getvalue())
        self._schemas[number] = page.schema

    def _read(self, numbers: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
        """Yield these pages, while the next ones are fetched."""
        with ThreadPoolExecutor(_PREFETCHED_PAGES, "pages") as pool:
            for number, page in prefetch_calls(
                pool, partial(read_page, self.pages), numbers, max_pending=_PREFETCHED_PAGES
            ):
                tick()
                yield number, page

    def _test_casts(self) -> None:
        """Cast all values on pages that may not fit the final type of their column; columns with misfits become text."""
        for _, page in self._read([at for at, schema in enumerate(self._schemas) if self._columns.may_not_fit(schema)]):
            self._columns.cast(page)

    def _rework(self, fill: Fill, *, is_last: bool = False) -> None:
        """Fill in values that images on pages lack; the last time, also convert all pages to one schema."""
        final = self._columns.schema
        numbers = [at for at, schema in enumerate(self._schemas) if len(fill) or (is_last and schema != final)]
        for number, page in self._read(numbers):
            filled = self._filled(number * listing_pages.PAGE_ROWS, self._columns.cast(page), fill)
            if filled is not None or (is_last and page.schema != self._columns.schema):
                self._put(number, self._columns.cast(page) if filled is None else filled)
        if self._rows and len(fill):
            rows = self._buffer()
            filled = self._filled(len(self._schemas) * listing_pages.PAGE_ROWS, rows, fill)
            self._rows = (rows if filled is None else filled).to_batches()

    def _filled(self, first: int, rows: pa.Table, fill: Fill) -> pa.Table | None:
        """Return rows of the listing with the values they lacked, None without new values; `first`: number of the first row."""
        if not len(fill):
            return None
        page, versions = fill.of(rows)
        if versions.any():
            self._mark_changed(first, rows, page, np.flatnonzero(versions))
        return None if page is rows else page

    def _mark_changed(self, first: int, before: pa.Table, page: pa.Table, rows: Numbers) -> None:
        """Compare images with the ledger again if more of their version is known than when they were listed."""
        all_pending = self._all_pending()
        old_rows, new_rows = before.take(pa.array(rows)), page.take(pa.array(rows)).combine_chunks()
        old_sizes, sizes = (np.asarray(single_chunk(table["size"]).fill_null(0)) for table in (old_rows, new_rows))
        pending = all_pending[first + rows]
        self.counts.unversioned -= int(np.count_nonzero(_unversioned(old_rows) & ~pending))
        stale = self.ledger.index.mark_changed(new_rows, uri_keys(single_chunk(new_rows["uri"]))) & ~pending
        all_pending[first + rows[stale]] = True
        self.counts.already_done -= int(stale.sum())
        self.counts.stale += int(stale.sum())
        self.counts.bytes += int((sizes - old_sizes)[pending].sum() + sizes[stale].sum())


def _unversioned(rows: pa.RecordBatch | pa.Table) -> Mask:
    """Return a mask of the rows with neither size, ETag nor time: changes of these images cannot be detected."""
    size, etag, moment = (np.asarray(single_chunk(rows[name]).is_null()) for name in ("size", "etag", "last_modified"))
    unknown: Mask = size & etag & moment
    return unknown


def _file_of(batch: pa.RecordBatch, origin: str) -> str:
    """Return the file of a batch: rows of Parquet files of images name it."""
    if len(batch) and batch["container"][0].as_py() == PARQUET:
        return str(batch["uri"][0].as_py().rpartition("#")[0])
    return origin

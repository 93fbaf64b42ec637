"""Effects: the listing: what the store holds at the start of a run, as numbered Parquet pages below the run.

An image's number in the listing is its name within the run: page `number // PAGE_ROWS`, row `number % PAGE_ROWS`. The
driver keeps 16 bytes of a new image and one of every image; the rest is in the pages, from which workers read.

At the end all pages have one schema, the union of the columns of all batches; and where several rows name an image, its row
has the values of all of them. Pages that were written before this was known are written again.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.prefetch import prefetch_calls
from imgbatch.config.sections import StorageConfig
from imgbatch.ledger.carried import Columns
from imgbatch.ledger.ledger import Ledger, Status
from imgbatch.ledger.repeats import Fill, Repeats
from imgbatch.ledger.status import DONE, DUPLICATE, NEW, STALE
from imgbatch.ledger.tar_progress import OpenShard, Progress, version_of
from imgbatch.schema import PARQUET, TAR, carried_fields, single_chunk
from imgbatch.sources.base import ListingBatch
from imgbatch.storage.stores import Folder, Stores
from imgbatch.uri_index import UriIndex, first_of_each, uri_keys

PAGE_ROWS = 8_192
_PAGES_AHEAD = 4

Mask = npt.NDArray[np.bool_]
Wholes = npt.NDArray[np.int64]
Counted = npt.NDArray[np.int64]


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
    unversioned: int = 0
    """Images that are done, and of which the input tells neither size, ETag nor time: a change of these cannot be seen."""
    updated: int = 0
    """Rows of images that are done, and that got other carried values."""
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
    """Where the pages go; None: into a temporary folder of this machine, for a dry run."""
    limit: int | None = None
    agree: Sequence[str] = ()
    """Carried columns in which two rows of an image may not differ."""
    counts: Counts = field(default_factory=Counts)
    _columns: Columns = field(default_factory=Columns)
    _repeats: Repeats = field(init=False)
    _new: UriIndex = field(default_factory=UriIndex)
    _pending: list[Mask] = field(default_factory=list)
    _rows: list[pa.RecordBatch] = field(default_factory=list)
    _buffered: int = 0
    _schemas: list[pa.Schema] = field(default_factory=list)
    """Of each page that is written."""
    _wholes: list[tuple[int, int]] = field(default_factory=list)
    _entries: int = 0
    _shards: dict[int, OpenShard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._repeats = Repeats(self.agree)

    def take(self, found: Iterable[ListingBatch]) -> None:
        """List everything, or up to the limit, and write the pages.

        Beyond the limit nothing is drawn, so that values of later rows of an image are not known.

        Raises:
            InputError: a column's types do not go together, or rows of an image differ where they may not.
        """
        for each in found:
            self.counts.ignored += each.ignored
            self.counts.ignored_example = self.counts.ignored_example or each.example
            if each.unread:
                self.counts.unread += each.batch["uri"].to_pylist()
            batch = each.batch
            first = self._entries
            while len(batch) and not self.full:
                room = len(batch) if self.limit is None else min(len(batch), self.limit - self.counts.listed)
                self._take(batch.slice(0, room), each.origin)
                batch = batch.slice(room)
                if self._repeats.full:
                    self._rework(self._repeats.drain(self._columns))
            if each.whole:
                self._wholes.append((first, self._entries))
            if self.full:
                break
        while self._buffered:
            self._write_page()
        fill = self._repeats.drain(self._columns)
        self._columns.settle()
        self._test_casts()
        self._rework(fill, last=True)
        self._repeats.warn()

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self.counts.listed >= self.limit

    @property
    def carried(self) -> pa.Schema:
        """The columns that travel along: the union over all batches."""
        return self._columns.carried

    @property
    def pages(self) -> Folder:
        """The folder of the pages."""
        if self.folder is None:
            path = tempfile.mkdtemp(prefix="imgbatch-listing-")
            weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
            self.folder = Folder(Stores(StorageConfig(), {}), path)
        return self.folder

    def todo(self) -> Todo:
        """Return what is to be done."""
        return Todo(self._all_pending(), np.array(self._wholes, np.int64).reshape(-1, 2), self._shards)

    def _all_pending(self) -> Mask:
        self._pending = [np.concatenate(self._pending) if self._pending else np.zeros(0, bool)]
        return self._pending[0]

    def _take(self, batch: pa.RecordBatch, origin: str) -> None:
        self._columns.take(batch.schema, _file_of(batch, origin))
        keys = uri_keys(batch["uri"])
        once = first_of_each(keys)
        status = np.full(len(batch), DUPLICATE, np.uint8)
        firsts = batch.filter(pa.array(once))
        known = self.ledger.visit(firsts, keys[once])
        fresh = np.flatnonzero(known == NEW)
        known[fresh[~self._new.add(keys[once][fresh])]] = DUPLICATE
        status[once] = known
        again = status == DUPLICATE
        repeated, batch, status = batch.filter(pa.array(again)), batch.filter(pa.array(~again)), status[~again]
        self._repeats.note(batch)
        self.counts.duplicates += len(repeated)
        self._repeats.add(repeated, keys[again])
        if len(batch):
            self._list(batch, status)

    def _list(self, batch: pa.RecordBatch, status: Status) -> None:
        images, done = self._images(batch, status)
        pending = status != DONE
        self._pending.append(pending)
        self._entries += len(batch)
        self.counts.listed += int(images.sum())
        self.counts.already_done += int(done.sum())
        self.counts.stale += int(np.count_nonzero(status == STALE))
        self.counts.bytes += pc.sum(batch["size"].filter(pa.array(pending))).as_py() or 0
        self.counts.unversioned += int(np.count_nonzero(_unversioned(batch) & ~pending))
        self._rows.append(batch)
        self._buffered += len(batch)
        while self._buffered >= PAGE_ROWS:
            self._write_page()

    def _images(self, batch: pa.RecordBatch, status: Status) -> tuple[Counted, Counted]:
        """Return how many images each row stands for, as far as that is known, and how many of them are done.

        The status of a tar that is read to its end becomes DONE here; others become shards, which are read from the first
        point on where rows are missing.
        """
        images = np.ones(len(batch), np.int64)
        done = (status == DONE).astype(np.int64)
        for at in np.flatnonzero(np.asarray(pc.fill_null(pc.equal(batch["container"], TAR), False))).tolist():
            row = batch.slice(at, 1).to_pylist()[0]
            version = version_of(row["etag"], row["last_modified"])
            found = self.ledger.visit_tar(row["uri"], version, again=status[at] == STALE, refused=status[at] != NEW)
            if isinstance(found, Progress):
                images[at] = done[at] = found.rows + int(status[at] == DONE)
                status[at] = DONE
                continue
            if status[at] == DONE and not found.unbroken:  # the tar itself has a reject, and rows before it are missing
                self.ledger.renew(row["uri"])
                status[at] = STALE
            refused = int(status[at] == DONE)  # the tar itself has a reject that holds
            images[at] = done[at] = found.there + refused
            if not refused:
                found.refused = bool(status[at] == STALE)
                self._shards[self._entries + at] = found
                self.counts.tars += 1
        return images, done

    def _write_page(self) -> None:
        rows = self._buffer()
        page, rest = rows.slice(0, PAGE_ROWS), rows.slice(PAGE_ROWS)
        self._schemas.append(page.schema)
        self._put(len(self._schemas) - 1, page)
        self._rows, self._buffered = rest.to_batches(), len(rest)

    def _buffer(self) -> pa.Table:
        """Return the rows that are on no page yet."""
        tables = [self._columns.cast(batch) for batch in self._rows]
        # A column may have become text with a later batch.
        return pa.concat_tables([self._columns.cast(table) for table in tables]).combine_chunks()

    def _put(self, number: int, page: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(page, sink, compression="zstd", use_dictionary=carried_fields(page.schema).names)
        self.pages.put(page_name(number), sink.getvalue())
        self._schemas[number] = page.schema

    def _read_ahead(self, numbers: Iterable[int]) -> Iterator[tuple[int, pa.Table]]:
        with ThreadPoolExecutor(_PAGES_AHEAD, "pages") as pool:
            for number, page in prefetch_calls(pool, partial(read_page, self.pages), numbers, max_pending=_PAGES_AHEAD):
                tick()
                yield number, page

    def _test_casts(self) -> None:
        """Find the columns whose values on pages do not fit the type that they are to have: these become text."""
        doubtful = [number for number, schema in enumerate(self._schemas) if self._columns.doubtful(schema)]
        for _, page in self._read_ahead(doubtful):
            self._columns.cast(page)

    def _rework(self, fill: Fill, *, last: bool = False) -> None:
        """Fill the pages with what is known of their images; the last time, bring all of them to one schema as well."""
        schema = self._columns.schema
        wanted = [number for number, known in enumerate(self._schemas) if len(fill) or (last and known != schema)]
        for number, page in self._read_ahead(wanted):
            filled = self._filled(number * PAGE_ROWS, self._columns.cast(page), fill)
            if filled is not None or (last and page.schema != self._columns.schema):
                self._put(number, self._columns.cast(page) if filled is None else filled)
        if self._rows and len(fill):
            rows = self._buffer()
            filled = self._filled(len(self._schemas) * PAGE_ROWS, rows, fill)
            self._rows = (rows if filled is None else filled).to_batches()

    def _filled(self, first: int, rows: pa.Table, fill: Fill) -> pa.Table | None:
        """Return rows of the listing, of which the first has this number, with what they lacked; None: with nothing new."""
        if not len(fill):
            return None
        page, versions = fill.of(rows)
        if versions.any():
            self._visit_again(first, rows, page, np.flatnonzero(versions))
        return None if page is rows else page

    def _visit_again(self, first: int, before: pa.Table, page: pa.Table, rows: Wholes) -> None:
        """Compare images with the ledger again of which more is known than when they were visited."""
        pending = self._all_pending()
        chosen = page.take(pa.array(rows)).combine_chunks()
        was, sizes = (
            np.asarray(single_chunk(each["size"]).fill_null(0)) for each in (before.take(pa.array(rows)), chosen)
        )
        todo = pending[first + rows]
        self.counts.unversioned -= int(np.count_nonzero(_unversioned(before.take(pa.array(rows))) & ~todo))
        stale = self.ledger.visit_again(chosen, uri_keys(single_chunk(chosen["uri"]))) & ~todo
        pending[first + rows[stale]] = True
        self.counts.already_done -= int(stale.sum())
        self.counts.stale += int(stale.sum())
        self.counts.bytes += int((sizes - was)[todo].sum() + sizes[stale].sum())


def _unversioned(rows: pa.RecordBatch | pa.Table) -> Mask:
    """Return a mask of the rows that say nothing by which a change of the image could be told."""
    size, etag, moment = (np.asarray(single_chunk(rows[name]).is_null()) for name in ("size", "etag", "last_modified"))
    unknown: Mask = size & etag & moment
    return unknown


def _file_of(batch: pa.RecordBatch, origin: str) -> str:
    """Return the file of a batch: rows of Parquet files of images name it."""
    if len(batch) and batch["container"][0].as_py() == PARQUET:
        return str(batch["uri"][0].as_py().rpartition("#")[0])
    return origin


def page_names(rows: int) -> list[str]:
    """Return the names of the pages of a listing with so many rows."""
    return [page_name(number) for number in range(-(-rows // PAGE_ROWS))]


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

"""Effects: the inputs of training and evaluation: their listing, and the label and split of each image."""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.monitor import tick
from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.ledger.candidates import candidates
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing
from imgbatch.ledger.listing_pages import pages
from imgbatch.schema import LISTING, TAR, single_chunk
from imgbatch.sources import sidecars
from imgbatch.sources.base import ListingBatch, Source
from imgbatch.sources.declared import Declaration, decide
from imgbatch.sources.label_summary import LabelSummary
from imgbatch.sources.labelled import GROUP, OBJECT_OF, SPLIT, TABLE_OF, TRUTH, Columns, labelled_sources
from imgbatch.sources.objects import MAGIC, are_images
from imgbatch.sources.places import Places, Root
from imgbatch.sources.sidecars import NO_SPLIT, REFUSED
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal.plurals import counted

Ints = npt.NDArray[np.int64]

_LISTED = pa.schema([*LISTING, (TRUTH, pa.string())])

AGREE = (TRUTH, SPLIT, GROUP)
"""Columns in which two rows of one image may not differ."""


def roots_of(sources: Sequence[Source]) -> list[Root]:
    """Return the folder of each input below which folders may be classes and splits."""
    return [replace(_root(source), group=source.group) for source in sources]


def _root(source: Source) -> Root:
    folder, _, name = source.uri.rpartition("/")
    if source.kind == "folder":
        return Root(source.uri, source.kind)
    if source.kind == "glob":
        folder = source.uri[: MAGIC.search(source.uri).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if source.kind == "object":
        folder = folder.rpartition("/")[0]
    if source.kind == "inventory":  # its objects may be anywhere
        folder = ""
    return Root(folder, source.kind, file=name if source.kind == "manifest" else "", input=source.uri)


@dataclass
class Resolver:
    """Collects all images, decides where labels and splits come from, and returns those of each image."""

    stores: Stores
    sources: Sequence[Source]
    columns: Sequence[Columns]
    config: SourceConfig
    splits: bool = True
    """Whether columns, and keys of sidecars, are searched for the split."""
    understood: LabelSummary = field(default_factory=LabelSummary)
    declaration: Declaration | None = None
    tars: dict[str, int] = field(default_factory=dict)
    """The tars that are listed, and the number of the input that listed each."""
    _problems: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = Places(roots_of(self.sources), folders_of_tables=self.config.labels == "folders")

    def add(self, listed: pa.Table | pa.RecordBatch) -> None:
        """Add some images, or tars; see `Places.add`."""
        unread = listed.filter(self._places.is_unread(listed))
        self.tars.update(zip(unread["uri"].to_pylist(), unread[OBJECT_OF].to_pylist(), strict=True))
        self._places.add(listed)

    def members(self, rows: pa.Table, tars: pa.Array, numbers: pa.Array) -> pa.Table:
        """Return members of tars as rows of a listing, with the content of their sidecars.

        Args:
            rows: `uri`, the texts of sidecars in `cls` and `json`, and optionally problems of other sidecars in `loose`.
            tars: the URI of the tar of each member.
            numbers: the number of the input that listed the tar.
        """
        parsed = sidecars.read(rows["cls"].to_pylist(), rows["json"].to_pylist(), self.config)
        columns = {
            "uri": single_chunk(rows["uri"]), "container": pa.repeat(TAR, len(rows)), "tar": tars, OBJECT_OF: numbers,
            TABLE_OF: pa.nulls(len(rows), pa.int32()), TRUTH: parsed.labels, GROUP: parsed.groups,
            SPLIT: parsed.splits if self.splits else pa.nulls(len(rows), pa.string()),
        }  # fmt: skip
        table = pa.table(columns)
        loose = single_chunk(rows["loose"]) if "loose" in rows.column_names else pa.nulls(len(rows), pa.string())
        self.add_problems(table, pc.coalesce(parsed.problems, loose))
        return table

    def add_problems(self, members: pa.Table, problems: pa.Array) -> None:
        """Add the problems of the sidecars of some members.

        Raises:
            InputError: a sidecar that must not be ignored.
        """
        wrong = members.select(["uri", OBJECT_OF]).append_column("problem", problems).filter(pc.is_valid(problems))
        for row in wrong.to_pylist():
            problem = row["problem"]
            if problem.startswith(NO_SPLIT) and not (self.splits and self.config.splits in ("auto", "column")):
                continue
            if problem.startswith((REFUSED, NO_SPLIT)):
                raise InputError(f"{row['uri']}: {problem.removeprefix(REFUSED).removeprefix(NO_SPLIT)}")
            self.add_problem(row[OBJECT_OF], row["uri"], problem)

    def add_problem(self, number: int, uri: str, problem: str) -> None:
        """Add the reason why sidecars of an input may hold labels that are not read: an error if folders become the labels."""
        self._problems.setdefault(self.sources[number].group, (uri, problem))

    def decide(self) -> Declaration:
        """Decide where labels and splits come from.

        Raises:
            InputError: see `declared.decide`; or sidecars may hold labels in an unsupported form.
        """
        declaration = decide(self._places, self.columns, self.config, lambda uris: are_images(self.stores, uris))
        labels = dict(zip(dict.fromkeys(source.group for source in self.sources), declaration.origins, strict=True))
        for group, (uri, problem) in self._problems.items():
            if labels[group].labels == "folders" and self.config.labels == "auto":
                raise InputError(f"{uri}: {problem}; source.labels=folders takes the folders in the tar as classes")
        self.declaration, self.understood = declaration, LabelSummary()
        return declaration

    def apply(self, listed: pa.Table | pa.RecordBatch) -> tuple[pa.Array, Ints]:
        """Return the label, null if there is none, and the split of each image, and count them."""
        assert self.declaration is not None
        labels, splits = self.declaration.apply(listed)
        is_counted = pc.invert(pc.or_(self._places.is_unread(listed), self.declaration.is_ignored(listed)))
        self.understood.add(
            labels.filter(is_counted), splits[np.asarray(is_counted)], single_chunk(listed["uri"]).filter(is_counted)
        )
        return labels, splits

    def is_ignored(self, listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return a mask of the objects that are no images, by their first bytes."""
        assert self.declaration is not None
        return self.declaration.is_ignored(listed)

    def lines(self) -> list[str]:
        """Return a summary of the inputs as a table; see `LabelSummary.lines`."""
        assert self.declaration is not None
        lines = self.understood.lines(self.declaration.origins)
        if self.declaration.overridden:
            lines.append(
                f"{counted(self.declaration.overridden, 'image')} with another label than the folder that holds them"
            )
        if self.declaration.ignored:
            lines.append(
                f"{counted(len(self.declaration.ignored), 'object')} without a suffix ignored: no images, by their bytes"
            )
        return lines

    def public(self) -> dict[str, Any]:
        """Return the same as plain values, for a record."""
        assert self.declaration is not None
        return self.understood.public(self.declaration.origins)


@dataclass(frozen=True, slots=True)
class Relisted:
    """Inputs that were listed, and a source that lists them again with labels."""

    resolver: Resolver
    source: Source
    """One source for all inputs; its rows have the label in TRUTH."""


@contextmanager
def relisted(
    stores: Stores,
    inputs: Sequence[Source],
    config: SourceConfig,
    select: Callable[[pa.Table, Ints], pa.Array],
    *,
    splits: bool = True,
) -> Iterator[Relisted]:
    """List all inputs once, into temporary files, decide on labels and splits, and return a source of the selected images.

    Args:
        select: returns a mask of the selected images, from their rows and splits.
        splits: whether columns are searched for the split.

    Raises:
        InputError: the inputs are ambiguous.
    """
    with tempfile.TemporaryDirectory(prefix="imgbatch-") as directory:
        folder = Folder(stores, directory)
        listing = Listing(Ledger(folder.folder("none"), {}, read_only=True).open(), folder, agree=AGREE)
        sources, columns = labelled_sources(inputs, config, splits=splits)
        with candidates(sources, allow_empty=config.allow_empty) as batches:
            listing.take(batches)
        resolver = Resolver(stores, inputs, columns, config, splits)
        for page in pages(folder):
            tick()
            resolver.add(page)
        resolver.decide()
        counts = listing.counts

        def list_selected() -> Iterator[ListingBatch]:
            resolver.understood = LabelSummary()
            yield ListingBatch(pa.RecordBatch.from_pylist([], schema=_LISTED), counts.ignored, counts.ignored_example)
            yield from _listed_again(folder, listing, resolver, select)

        def probe() -> Iterator[ListingBatch]:
            return chain.from_iterable(source.list_images() for source in inputs)

        yield Relisted(
            resolver, Source(", ".join(source.uri for source in inputs), "inputs", list_selected, probe=probe)
        )


def _listed_again(
    folder: Folder, listing: Listing, resolver: Resolver, select: Callable[[pa.Table, Ints], pa.Array]
) -> Iterator[ListingBatch]:
    """Yield the rows of a listing with their labels; each row group that is read as a whole is a batch."""
    for rows, is_whole in _segments(pages(folder), listing.work_plan().row_group_ranges):
        labels, splits = resolver.apply(rows)
        rows = rows.set_column(rows.schema.get_field_index(TRUTH), TRUTH, labels)
        is_selected = pc.and_not(select(rows, splits), resolver.is_ignored(rows))
        rows = rows.filter(is_selected).drop_columns([OBJECT_OF, TABLE_OF])
        for batch in rows.combine_chunks().to_batches():
            yield ListingBatch(batch, whole=is_whole)


def _segments(tables: Iterator[pa.Table], ranges: Ints) -> Iterator[tuple[pa.Table, bool]]:
    """Cut tables, numbered row by row, so that each range of `ranges` is a table of its own.

    >>> tables = iter([pa.table({"n": [0, 1, 2]}), pa.table({"n": [3, 4, 5]})])
    >>> [(t["n"].to_pylist(), whole) for t, whole in _segments(tables, np.array([[1, 4]]))]
    [([0], False), ([1, 2, 3], True), ([4, 5], False)]
    """
    ends = {int(start): int(end) for start, end in ranges if start < end}
    starts = sorted(ends)
    number, range_end, parts = 0, None, []
    for table in tables:
        while len(table):
            range_end = range_end or ends.get(number)
            following = bisect_right(starts, number)
            stop = range_end or (starts[following] if following < len(starts) else number + len(table))
            part, table = table.slice(0, stop - number), table.slice(stop - number)
            number += len(part)
            if range_end is None:
                yield part, False
                continue
            parts.append(part)
            if number == range_end:
                yield pa.concat_tables(parts), True
                range_end, parts = None, []

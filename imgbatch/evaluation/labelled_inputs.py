"""Effects: the inputs of training and evaluation, listed, and the label and split of each image as the inputs declare them."""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing
from imgbatch.ledger.listing_pages import pages
from imgbatch.schema import CARRIED, LISTING, TAR, whole
from imgbatch.sources import sidecars
from imgbatch.sources.base import ListingBatch, Source
from imgbatch.sources.declared import Declaration, decide
from imgbatch.sources.label_summary import LabelSummary
from imgbatch.sources.labelled import GROUP, OBJECT_OF, SPLIT, TABLE_OF, TRUTH, Columns, labelled_sources
from imgbatch.sources.objects import MAGIC, are_images
from imgbatch.sources.places import Places, Root
from imgbatch.sources.sidecars import NO_SPLIT, REFUSED
from imgbatch.sources.split_words import SPLIT_NAMES
from imgbatch.sources.tar_reader import key_of
from imgbatch.sources.tars import loose_label, read_sidecars
from imgbatch.storage.stores import Folder, Stores
from imgbatch.terminal.plurals import counted

Ints = npt.NDArray[np.int64]

_NONE = pa.schema([*LISTING, (TRUTH, pa.string())])

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
    if source.kind == "inventory":  # whose objects may lie anywhere
        folder = ""
    return Root(folder, source.kind, file=name if source.kind == "manifest" else "", input=source.uri)


@dataclass
class Resolver:
    """Learns of all images, decides, and says the label and split of each."""

    stores: Stores
    sources: Sequence[Source]
    columns: Sequence[Columns]
    config: SourceConfig
    splits: bool = True
    """Whether columns, and keys of sidecars, are asked for the split."""
    understood: LabelSummary = field(default_factory=LabelSummary)
    declaration: Declaration | None = None
    tars: dict[str, int] = field(default_factory=dict)
    """The tars that are listed, and the number of the input that listed each."""
    _problems: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = Places(roots_of(self.sources), folders_of_tables=self.config.labels == "folders")

    def add(self, listed: pa.Table | pa.RecordBatch) -> None:
        """Learn of some images, or tars; see `Places.add`."""
        unread = listed.filter(self._places.is_unread(listed))
        self.tars.update(zip(unread["uri"].to_pylist(), unread[OBJECT_OF].to_pylist(), strict=True))
        self._places.add(listed)

    def members(self, rows: pa.Table, tars: pa.Array, numbers: pa.Array) -> pa.Table:
        """Return members of tars as rows of a listing, with what their sidecars say.

        Args:
            rows: `uri`, the texts of sidecars in `cls` and `json`, and perhaps in `loose` what is wrong with others.
            tars: the URI of each one's tar.
            numbers: of the input that listed it.
        """
        said = sidecars.read(rows["cls"].to_pylist(), rows["json"].to_pylist(), self.config)
        columns = {
            "uri": whole(rows["uri"]), "container": pa.repeat(TAR, len(rows)), "tar": tars, OBJECT_OF: numbers,
            TABLE_OF: pa.nulls(len(rows), pa.int32()), TRUTH: said.labels, GROUP: said.groups,
            SPLIT: said.splits if self.splits else pa.nulls(len(rows), pa.string()),
        }  # fmt: skip
        table = pa.table(columns)
        loose = whole(rows["loose"]) if "loose" in rows.column_names else pa.nulls(len(rows), pa.string())
        self.add_problems(table, pc.coalesce(said.problems, loose))
        return table

    def add_problems(self, members: pa.Table, problems: pa.Array) -> None:
        """Learn what is wrong with the sidecars of some members.

        Raises:
            InputError: one of them can never be passed over.
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
        """Learn why sidecars of an input may hold labels that are not read; this matters if folders are the labels then."""
        self._problems.setdefault(self.sources[number].group, (uri, problem))

    def decide(self) -> Declaration:
        """Decide where labels and splits come from, from all that is known.

        Raises:
            InputError: see `declared.decide`; or sidecars may hold labels in a form that is not read.
        """
        found = decide(self._places, self.columns, self.config, lambda uris: are_images(self.stores, uris))
        labels = dict(zip(dict.fromkeys(source.group for source in self.sources), found.origins, strict=True))
        for group, (uri, problem) in self._problems.items():
            if labels[group].labels == "folders" and self.config.labels == "auto":
                raise InputError(f"{uri}: {problem}; source.labels=folders takes the folders in the tar as classes")
        self.declaration, self.understood = found, LabelSummary()
        return found

    def apply(self, listed: pa.Table | pa.RecordBatch) -> tuple[pa.Array, Ints]:
        """Return the label, null where there is none, and the split of each image, which are counted."""
        assert self.declaration is not None
        labels, splits = self.declaration.apply(listed)
        counted = pc.invert(pc.or_(self._places.is_unread(listed), self.declaration.is_ignored(listed)))
        self.understood.add(labels.filter(counted), splits[np.asarray(counted)], whole(listed["uri"]).filter(counted))
        return labels, splits

    def is_ignored(self, listed: pa.Table | pa.RecordBatch) -> pa.Array:
        """Return a mask of the objects that turned out to be no images."""
        assert self.declaration is not None
        return self.declaration.is_ignored(listed)

    def lines(self) -> list[str]:
        """Return what was understood, as a table; see `LabelSummary.lines`."""
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
        """Return the same for a record."""
        assert self.declaration is not None
        return self.understood.public(self.declaration.origins)


@dataclass(frozen=True, slots=True)
class Relisted:
    """Inputs that were listed, and how to list them again with labels."""

    resolver: Resolver
    source: Source
    """One in place of all of them, whose rows have the label in TRUTH and the split's number in SPLIT."""


@contextmanager
def relisted(
    stores: Stores,
    given: Sequence[Source],
    config: SourceConfig,
    wanted: Callable[[pa.Table, Ints], pa.Array],
    *,
    splits: bool = True,
) -> Iterator[Relisted]:
    """List all inputs once, into files of this process, decide, and give a source that lists what is wanted of them.

    Args:
        wanted: says from the rows and their splits which are to be listed.
        splits: whether columns are asked for the split.

    Raises:
        InputError: what the inputs say can be meant in two ways.
    """
    with tempfile.TemporaryDirectory(prefix="imgbatch-") as place:
        folder = Folder(stores, place)
        listing = Listing(Ledger(folder.folder("none"), {}, read_only=True).open(), folder, agree=AGREE)
        sources, columns = labelled_sources(given, config, splits=splits)
        with candidates(sources, allow_empty=config.allow_empty) as batches:
            listing.take(batches)
        resolver = Resolver(stores, given, columns, config, splits)
        for page in pages(folder):
            tick()
            resolver.add(page)
        resolver.decide()
        counts = listing.counts

        def found() -> Iterator[ListingBatch]:
            resolver.understood = LabelSummary()
            yield ListingBatch(pa.RecordBatch.from_pylist([], schema=_NONE), counts.ignored, counts.ignored_example)
            yield from _listed_again(folder, listing, resolver, wanted)

        def probe() -> Iterator[ListingBatch]:
            return chain.from_iterable(source.list_images() for source in given)

        yield Relisted(resolver, Source(", ".join(source.uri for source in given), "inputs", found, probe=probe))


def _listed_again(
    folder: Folder, listing: Listing, resolver: Resolver, wanted: Callable[[pa.Table, Ints], pa.Array]
) -> Iterator[ListingBatch]:
    """Yield the rows of a listing with their labels, what is read as a whole in one batch."""
    for rows, is_whole in _segments(pages(folder), listing.work_plan().row_group_ranges):
        labels, splits = resolver.apply(rows)
        rows = rows.set_column(rows.schema.get_field_index(TRUTH), TRUTH, labels)
        kept = pc.and_not(wanted(rows, splits), resolver.is_ignored(rows))
        rows = rows.filter(kept).drop_columns([OBJECT_OF, TABLE_OF])
        for batch in rows.combine_chunks().to_batches():
            yield ListingBatch(batch, whole=is_whole)


def _segments(tables: Iterator[pa.Table], ranges: Ints) -> Iterator[tuple[pa.Table, bool]]:
    """Cut tables, numbered row by row, so that each range of `ranges` is a table of its own.

    >>> tables = iter([pa.table({"n": [0, 1, 2]}), pa.table({"n": [3, 4, 5]})])
    >>> [(t["n"].to_pylist(), whole) for t, whole in _segments(tables, np.array([[1, 4]]))]
    [([0], False), ([1, 2, 3], True), ([4, 5], False)]
    """
    ends = {int(first): int(end) for first, end in ranges if first < end}
    starts = sorted(ends)
    number, until, parts = 0, None, []
    for table in tables:
        while len(table):
            until = until or ends.get(number)
            following = bisect_right(starts, number)
            stop = until or (starts[following] if following < len(starts) else number + len(table))
            part, table = table.slice(0, stop - number), table.slice(stop - number)
            number += len(part)
            if until is None:
                yield part, False
                continue
            parts.append(part)
            if number == until:
                yield pa.concat_tables(parts), True
                until, parts = None, []


class TarMembers:
    """The members of listed tars, as the tables of an output have them, with the sidecars of each.

    The main job keeps the sidecars that are beside their image in the tar. A tar with an image that has none is read once more,
    for sidecars that are elsewhere in it.
    """

    def __init__(self, output: Folder, resolver: Resolver) -> None:
        self._output, self._resolver = output, resolver
        self._elsewhere: dict[str, Mapping[str, Mapping[str, str]]] = {}
        self._matched: set[str] = set()
        """The tars in which sidecars elsewhere have an image."""
        self.unread = set(resolver.tars)
        """The tars of which no row was found."""

    def labelled(self, split: str | None) -> Iterator[pa.Table]:
        """Yield the members of one split, or of all, with their label in TRUTH; and the tars that have a row themselves.

        Raises:
            InputError: what the inputs say can be meant in two ways.
        """
        for table in self._members():
            self._resolver.add(table)
        for tar, late in self._elsewhere.items():
            if tar not in self._matched and (loose := loose_label(tar, late, ())):
                self._resolver.add_problem(self._resolver.tars[tar], tar, loose)
        self._resolver.decide()
        for table in self._members():
            labels, splits = self._resolver.apply(table)
            table = table.set_column(table.schema.get_field_index(TRUTH), TRUTH, labels)
            if split is not None:
                itself = pc.equal(table["uri"], table["tar"])
                table = table.filter(pc.or_(itself, pa.array(splits == SPLIT_NAMES.index(split))))
            yield table

    def _members(self) -> Iterator[pa.Table]:
        for name in ("labels", "rejects"):
            log = Log(self._output.folder(name))
            log.scan()
            for number in log.numbers:
                tick()
                rows, _ = log.part(number)
                tars = self._tars_of(rows["uri"]) if len(rows) else pa.nulls(0, pa.string())
                rows, tars = rows.filter(pc.is_valid(tars)), tars.drop_null()
                if len(rows):
                    self.unread.difference_update(pc.unique(tars).to_pylist())
                    numbers = [self._resolver.tars[tar] for tar in tars.to_pylist()]
                    yield self._resolver.members(self._with_sidecars(rows, tars), tars, pa.array(numbers, pa.int32()))

    def _with_sidecars(self, rows: pa.Table, tars: pa.Array) -> pa.Table:
        """Return the URIs of members with the texts of their `.cls` and `.json`."""
        columns: dict[str, list[str | None]] = {
            kind: rows[CARRIED + kind].to_pylist() if CARRIED + kind in rows.column_names else [None] * len(rows)
            for kind in ("cls", "json")
        }
        if self._resolver.config.labels != "folders":
            beside = sidecars.read(columns["cls"], columns["json"], self._resolver.config).labels
            for at in np.flatnonzero(np.asarray(beside.is_null())).tolist():
                uri, tar = rows["uri"][at].as_py(), tars[at].as_py()
                if uri != tar:
                    found = self._elsewhere_in(tar).get(key_of(uri[len(tar) + 1 :]) or "", {})
                    self._matched.update([tar] if found else [])
                    for kind, values in columns.items():
                        values[at] = found.get(CARRIED + kind, values[at])
        return pa.table({"uri": whole(rows["uri"]), **{kind: pa.array(v, pa.string()) for kind, v in columns.items()}})

    def _elsewhere_in(self, tar: str) -> Mapping[str, Mapping[str, str]]:
        if tar not in self._elsewhere:
            self._elsewhere[tar] = read_sidecars(self._resolver.stores, tar, self._resolver.config.suffixes)
        return self._elsewhere[tar]

    def _tars_of(self, uris: pa.ChunkedArray) -> pa.Array:
        """Return which listed tar each row is of, null where it is of none: `TAR#MEMBER`, or the tar."""
        parts, known = pc.split_pattern(whole(uris), "#"), pa.array(sorted(self._resolver.tars), pa.string())
        tars, deepest = pa.nulls(len(parts), pa.string()), pc.max(pc.list_value_length(parts)).as_py() or 0
        for length in range(1, deepest + 1):  # a folder around the tar, and a member, may have a # in their names
            place = pc.binary_join(pc.list_slice(parts, 0, length), "#")
            tars = pc.coalesce(tars, pc.if_else(pc.is_in(place, known), place, None))
        return tars

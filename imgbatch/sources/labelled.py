"""Effects: sources of labelled images: the label, split and group of each row, and the input that lists it.

`labelled_sources` prepares the batches of the sources for a listing. `declared.py` decides from all of them where labels and
splits come from. Tars are listed in place of their members, whose labels are known after the tar has been read.
"""

from __future__ import annotations

import ast
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.schema import CARRIED, PARQUET, single_chunk
from imgbatch.sources.base import ListingBatch, Source
from imgbatch.sources.sidecars import LABEL_SYNONYMS, SPLIT_SYNONYMS
from imgbatch.sources.spelling import folded, near_miss, normalised
from imgbatch.sources.split_words import SPLIT_NAMES, WORDS, canonical_splits, split_of_file
from imgbatch.terminal.plurals import counted

TRUTH = CARRIED + "label"
"""The column with the true class of an image, whatever its name in the source."""

SPLIT, GROUP = CARRIED + "split", CARRIED + "group"

OBJECT_OF, TABLE_OF = CARRIED + "@object", CARRIED + "@table"
"""The number of the input that lists an image as an object or in a container, and of the input whose table names it."""

_MAX_VALUES = 12
_MAX_TEXT = 1_000

log = logging.getLogger(__name__)


@dataclass
class Columns:
    """The columns of the tables of one input, collected while it is listed."""

    names: set[str] = field(default_factory=set)
    """The names of the columns, without the prefix."""
    tables: bool = False
    """Whether the input has rows of tables."""
    sidecar: str = ""
    """A file next to the images that may hold a label, if there is one."""
    values: dict[str, set[str] | None] = field(default_factory=dict)
    """The distinct values of each text column; None if there are more than `_MAX_VALUES`."""

    @classmethod
    def merge(cls, parts: Sequence[Columns]) -> Columns:
        """Return the columns of several sources together."""
        sidecar = next((part.sidecar for part in parts if part.sidecar), "")
        names = {name for part in parts for name in part.names}
        return cls(names, any(part.tables for part in parts), sidecar)

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the columns of some rows of a table."""
        self.tables = True
        for carried in (name for name in batch.schema.names if name.startswith(CARRIED)):
            name, kind = carried.removeprefix(CARRIED), batch.schema.field(carried).type
            self.names.add(name)
            values = self.values.setdefault(name, set())
            if values is not None and (pa.types.is_string(kind) or pa.types.is_dictionary(kind)):
                values |= {folded(str(value)) for value in pc.unique(batch[carried]).to_pylist() if value}
                self.values[name] = values if len(values) <= _MAX_VALUES else None

    def with_split_words(self) -> str | None:
        """Return a column whose values are all split words, and name more than one split."""
        for name, values in self.values.items():
            if values and values <= WORDS.keys() and len({WORDS[value] for value in values}) > 1:
                return name
        return None


def labelled_sources(
    sources: Sequence[Source], config: SourceConfig, *, splits: bool = True
) -> tuple[list[Source], list[Columns]]:
    """Return sources whose rows have TRUTH, SPLIT and GROUP, and the number of their input in OBJECT_OF or TABLE_OF.

    Names are normalised; an empty one is null. The second result is filled while the sources are listed.

    Args:
        splits: whether columns may declare the split.

    Raises:
        InputError: at the end of a source: a table lacks a required column, or has a near miss of its name.
    """
    all_columns, lock = [Columns() for _ in sources], threading.Lock()

    def list_images(number: int, source: Source) -> Iterator[ListingBatch]:
        columns, name = all_columns[number], source.uri.rpartition("/")[2] if source.kind == "manifest" else ""
        unlabelled = 0
        for listed in source.list_images():
            with lock:
                columns.sidecar = columns.sidecar or listed.sidecar
                in_table = listed.by_table or pc.any(pc.equal(listed.batch["container"], PARQUET)).as_py()
                if len(listed.batch) and in_table:
                    columns.add(listed.batch)
            by_table = listed.by_table or listed.unread
            batch = _with_label_columns(listed.batch, number, config, by_table=by_table, splits=splits)
            batch = _with_split_of_name(batch, listed.batch, name, config) if splits else batch
            if source.annotated and config.labels != "folders":
                unlabelled += batch[TRUTH].null_count
                listed, batch = _without_unlabelled(listed, batch)
            yield replace(listed, batch=batch)
        if source.annotated:
            _report_unlabelled(source.uri, unlabelled, columns, config)
        if not splits:
            columns.names.discard(config.split_column or "split")
        require_columns(source.uri, columns, config, splits=splits)

    labelled = [
        replace(source, list_images=partial(list_images, number, source)) for number, source in enumerate(sources)
    ]
    return labelled, all_columns


def _without_unlabelled(listed: ListingBatch, batch: pa.RecordBatch) -> tuple[ListingBatch, pa.RecordBatch]:
    """Return tasks of Label Studio without those that have no label, which count as ignored."""
    is_labelled = batch[TRUTH].is_valid()
    without = batch.filter(pc.invert(is_labelled))
    if not len(without):
        return listed, batch
    example = listed.example or without["uri"][0].as_py()
    return replace(listed, ignored=listed.ignored + len(without), example=example), batch.filter(is_labelled)


def _report_unlabelled(uri: str, count: int, columns: Columns, config: SourceConfig) -> None:
    """Log how many tasks of an export have no label.

    Raises:
        InputError: no task has one by the control that names the classes.
    """
    label = config.label_column or "label"
    if label not in columns.names and config.labels != "folders":
        raise InputError(
            f"{uri} is an export of Label Studio in which no task has an annotation by the control {label!r}; its columns are: "
            f"{', '.join(sorted(columns.names)) or 'none'}. Label images, and export as JSON again; or name another control "
            "with source.label_column"
        )
    if count:
        log.warning("%s: %s without a label omitted: skipped, or not yet labelled", uri, counted(count, "task"))


def require_columns(uri: str, columns: Columns, config: SourceConfig, *, splits: bool = True) -> None:
    """Refuse tables that lack a required column or have a near miss of its name.

    Raises:
        InputError: naming the columns of the table, and the option that decides.
    """
    if not columns.tables:
        return
    names = sorted(columns.names)
    label, split = config.label_column or "label", config.split_column or "split"
    if label not in columns.names and config.labels != "folders":
        near = near_miss(label, names, LABEL_SYNONYMS)
        hint = f"Did you mean {near!r}? Set source.label_column={near}" if near else "Name one with source.label_column"
        raise InputError(
            f"{uri} has no column {label!r}; its other columns are: {', '.join(names) or 'none'}. {hint}, or set "
            "source.labels=folders if the folders of the images are their classes"
        )
    if "group" not in columns.names and (near := near_miss("group", names)):
        log.warning(
            "%s has no column 'group'. Its column %r is ignored: rename it if images are to be grouped", uri, near
        )
    if not splits or split in columns.names or config.splits not in ("auto", "column"):
        return
    near = near_miss(split, names, SPLIT_SYNONYMS) or columns.with_split_words()
    if near or config.splits == "column" or config.split_column:
        hint = f"Did you mean {near!r}? Set source.split_column={near}, or" if near else "Set"
        raise InputError(
            f"{uri} has no column {split!r}; its other columns are: {', '.join(names)}. {hint} source.splits=none if the "
            "table has no splits"
        )


def _with_label_columns(
    batch: pa.RecordBatch, number: int, config: SourceConfig, *, by_table: bool, splits: bool
) -> pa.RecordBatch:
    named = {TRUTH: config.label_column or "label", SPLIT: config.split_column or "split", GROUP: "group"}
    columns = {name: text_column(batch, CARRIED + column) for name, column in named.items() if splits or name != SPLIT}
    columns[SPLIT] = canonical_splits(columns[SPLIT], named[SPLIT]) if splits else pa.nulls(len(batch), pa.string())
    numbers = pa.repeat(pa.scalar(number, pa.int32()), len(batch))
    none = pa.nulls(len(batch), pa.int32())
    columns |= {OBJECT_OF: none, TABLE_OF: numbers} if by_table else {OBJECT_OF: numbers, TABLE_OF: none}
    others = {name: batch[name] for name in batch.schema.names if name not in columns}
    return pa.RecordBatch.from_pydict({**others, **columns})


def _with_split_of_name(
    batch: pa.RecordBatch, listed: pa.RecordBatch, table: str, config: SourceConfig
) -> pa.RecordBatch:
    """Set SPLIT to the split in the name of the table, unless the table has a column for it.

    In a column, the split also applies to images that a folder lists, and two tables that name one image can be compared.
    """
    by_column = config.splits != "names" and CARRIED + (config.split_column or "split") in listed.schema.names
    code = split_of_file(table) if config.splits in ("auto", "names") and not by_column else None
    if config.splits != "names" and code is None:
        return batch
    splits = pa.nulls(len(batch), pa.string()) if code is None else pa.repeat(SPLIT_NAMES[code], len(batch))
    return batch.set_column(batch.schema.get_field_index(SPLIT), SPLIT, splits)


def text_column(listed: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """Return a column as normalised text; null for empty text and NaN, and everywhere if the column is missing.

    Raises:
        InputError: it has values that are not text or numbers, or text that is a list.
    """
    if name not in listed.schema.names:
        return pa.nulls(len(listed), pa.string())
    shown, column = name.removeprefix(CARRIED), single_chunk(listed[name])
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    try:
        values = normalised(column)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise InputError(
            f"the column {shown!r} has values of type {listed[name].type}, but must have one text or number for each image"
        ) from error
    for value in pc.unique(values.filter(pc.match_substring_regex(values, r"(?s)^(\[.*\]|\{.*\})$"))).to_pylist():
        if _is_list(value):
            uri = listed["uri"].filter(pc.equal(values, value))[0].as_py()
            raise InputError(f"the column {shown!r} has {value[:80]} for {uri}: an image has only one {shown}")
    return pc.if_else(pc.equal(values, ""), None, values)


_QUOTED_ITEMS = re.compile(r"(?s)[\[{].*(['\"]).*\1.*(['\"]).*\2.*[\]}]")


def _is_list(value: str) -> bool:
    """Return whether a text is a list or an object, in the notation of JSON, Python or NumPy."""
    if len(value) > _MAX_TEXT or _QUOTED_ITEMS.fullmatch(value):
        return True
    try:
        return isinstance(ast.literal_eval(value), list | dict | set)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False

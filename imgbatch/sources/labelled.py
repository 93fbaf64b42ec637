"""Effects: sources whose images have a known class: what each row says itself of label, split and group, and which input
named it.

`marked` prepares the batches of the sources for a listing; `declared.py` decides from all of them where labels and splits come
from. A tar is listed in place of its members, whose labels are known once it is read.
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
from imgbatch.schema import CARRIED, PARQUET, TAR, single_chunk
from imgbatch.sources.base import ListingBatch, Source
from imgbatch.sources.sidecars import ALSO_LABEL, ALSO_SPLIT
from imgbatch.sources.spelling import folded, near_miss, normalised
from imgbatch.sources.split_words import SPLIT_NAMES, WORDS, canonical, of_file

TRUTH = CARRIED + "label"
"""The column in which an image's true class travels, whatever the source calls it."""

SPLIT, GROUP = CARRIED + "split", CARRIED + "group"

OBJECT_OF, TABLE_OF = CARRIED + "@object", CARRIED + "@table"
"""The number of the input that found an image as an object or in a container, and of the one whose table names it."""

_FEW, _LONG = 12, 1_000

log = logging.getLogger(__name__)


@dataclass
class Columns:
    """What the rows of one input brought."""

    names: set[str] = field(default_factory=set)
    """Of their columns, without the prefix."""
    tables: bool = False
    """Rows of tables are among them."""
    sidecar: str = ""
    """A file beside the images that may say a label, if there is one."""
    values: dict[str, set[str] | None] = field(default_factory=dict)
    """The values of each column of text, as long as they are few."""

    @classmethod
    def of(cls, several: Sequence[Columns]) -> Columns:
        """Return what several of them brought."""
        sidecar = next((each.sidecar for each in several if each.sidecar), "")
        names = {name for each in several for name in each.names}
        return cls(names, any(each.tables for each in several), sidecar)

    def add(self, batch: pa.RecordBatch) -> None:
        """Learn of some rows of a table."""
        self.tables = True
        for name in (name for name in batch.schema.names if name.startswith(CARRIED)):
            own, kind = name.removeprefix(CARRIED), batch.schema.field(name).type
            self.names.add(own)
            known = self.values.setdefault(own, set())
            if known is not None and (pa.types.is_string(kind) or pa.types.is_dictionary(kind)):
                known |= {folded(str(value)) for value in pc.unique(batch[name]).to_pylist() if value}
                self.values[own] = known if len(known) <= _FEW else None

    def says_splits(self) -> str | None:
        """Return a column whose values are all words for splits, and for more than one of them."""
        for name, values in self.values.items():
            if values and values <= WORDS.keys() and len({WORDS[value] for value in values}) > 1:
                return name
        return None


def marked(given: Sequence[Source], config: SourceConfig, *, splits: bool = True) -> tuple[list[Source], list[Columns]]:
    """Return sources whose rows say label, split and group in TRUTH, SPLIT and GROUP, and by which input they were found.

    Names are normalised, an empty one is null. The second value is filled while the sources are listed.

    Args:
        splits: whether columns are asked for the split.

    Raises:
        InputError: at the end of a source: it is a table that lacks a needed column, or has one that is nearly named so.
    """
    seen, lock = [Columns() for _ in given], threading.Lock()

    def listed(number: int, source: Source) -> Iterator[ListingBatch]:
        columns, name = seen[number], source.uri.rpartition("/")[2] if source.kind == "manifest" else ""
        for each in source.list_images():
            with lock:
                columns.sidecar = columns.sidecar or each.sidecar
                if len(each.batch) and (each.by_table or pc.any(pc.equal(each.batch["container"], PARQUET)).as_py()):
                    columns.add(each.batch)
            by_table = each.by_table or each.unread
            batch = _marked(each.batch, number, config, by_table=by_table, splits=splits)
            yield replace(each, batch=_named_after_splits(batch, each.batch, name, config) if splits else batch)
        if not splits:
            columns.names.discard(config.split_column or "split")
        require_columns(source.uri, columns, config, splits=splits)

    return [replace(source, list_images=partial(listed, number, source)) for number, source in enumerate(given)], seen


def require_columns(uri: str, columns: Columns, config: SourceConfig, *, splits: bool = True) -> None:
    """Refuse tables without a column that is needed, and columns that are nearly called so.

    Raises:
        InputError: naming the columns that there are, and the option that decides.
    """
    if not columns.tables:
        return
    names = sorted(columns.names)
    label, split = config.label_column or "label", config.split_column or "split"
    if label not in columns.names and config.labels != "folders":
        near = near_miss(label, names, ALSO_LABEL)
        hint = (
            f"did you mean {near!r}? Then say source.label_column={near}"
            if near
            else "name one with source.label_column"
        )
        raise InputError(
            f"{uri} has no column {label!r}; beside the images it has: {', '.join(names) or 'none'}. {hint}, or say "
            "source.labels=folders if the folders of the images are their classes"
        )
    if "group" not in columns.names and (near := near_miss("group", names)):
        log.warning("%s has a column %r, and none 'group': it keeps no images together", uri, near)
    if not splits or split in columns.names or config.splits not in ("auto", "column"):
        return
    near = near_miss(split, names, ALSO_SPLIT) or columns.says_splits()
    if near or config.splits == "column" or config.split_column:
        hint = f"did you mean {near!r}? Then say source.split_column={near}, or " if near else ""
        raise InputError(
            f"{uri} has no column {split!r}; beside the images it has: {', '.join(names)}. {hint}source.splits=none if the "
            "table says no split"
        )


def _marked(
    batch: pa.RecordBatch, number: int, config: SourceConfig, *, by_table: bool, splits: bool
) -> pa.RecordBatch:
    named = {TRUTH: config.label_column or "label", SPLIT: config.split_column or "split", GROUP: "group"}
    columns = {name: text(batch, CARRIED + column) for name, column in named.items() if splits or name != SPLIT}
    columns[SPLIT] = canonical(columns[SPLIT], named[SPLIT]) if splits else pa.nulls(len(batch), pa.string())
    own = pa.repeat(pa.scalar(number, pa.int32()), len(batch))
    none = pa.nulls(len(batch), pa.int32())
    columns |= {OBJECT_OF: none, TABLE_OF: own} if by_table else {OBJECT_OF: own, TABLE_OF: none}
    kept = {name: batch[name] for name in batch.schema.names if name not in columns}
    return pa.RecordBatch.from_pydict({**kept, **columns})


def _named_after_splits(
    batch: pa.RecordBatch, given: pa.RecordBatch, table: str, config: SourceConfig
) -> pa.RecordBatch:
    """Return the rows of a table with the split that its name says, where it has no column for it.

    So it reaches images that a folder holds as well, and two tables that name one image are held against each other.
    """
    by_column = config.splits != "names" and CARRIED + (config.split_column or "split") in given.schema.names
    code = of_file(table) if config.splits in ("auto", "names") and not by_column else None
    if config.splits != "names" and code is None:
        return batch
    said = pa.nulls(len(batch), pa.string()) if code is None else pa.repeat(SPLIT_NAMES[code], len(batch))
    return batch.set_column(batch.schema.get_field_index(SPLIT), SPLIT, said)


def text(listed: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """Return a column as text, normalised; null where it is empty or NaN, and where there is none.

    Raises:
        InputError: it holds lists, what else is no text, or text that is a list.
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
            f"the column {shown!r} holds {listed[name].type}: an image has one text, or number, there"
        ) from error
    for value in pc.unique(values.filter(pc.match_substring_regex(values, r"(?s)^(\[.*\]|\{.*\})$"))).to_pylist():
        if _is_list(value):
            uri = listed["uri"].filter(pc.equal(values, value))[0].as_py()
            raise InputError(f"the column {shown!r} says {value[:80]} of {uri}: an image has one {shown} here")
    return pc.if_else(pc.equal(values, ""), None, values)


_QUOTED_ITEMS = re.compile(r"(?s)[\[{].*(['\"]).*\1.*(['\"]).*\2.*[\]}]")


def _is_list(value: str) -> bool:
    """Return whether a text is a list or an object: in JSON, in Python, or as NumPy writes an array."""
    if len(value) > _LONG or _QUOTED_ITEMS.fullmatch(value):
        return True
    try:
        return isinstance(ast.literal_eval(value), list | dict | set)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def is_tar(listed: pa.RecordBatch | pa.Table) -> pa.Array:
    """Return a mask of the rows that stand for the members of a tar."""
    return pc.fill_null(pc.equal(single_chunk(listed["container"]), TAR), False)

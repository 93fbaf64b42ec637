"""Effects: `export`: the images of an output that are worth a person's time, as a manifest or as tasks for Label Studio."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, BinaryIO, Literal

import pyarrow as pa

from imgbatch.concurrency.monitor import tick
from imgbatch.config.sections import Config
from imgbatch.errors import InputError, UsageError
from imgbatch.evaluation.label_tables import last_record
from imgbatch.labelling import files
from imgbatch.labelling.columns import (
    FINGERPRINT,
    LABELS_READ,
    MARGIN,
    REJECTS_READ,
    SECOND,
    manifest_rows,
    with_margin,
)
from imgbatch.labelling.label_studio import Classes, task_of
from imgbatch.labelling.row_filter import RowFilter
from imgbatch.labelling.selection import Smallest, diverse, margins, pool_size, random_keys
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.common_columns import CommonColumns
from imgbatch.ledger.fingerprint import short_digest
from imgbatch.ledger.part_reader import common_columns
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.schema import CARRIED, EMBEDDING
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console
from imgbatch.terminal.plurals import counted
from imgbatch.verification.sample import load_original_model, original_config

log = logging.getLogger("imgbatch")

Format = Literal["manifest", "label-studio"]
_MAX_SEED = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which images are exported: one of `uncertain`, `sample`, `rejects` and `where`, or `where` with one of the others."""

    uncertain: int | None = None
    """This many labels with the smallest margins."""
    sample: int | None = None
    """This many labels at random."""
    rejects: bool = False
    """All rejects."""
    where: str | None = None
    """A condition on the rows: see `row_filter`."""
    seed: int | None = None
    """Of `sample`; None: a random one."""

    def validate(self) -> None:
        """Refuse contradicting options.

        Raises:
            UsageError: naming them.
        """
        options = {"--uncertain": self.uncertain, "--sample": self.sample, "--rejects": self.rejects or None}
        given = [name for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other: give one of them; --where restricts it")
        if not given and self.where is None:
            raise UsageError("which images? Give --uncertain N, --sample N, --rejects, or --where EXPRESSION")
        for name, count in (("uncertain", self.uncertain), ("sample", self.sample)):
            if count is not None and count < 1:
                raise UsageError(f"--{name} {count}: at least 1")
        if self.seed is not None and self.sample is None:
            raise UsageError("--seed needs --sample N: nothing else is random")
        if self.seed is not None and not 0 <= self.seed < _MAX_SEED:
            raise UsageError(f"--seed {self.seed}: from 0 to {_MAX_SEED - 1}")


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What was exported."""

    output: str
    file: str
    count: int
    """The number of images in the file."""
    candidates: int
    """The number of rows from which they were selected, after `where`."""
    what: str
    """What was selected, in words."""
    config_file: str | None = None
    """The labelling config for Label Studio."""
    seed: int | None = None

    def __str__(self) -> str:
        seed = f" (--seed {self.seed})" if self.seed is not None else ""
        config = f", labelling config {self.config_file}" if self.config_file else ""
        return f"{counted(self.count, 'image')} of {self.candidates:,} exported, {self.what}{seed}: {self.file}{config}"


def export(
    output_uri: str,
    to: str,
    config: Config,
    selection: Selection,
    *,
    format: Format = "manifest",
    model: str | None = None,
) -> ExportSummary:
    """Write images of an output to a file, for people to label.

    Args:
        output_uri: the output of a classification; it may be unfinished.
        to: the file. It must not exist.
        config: the options of its store, and of the model.
        selection: which images.
        format: a manifest, by the suffix of `to`; or tasks for Label Studio, with a labelling config next to them.
        model: the current name or URI of the model, for the classes in the labelling config; None: as recorded.

    Raises:
        UsageError: options contradict each other, the file exists, or a column does not.
        InputError: there is no table, or Label Studio cannot open an image.
        ModelError: the model of the output cannot be loaded.
    """
    selection.validate()
    if model is not None and format != "label-studio":
        raise UsageError("--model is for --format label-studio, whose config has the classes of the model")
    if selection.sample is not None and selection.seed is None:
        selection = replace(selection, seed=secrets.randbelow(_MAX_SEED))
    stores = Stores(config.storage)
    output, file = Folder(stores, absolute(output_uri)), absolute(to)
    target = _Target(stores, file, format)
    target.require_absent()
    source = _Source(output, selection)
    classes = _classes(output, config, model, source.fingerprint) if format == "label-studio" else None
    console.step("reading the table")
    target.write(source.selected(), rejects=selection.rejects, schema=source.schema, classes=classes)
    return ExportSummary(
        output.uri, file, target.count, source.candidates, source.what, target.config_file, selection.seed
    )


class _Source:
    """The rows of one table, part by part."""

    def __init__(self, output: Folder, selection: Selection) -> None:
        """Find the columns of the table.

        Raises:
            InputError: there is no table.
            UsageError: a column is needed that it does not have.
        """
        self._selection = selection
        name = REJECTS_LOG if selection.rejects else LABELS_LOG
        self._log = Log(output.folder(name))
        self._log.scan()
        if not self._log.numbers:
            raise InputError(f"{output.at(name)} has no part: is {output.uri} the --output of a classification?")
        all_columns, self.fingerprint = common_columns(self._log.folder)
        existing = all_columns.schema
        self._where = RowFilter(selection.where) if selection.where is not None else None
        named = list(self._where.columns) if self._where is not None else []
        is_diverse = selection.uncertain is not None and EMBEDDING in existing.names
        wanted = {*(REJECTS_READ if selection.rejects else LABELS_READ), *named, *([EMBEDDING] if is_diverse else [])}
        self._read = [name for name in existing.names if name != "uri" and (name in wanted or name.startswith(CARRIED))]
        self._columns = CommonColumns()
        self._columns.add(pa.schema([existing.field(name) for name in ("uri", *self._read)]))
        added = [FINGERPRINT] if selection.rejects else [FINGERPRINT, MARGIN, SECOND]
        if self._where is not None:
            self._where.require_columns([*existing.names, *added])
        if selection.uncertain is not None and "top_k" not in existing.names:
            raise UsageError(
                f"{self._log.folder.uri} has no column top_k (output.columns), from which the margin follows: use --where "
                "'score < 0.5' with --sample N instead"
            )
        self.what = _describe(selection, is_diverse=is_diverse)
        self.candidates = 0
        """The number of rows that met the condition so far."""
        self._is_diverse = is_diverse

    @property
    def schema(self) -> pa.Schema:
        """The columns of the selected rows."""
        return self._prepared(self._columns.schema.empty_table()).schema

    def selected(self) -> Iterator[pa.Table]:
        """Yield the selected rows."""
        selection = self._selection
        count = selection.uncertain or selection.sample
        if count is None:
            for rows in self._rows():
                self.candidates += len(rows)
                yield rows
            return
        keys_of: Callable[[pa.Table], Any] = (
            margins if selection.uncertain else partial(random_keys, seed=selection.seed or 0)
        )
        smallest = Smallest(pool_size(count) if self._is_diverse else count)
        for rows in self._rows():
            keys = keys_of(rows)
            chosen = smallest.candidates(keys)
            smallest.add(keys[chosen], rows.take(pa.array(chosen)))
        self.candidates = smallest.seen
        best = smallest.rows()
        if best is not None:
            yield (diverse(best, count) if self._is_diverse else best).combine_chunks()

    def _rows(self) -> Iterator[pa.Table]:
        """Yield the rows that meet the condition."""
        for _, part, _ in self._log.read(["uri"], self._read):
            tick()
            if not len(part):
                continue
            rows = self._prepared(self._columns.cast(part.replace_schema_metadata(None)))
            yield self._where.apply(rows) if self._where is not None else rows

    def _prepared(self, rows: pa.Table) -> pa.Table:
        rows = rows if self._selection.rejects else with_margin(rows)
        return rows.append_column(FINGERPRINT, pa.repeat(pa.scalar(short_digest(self.fingerprint)), len(rows)))


@dataclass
class _Target:
    """The file of an export, and the labelling config next to it."""

    stores: Stores
    file: str
    format: Format
    count: int = 0
    """The number of rows so far."""
    config_file: str | None = None
    _suffix: str = field(init=False)

    def __post_init__(self) -> None:
        if self.format == "manifest":
            self._suffix = files.suffix_of(self.file, files.MANIFESTS, "a manifest")
        else:
            self._suffix = files.suffix_of(self.file, files.TASKS, "tasks for Label Studio")
            self.config_file = f"{self.file[: -len(self._suffix)]}.xml"

    def require_absent(self) -> None:
        """Refuse files that exist."""
        for uri in (self.file, self.config_file):
            if uri is not None:
                files.require_absent(self.stores, uri)

    def write(self, tables: Iterator[pa.Table], *, rejects: bool, schema: pa.Schema, classes: Classes | None) -> None:
        """Write all files, the one with the images last."""
        config = classes.config().encode() if classes is not None else b""

        def open_writer(file: BinaryIO) -> files.RowWriter:
            if classes is not None:
                return files.JsonWriter(file, lambda row: task_of(row, classes), array=self._suffix == ".json")
            columns = manifest_rows(schema.empty_table(), rejects=rejects).schema
            return files.manifest_writer(file, self._suffix, columns)

        def counted_rows() -> Iterator[pa.Table]:
            for table in tables:
                self.count += len(table)
                yield manifest_rows(table, rejects=rejects)

        def fill(file: BinaryIO) -> None:
            writer = open_writer(file)
            for table in counted_rows():
                writer.add(table)
            writer.close()
            if self.config_file is not None:  # only now: after an error, no file is left
                files.write_file(self.stores, self.config_file, partial(_write, config))

        files.write_file(self.stores, self.file, fill)


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _classes(output: Folder, config: Config, model: str | None, fingerprint: dict[str, Any]) -> Classes:
    """Return the classes of the model of an output."""
    original = original_config(config, model, fingerprint, last_record(output))
    return Classes.of(load_original_model(output, original.model, fingerprint, is_named=model is not None))


def _describe(selection: Selection, *, is_diverse: bool) -> str:
    if selection.uncertain is not None:
        what = "the smallest margins" + (", diverse by embedding" if is_diverse else "")
    else:
        what = "at random" if selection.sample is not None else "all rejects" if selection.rejects else "all labels"
    return f"{what} where {selection.where}" if selection.where is not None else what

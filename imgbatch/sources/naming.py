"""Effects: how the rows of a list name their images: by a column, or by a template that uses columns."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import ConfigError, InputError
from imgbatch.sources import spelling
from imgbatch.sources.column_types import carried_type, is_bytes, is_text

URI, LABEL = "uri", "label"
DID_YOU_MEAN = "Did you mean"
"""Part of the message for a list whose column of names may have another name."""

FILE_NAME = "file_name"
"""The column that names the images in Hugging Face's metadata files."""

_SYNONYMS = (
    "url", "path", "file", "filename", "file_name", "filepath", "file_path", "image", "img", "image_path", "img_path",
    "image_file", "image_filename", "image_name", "image_url", "image_uri", "image_id", "img_name", "img_file", "location",
    "src", "object_key", "s3_uri", "gcs_uri", "id",
)  # fmt: skip
"""Columns that name images in the lists of other tools."""


@dataclass(frozen=True)
class Naming:
    """The values of `source.uri_column` and `source.uri_template`; without them the column is `uri`."""

    column: str = URI
    template: str | None = None
    explicit: bool = False
    """The column was set with `source.uri_column`."""
    metadata: bool = False
    """The list has the name of Hugging Face's metadata files: `file_name` may be used in place of `uri`."""
    label: str = LABEL
    """The column of the labels. In an export of Label Studio, only annotations fill it."""

    @classmethod
    def of(cls, config: SourceConfig, *, metadata: bool = False) -> Naming:
        """Return the naming that a config sets.

        Args:
            metadata: the list has the name of Hugging Face's metadata files.

        Raises:
            ConfigError: the template is invalid, or has no column.
        """
        label = spelling.normalise(config.label_column or LABEL)
        if config.uri_template is not None:
            naming = cls("", config.uri_template, label=label)
            if not naming.fields:
                raise ConfigError(
                    f"source.uri_template={config.uri_template!r} has no column: write one as in 'train/{{id}}.jpg'"
                )
            return naming
        if config.uri_column is not None:
            return cls(spelling.normalise(config.uri_column), explicit=True, label=label)
        return cls(metadata=metadata, label=label)

    def resolve(self, names: Sequence[str]) -> Naming:
        """Return the naming for a list with these columns."""
        return (
            replace(self, column=FILE_NAME, metadata=False)
            if self.metadata and FILE_NAME in names and self.column not in names
            else self
        )

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        """The template as pairs of a text and the column after it."""
        try:
            parts = list(string.Formatter().parse(self.template or ""))
        except ValueError as error:
            raise ConfigError(f"source.uri_template={self.template!r} cannot be read: {error}") from error
        if any(
            column is not None and (not column.strip() or form or conversion) for _, column, form, conversion in parts
        ):
            raise ConfigError(f"source.uri_template={self.template!r}: write columns as {{NAME}}, without : or !")
        return [(text, None if column is None else spelling.normalise(column)) for text, column, _, _ in parts]

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The columns with the names of images."""
        if self.template is None:
            return (self.column,)
        return tuple(dict.fromkeys(column for _, column in self._parts if column is not None))

    def require(self, names: Sequence[str], where: str) -> None:
        """Refuse a list that lacks a column of names.

        Raises:
            InputError: with the missing column, the columns of the list, and a near miss.
        """
        for field in self.fields:
            if field not in names:
                self._refuse(field, [name for name in names if name], where)

    def _refuse(self, field: str, names: Sequence[str], where: str) -> NoReturn:
        has = f"{where} has no column {field!r}"
        columns = f"; it has: {', '.join(names) or 'none'}"
        if self.template is not None or self.explicit:
            option = "source.uri_column" if self.explicit else "source.uri_template"
            near = spelling.near_miss(field, names)
            raise InputError(f"{has}, which {option} names{columns}{f'. {DID_YOU_MEAN} {near!r}?' if near else ''}")
        near = spelling.near_miss(field, names) or spelling.near_miss(field, names, _SYNONYMS)
        if near is not None:
            raise InputError(
                f"{has}{columns}. {DID_YOU_MEAN} {near!r}? Use that column with --set 'source.uri_column={near}'"
            )
        raise InputError(
            f"{has}{columns}. Set source.uri_column to the column that names the images, or build the names from columns with "
            "source.uri_template, such as 'train/{id}.jpg'. The first line of a CSV must be its header"
        )

    def names_of(self, rows: pa.RecordBatch, *, padded: bool) -> tuple[pa.Array, pa.Array]:
        """Return the name in each row, null if there is none; and a mask of the rows that lack a part of a template.

        Args:
            padded: remove spaces around values, as in a CSV.

        Raises:
            InputError: a column has values that are not text (in a template: text or numbers).
        """
        values = {field: self._texts(rows, field, padded) for field in self.fields}
        if self.template is None:
            return values[self.column], pa.array([False] * len(rows), pa.bool_())
        pieces: list[pa.Array | str] = []
        for text, column in self._parts:
            pieces += [text, *([] if column is None else [values[column]])]
        missing = [pc.is_null(column) for column in values.values()]
        any_missing, all_missing = missing[0], missing[0]
        for mask in missing[1:]:
            any_missing, all_missing = pc.or_(any_missing, mask), pc.and_(all_missing, mask)
        names = pc.binary_join_element_wise(*pieces, "", null_handling="emit_null")
        return names, pc.and_not(any_missing, all_missing)

    def _texts(self, rows: pa.RecordBatch, field: str, padded: bool) -> pa.Array:
        """Return a column as text, null for empty text."""
        if field not in rows.schema.names:
            return pa.nulls(len(rows), pa.string())
        column = rows[field]
        kind = carried_type(column.type)
        number = pa.types.is_integer(kind) or pa.types.is_decimal(kind)
        if not (is_text(kind) or is_bytes(kind) or pa.types.is_null(kind) or (number and self.template is not None)):
            raise InputError(
                f"the column {field!r} has values of type {column.type}, but the name of an image must be text"
            )
        texts = column.cast(pa.string())
        if padded:
            texts = pc.utf8_trim(texts, " \t")
        return pc.if_else(pc.equal(texts, ""), None, texts)

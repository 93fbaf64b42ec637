"""Effects: the images of a manifest, which is read as a stream: a list with a column `uri`, or another `source.uri_column`.

Relative URIs are resolved against the folder of the manifest. The columns `size` and `etag` are used if they exist. All other
columns are carried as `input_NAME`: with their types from Parquet, as text from CSV and JSON.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Iterator
from gzip import BadGzipFile

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.schema import CARRIED, LISTING
from imgbatch.sources.base import ListingBatch
from imgbatch.sources.csv_rows import Rows
from imgbatch.sources.lists import form_by_name, read_rows
from imgbatch.sources.naming import FILE_NAME, Naming
from imgbatch.storage.base import unquote_etags
from imgbatch.storage.stores import Stores
from imgbatch.storage.uris import join, scheme

METADATA = r"(^|/)metadata\.(csv|jsonl|parquet)$"
"""Hugging Face's name for a list of the images in its folder and below."""

_NOT_BELOW = r"^/|://|//|/$|(^|/)\.{1,2}(/|$)"
"""Names that must be resolved one by one. All others are below the folder of the manifest and are joined in bulk."""

_ANYWHERE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https")

log = logging.getLogger(__name__)


class Manifest:
    """One manifest file.

    Args:
        in_image_folder: the manifest is a metadata file in a folder of images. It may name only images in that folder, and its
            columns `size` and `etag` have no special meaning.

    Raises:
        InputError: no column names the images, or the content does not fit the suffix.
    """

    def __init__(self, stores: Stores, uri: str, config: SourceConfig, *, in_image_folder: bool = False) -> None:
        self._stores, self.uri, self._in_image_folder = stores, uri, in_image_folder
        # Manifests are untrusted: by default they cannot refer to local files or private addresses (see `storage.http`).
        schemes = config.schemes
        allowed = (*_ANYWHERE, scheme(uri)) if schemes == "auto" else (part.strip() for part in schemes.split(","))
        self._schemes = frozenset(allowed)
        self._folder = uri.rpartition("/")[0]
        is_metadata = re.search(METADATA, uri.lower().removesuffix(".gz")) is not None
        by_name = in_image_folder and config.uri_column is None
        self._naming = Naming(FILE_NAME) if by_name else Naming.of(config, metadata=is_metadata)
        self._object_columns = () if in_image_folder else ("size", "etag")
        self.annotated = False
        """Whether it is an export of Label Studio, in which tasks without an annotation have no label."""
        self._naming = self._require_naming()

    def list_images(self) -> Iterator[ListingBatch]:
        """Yield the rows that name an image, each batch with its own columns. Other rows are counted as ignored."""
        nameless, first = 0, ""
        for rows in self._rows():
            names, incomplete = self._names(rows)
            if pc.any(incomplete).as_py():
                place = rows.place(pc.index(incomplete, True).as_py())
                raise InputError(
                    f"{self.uri}, {place}: a column of source.uri_template has no value; the columns are "
                    f"{', '.join(self._naming.fields)}"
                )
            named = pc.is_valid(names)
            without = len(names) - pc.sum(named).as_py() if len(names) else 0
            if without and not nameless:
                first = rows.place(pc.index(named, False).as_py())
            nameless += without
            ignored = without + rows.ignored
            yield ListingBatch(
                self._listed(rows, names).filter(named),
                ignored=ignored,
                example=f"{first or 'a header'} of {self.uri}" if ignored else "",
                by_table=True,
            )
        if nameless:
            log.warning("%s: %s rows name no image, the first is %s", self.uri, f"{nameless:,}", first)

    def _is_carried(self, name: str) -> bool:
        # The columns of a template are keys of the user's table, and are needed to join the labels to it.
        names_image = self._naming.template is None and name == self._naming.column
        return bool(name) and name not in self._object_columns and not names_image

    def _require_naming(self) -> Naming:
        """Return the naming for the columns of the list.

        Raises:
            InputError: no column names the images.
        """
        names: dict[str, None] = {}
        for rows in self._rows():
            names |= dict.fromkeys(rows.batch.schema.names)
            self.annotated = self.annotated or rows.annotated
            naming = self._naming.resolve(list(names))
            if {*naming.fields} <= names.keys():
                return naming
        if names or self._in_image_folder:
            self._naming.require(list(names), self.uri)
        return self._naming

    def _names(self, rows: Rows) -> tuple[pa.Array, pa.Array]:
        try:
            return self._naming.names_of(rows.batch, padded=rows.padded)
        except (InputError, pa.ArrowException) as error:
            raise InputError(f"{self.uri}: {error}") from error

    def _listed(self, rows: Rows, names: pa.Array) -> pa.RecordBatch:
        batch = rows.batch
        columns = {
            "uri": self._uris(names, rows),
            "size": self._sizes(batch),
            "etag": unquote_etags(self._text(batch, "etag")),
            "last_modified": pa.nulls(len(batch), LISTING.field("last_modified").type),
            "container": pa.nulls(len(batch), pa.string()),
        }
        carried = [(CARRIED + entry.name, entry.type) for entry in batch.schema if self._is_carried(entry.name)]
        columns |= {name: batch[name.removeprefix(CARRIED)] for name, _ in carried}
        return pa.record_batch(columns, schema=pa.schema([*LISTING, *carried]))

    def _uris(self, names: pa.Array, rows: Rows) -> pa.Array:
        """Return the URI of each name, null for null."""
        if not len(names):
            return names
        below = join(self._folder, "x")[:-1]
        uris = pc.binary_join_element_wise(below, names, "", null_handling="emit_null")
        to_resolve = pc.fill_null(pc.match_substring_regex(names, pattern=_NOT_BELOW), False)
        if scheme(below) not in self._schemes:
            to_resolve = pc.is_valid(names)
        numbers = pc.indices_nonzero(to_resolve).to_pylist()
        if not numbers:
            return uris
        pairs = zip(names.filter(to_resolve).to_pylist(), numbers, strict=True)
        resolved = [self._resolve(name, rows, number) for name, number in pairs]
        return pc.replace_with_mask(uris, to_resolve, pa.array(resolved, pa.string()))

    def _resolve(self, name: str, rows: Rows, at: int) -> str:
        uri = join(self._folder, name)
        if self._in_image_folder and not uri.startswith(f"{self._folder}/"):
            raise InputError(
                f"{self.uri}, {rows.place(at)}, names {uri[:200]!r}, but a metadata file may name only images in its folder. "
                "Give it as a separate --input if it is to name others"
            )
        if scheme(uri) not in self._schemes:
            allowed, extended = sorted(self._schemes), sorted({*self._schemes, scheme(uri)})
            raise InputError(
                f"{self.uri}, {rows.place(at)}, names {uri[:200]!r}, but may name only URIs with {', '.join(allowed)}. If you "
                f"trust the manifest, use --set source.schemes={','.join(extended)}"
            )
        return uri

    def _sizes(self, rows: pa.RecordBatch) -> pa.Array:
        text = pc.utf8_trim_whitespace(self._text(rows, "size"))
        # Tools without a nullable integer type write 123.0 and nan.
        text = pc.replace_substring_regex(text, pattern=r"\.0+$", replacement="")
        unknown = pc.fill_null(pc.match_substring_regex(text, pattern=r"^(-.*|nan|NaN|)$"), True)
        try:
            return pc.if_else(unknown, None, text).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{self.uri}: a value in column 'size' is not a number of bytes: {error}. Rename the column if it is not the "
                "size of the file"
            ) from error

    def _text(self, rows: pa.RecordBatch, name: str) -> pa.Array:
        if name not in rows.schema.names or name not in self._object_columns:
            return pa.nulls(len(rows), pa.string())
        try:
            return rows[name].cast(pa.string())
        except pa.ArrowException as error:
            raise InputError(
                f"{self.uri}: column {name!r} has values of type {rows[name].type}, which are not text: {error}"
            ) from error

    def _rows(self) -> Iterator[Rows]:
        form = form_by_name(self.uri) or "a list"
        with self._stores.open(self.uri) as file:
            try:
                yield from read_rows(file, self.uri, self._naming)
            # JSON and Unicode errors are ValueErrors. For damaged data, Arrow raises an OSError without an errno, in contrast
            # to the errors of a store.
            except (ValueError, RecursionError, EOFError, zlib.error, pa.ArrowException) as error:
                raise InputError(f"{self.uri} cannot be read as {form}: {error}") from error
            except OSError as error:
                if error.errno is not None or type(error) not in (OSError, BadGzipFile):
                    raise
                raise InputError(f"{self.uri} cannot be read as {form}: {error}") from error

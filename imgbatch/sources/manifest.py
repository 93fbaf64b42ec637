"""Effects: images that a manifest names: a list with a column `uri`, or another one that `source.uri_column` names, read
as a stream.

Relative URIs resolve against the manifest's place. `size` and `etag` are used where they are there; every further column
travels along as `input_NAME`: with its type from Parquet, as text from CSV and JSON, which have no types.
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
from imgbatch.sources.lists import form_of, rows_of
from imgbatch.sources.naming import FILE_NAME, Naming
from imgbatch.storage.base import unquote_etags
from imgbatch.storage.stores import Stores, join, scheme

METADATA = r"(^|/)metadata\.(csv|jsonl|parquet)$"
"""Hugging Face's name of a list of the images that lie beside it, or below."""

_NOT_BELOW = r"^/|://|//|/$|(^|/)\.{1,2}(/|$)"
"""Names that have to be resolved; others lie below the manifest's folder as they are. A million of these are joined at once."""

_ANYWHERE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "http", "https")

log = logging.getLogger(__name__)


class Manifest:
    """One manifest file.

    Args:
        beside: it was found in a folder of images, and names some of these. It may name no others, and what is known of
            an object comes from the store: `size` and `etag` are columns like others.

    Raises:
        InputError: no column names the images, or it is not what its name says.
    """

    def __init__(self, stores: Stores, uri: str, config: SourceConfig, *, beside: bool = False) -> None:
        self._stores, self.uri, self._beside = stores, uri, beside
        # Whoever wrote a manifest in a bucket has no business with the files of the machine that reads it.
        schemes = config.schemes
        allowed = (*_ANYWHERE, scheme(uri)) if schemes == "auto" else (part.strip() for part in schemes.split(","))
        self._schemes = frozenset(allowed)
        self._folder = uri.rpartition("/")[0]
        is_metadata = re.search(METADATA, uri.lower().removesuffix(".gz")) is not None
        by_name = beside and config.uri_column is None
        self._naming = Naming(FILE_NAME) if by_name else Naming.of(config, metadata=is_metadata)
        self._own = () if beside else ("size", "etag")
        self._naming = self._require_naming()

    def list_images(self) -> Iterator[ListingBatch]:
        """Yield the rows that name an image, each batch with its own columns; others are counted as ignored."""
        nameless, first = 0, ""
        for rows in self._rows():
            names, partly = self._names(rows)
            if pc.any(partly).as_py():
                place = rows.place(pc.index(partly, True).as_py())
                raise InputError(
                    f"{self.uri}, {place}: a column that source.uri_template names has no value; its columns are "
                    f"{', '.join(self._naming.fields)}"
                )
            named = pc.is_valid(names)
            left = len(names) - pc.sum(named).as_py() if len(names) else 0
            if left and not nameless:
                first = rows.place(pc.index(named, False).as_py())
            nameless += left
            ignored = left + rows.ignored
            yield ListingBatch(
                self._listed(rows, names).filter(named),
                ignored=ignored,
                example=f"{first or 'a header'} of {self.uri}" if ignored else "",
                by_table=True,
            )
        if nameless:
            log.warning("%s: %s rows name no image, the first is %s", self.uri, f"{nameless:,}", first)

    def _travels(self, name: str) -> bool:
        # What a template is filled from is a key of the table, and is wanted beside the labels.
        names_image = self._naming.template is None and name == self._naming.column
        return bool(name) and name not in self._own and not names_image

    def _require_naming(self) -> Naming:
        """Return the naming that fits the columns.

        Raises:
            InputError: none does.
        """
        names: dict[str, None] = {}
        for rows in self._rows():
            names |= dict.fromkeys(rows.batch.schema.names)
            naming = self._naming.resolve(list(names))
            if {*naming.fields} <= names.keys():
                return naming
        if names or self._beside:
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
        carried = [(CARRIED + entry.name, entry.type) for entry in batch.schema if self._travels(entry.name)]
        columns |= {name: batch[name.removeprefix(CARRIED)] for name, _ in carried}
        return pa.record_batch(columns, schema=pa.schema([*LISTING, *carried]))

    def _uris(self, names: pa.Array, rows: Rows) -> pa.Array:
        """Return the URI of each name, null where there is none."""
        if not len(names):
            return names
        below = join(self._folder, "x")[:-1]
        uris = pc.binary_join_element_wise(below, names, "", null_handling="emit_null")
        others = pc.fill_null(pc.match_substring_regex(names, pattern=_NOT_BELOW), False)
        if scheme(below) not in self._schemes:
            others = pc.is_valid(names)
        at = pc.indices_nonzero(others).to_pylist()
        if not at:
            return uris
        joined = [self._joined(name, rows, row) for name, row in zip(names.filter(others).to_pylist(), at, strict=True)]
        return pc.replace_with_mask(uris, others, pa.array(joined, pa.string()))

    def _joined(self, name: str, rows: Rows, at: int) -> str:
        uri = join(self._folder, name)
        if self._beside and not uri.startswith(f"{self._folder}/"):
            raise InputError(
                f"{self.uri}, {rows.place(at)}, names {uri[:200]!r}: a list in a folder of images names images in that "
                "folder. Given as an --input of its own it may name others"
            )
        if scheme(uri) not in self._schemes:
            allowed, more = sorted(self._schemes), sorted({*self._schemes, scheme(uri)})
            raise InputError(
                f"{self.uri} names {uri[:200]!r}, in {rows.place(at)}; it may name {', '.join(allowed)}. If it is to be "
                f"trusted, --set source.schemes={','.join(more)}"
            )
        return uri

    def _sizes(self, rows: pa.RecordBatch) -> pa.Array:
        text = pc.utf8_trim_whitespace(self._text(rows, "size"))
        # Tables that know no integer without a value write 123.0 and nan.
        text = pc.replace_substring_regex(text, pattern=r"\.0+$", replacement="")
        unknown = pc.fill_null(pc.match_substring_regex(text, pattern=r"^(-.*|nan|NaN|)$"), True)
        try:
            return pc.if_else(unknown, None, text).cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{self.uri}: column 'size' holds something that is no number of bytes: {error}. Rename it, if it is not the "
                "size of the file"
            ) from error

    def _text(self, rows: pa.RecordBatch, name: str) -> pa.Array:
        if name not in rows.schema.names or name not in self._own:
            return pa.nulls(len(rows), pa.string())
        try:
            return rows[name].cast(pa.string())
        except pa.ArrowException as error:
            raise InputError(
                f"{self.uri}: column {name!r} holds {rows[name].type}, which is no text: {error}"
            ) from error

    def _rows(self) -> Iterator[Rows]:
        form = form_of(self.uri) or "a list"
        with self._stores.open(self.uri) as file:
            try:
                yield from rows_of(file, self.uri, self._naming)
            # JSON and Unicode errors are ValueErrors. Arrow raises a bare OSError for damaged data; the errors of a store
            # have a number.
            except (ValueError, RecursionError, EOFError, zlib.error, pa.ArrowException) as error:
                raise InputError(f"{self.uri} cannot be read as {form}: {error}") from error
            except OSError as error:
                if error.errno is not None or type(error) not in (OSError, BadGzipFile):
                    raise
                raise InputError(f"{self.uri} cannot be read as {form}: {error}") from error

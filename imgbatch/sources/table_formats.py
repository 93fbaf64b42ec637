"""Effects: tables in a format that keeps a log beside its Parquet files: Delta, Iceberg, Hudi, Paimon. They are refused.

After an update or a delete, such a table's files hold the old rows beside the new ones; only the log says which are valid.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError, StoreError
from imgbatch.storage.stores import Folder, Stores

# What each format's log holds, below the folder of the table, and how the table is written as plain Parquet.
_LOGS = {
    "Delta": r"_delta_log/[^/]+\.(?:json|crc|parquet)",
    "Iceberg": r"metadata/[^/]+(?:\.avro|\.metadata\.json|\.metadata\.json\.gz)",
    "Hudi": r"\.hoodie/.+",
    "Paimon": r"snapshot/(?:snapshot-\d+|LATEST|EARLIEST)",
}
_EXPORTS = {
    "Delta": "deltalake.DeltaTable(URI).to_pyarrow_table() or Spark's read.format('delta')",
    "Iceberg": "pyiceberg's table.scan().to_arrow() or Spark's read.format('iceberg')",
    "Hudi": "Spark's read.format('hudi')",
    "Paimon": "Spark's read.format('paimon')",
}
_FOLDERS = {"Delta": "_delta_log", "Hudi": ".hoodie", "Iceberg": "metadata", "Paimon": "snapshot"}


def _root(log: str) -> str:
    return rf"(?s)^(?P<root>|.*/){log}\z"


_ANY_LOG = r"(?s)(^|/)(" + "|".join(_LOGS.values()) + r")\z"


@dataclass
class TableFormats:
    """Looks at the names below an input, batch by batch, and refuses a table of such a format whose files would be read.

    Memory: the folders that hold Parquet files.
    """

    stores: Stores
    base: str
    """The folder that is the input, or in which a glob looks."""
    _tables: dict[str, str] = field(default_factory=dict)
    """The format of each table, by its folder below the base."""
    _folders: set[str] = field(default_factory=set)
    """Folders below the base in which Parquet files lie that are to be read."""

    def require_none(self, names: pa.Array, files: pa.Array) -> None:
        """Refuse such a table.

        Args:
            names: of all objects of a batch, below the base.
            files: of the Parquet files among them that are to be read; what is junk, such as the logs, is not.

        Raises:
            InputError: naming the table, its format, and how to export it.
        """
        folders = set(_parts(files, r"(?s)^(?P<root>|.*/)[^/]*\z")) - self._folders
        if folders and not self._folders:
            self._require_none_above()
        self._folders |= folders
        for folder in folders:
            for table in _ancestors(folder):
                if table in self._tables:
                    raise self._refusal(table)
        logs = names.filter(pc.match_substring_regex(names, pattern=_ANY_LOG))
        for format, log in _LOGS.items() if len(logs) else ():
            for table in _parts(logs, _root(log)):
                if table not in self._tables:
                    self._tables[table] = format
                    if any(folder.startswith(table) for folder in self._folders):
                        raise self._refusal(table)

    def _require_none_above(self) -> None:
        """Refuse a base that is a partition of such a table (`date=2026-11-28`), or Iceberg's folder of data files."""
        inner = self.base
        while True:
            above, _, name = inner.rpartition("/")
            if not above or above.endswith(("/", ":")) or not ("=" in name or name == "data"):
                return
            for format in ("Delta", "Hudi", *(("Iceberg",) if name == "data" else ())):
                with suppress(StoreError):  # no right to look there, say
                    folder = Folder(self.stores, f"{above}/{_FOLDERS[format]}")
                    first = next((found for found in folder.list_objects() if len(found)), None)
                    if first is not None and _is_log(first["path"], format):
                        raise InputError(_message(above, format))
            inner = above

    def _refusal(self, table: str) -> InputError:
        return InputError(_message(f"{self.base.rstrip('/')}/{table}".rstrip("/"), self._tables[table]))


def _message(table: str, format: str) -> str:
    return (
        f"{table} is a table in {format}'s format (it holds {_FOLDERS[format]}/): its Parquet files may hold rows that were "
        f"updated or deleted, so they are not read one by one. Write it as plain Parquet to another place, with "
        f"{_EXPORTS[format]}, and give that, or give a manifest of its images; --set source.format=objects takes images that "
        "lie beside it, and leaves the table"
    )


def _is_log(paths: pa.Array, format: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(paths, pattern=rf"(?s)(^|/){_LOGS[format]}\z")).as_py())


def _parts(names: pa.Array, pattern: str) -> list[str]:
    """Return what the group `root` of a pattern is in the names that match, each once."""
    found = pc.unique(pc.struct_field(pc.extract_regex(names, pattern), "root"))
    return [root for root in found.to_pylist() if root is not None]


def _ancestors(folder: str) -> list[str]:
    """Return a folder and those that hold it, up to the base.

    >>> _ancestors("a/b/")
    ['a/b/', 'a/', '']
    """
    segments = folder.split("/")[:-1]
    return ["".join(f"{segment}/" for segment in segments[:count]) for count in range(len(segments), -1, -1)]

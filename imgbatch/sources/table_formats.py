"""Effects: the refusal of tables in formats that keep a log next to Parquet files: Delta, Iceberg, Hudi, Paimon.

After an update or a deletion, the files of such a table contain old rows and new ones. Only the log says which are valid.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError, StoreError
from imgbatch.storage.stores import Folder, Stores

# The files of each format's log, below the folder of the table, and how to export the table as plain Parquet.
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
    """Checks the names below an input, batch by batch, for tables of such a format whose files would be read.

    Memory: the names of the folders that contain Parquet files.
    """

    stores: Stores
    base: str
    """The folder that is the input, or from which a glob is matched."""
    _tables: dict[str, str] = field(default_factory=dict)
    """The format of each table, by its folder below the base."""
    _folders: set[str] = field(default_factory=set)
    """Folders below the base with Parquet files that will be read."""

    def require_none(self, names: pa.Array, files: pa.Array) -> None:
        """Refuse such a table.

        Args:
            names: the names of all objects of a batch, below the base.
            files: the names of the Parquet files that will be read, without junk such as the logs.

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
                with suppress(StoreError):  # such as a missing permission
                    folder = Folder(self.stores, f"{above}/{_FOLDERS[format]}")
                    first = next((batch for batch in folder.list_objects() if len(batch)), None)
                    if first is not None and _is_log(first["path"], format):
                        raise InputError(_message(above, format))
            inner = above

    def _refusal(self, table: str) -> InputError:
        return InputError(_message(f"{self.base.rstrip('/')}/{table}".rstrip("/"), self._tables[table]))


def _message(table: str, format: str) -> str:
    return (
        f"{table} is a table in the {format} format (it contains {_FOLDERS[format]}/), whose Parquet files may have rows that "
        f"were updated or deleted. Export it as plain Parquet, with {_EXPORTS[format]}, or give a manifest of its images. "
        "--set source.format=objects reads only the images next to it"
    )


def _is_log(paths: pa.Array, format: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(paths, pattern=rf"(?s)(^|/){_LOGS[format]}\z")).as_py())


def _parts(names: pa.Array, pattern: str) -> list[str]:
    """Return the distinct values of the group `root` in the names that match a pattern."""
    roots = pc.unique(pc.struct_field(pc.extract_regex(names, pattern), "root"))
    return [root for root in roots.to_pylist() if root is not None]


def _ancestors(folder: str) -> list[str]:
    """Return a folder and its parents, up to the base.

    >>> _ancestors("a/b/")
    ['a/b/', 'a/', '']
    """
    segments = folder.split("/")[:-1]
    return ["".join(f"{segment}/" for segment in segments[:count]) for count in range(len(segments), -1, -1)]

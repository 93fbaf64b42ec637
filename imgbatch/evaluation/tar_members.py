"""Effects: the members of listed tars, read from the tables of an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.monitor import tick
from imgbatch.evaluation.labelled_inputs import Resolver
from imgbatch.ledger.commit_log import Log
from imgbatch.schema import CARRIED, single_chunk
from imgbatch.sources import sidecars
from imgbatch.sources.labelled import TRUTH
from imgbatch.sources.split_words import SPLIT_NAMES
from imgbatch.sources.tar_reader import key_of
from imgbatch.sources.tars import loose_label, read_sidecars
from imgbatch.storage.stores import Folder


class TarMembers:
    """The members of listed tars, read from the tables of an output, with their sidecars.

    The tables contain the sidecars that are next to their image in the tar. A tar with an image that has none there is read
    once more, for sidecars elsewhere in it.
    """

    def __init__(self, output: Folder, resolver: Resolver) -> None:
        self._output, self._resolver = output, resolver
        self._elsewhere: dict[str, Mapping[str, Mapping[str, str]]] = {}
        self._matched: set[str] = set()
        """The tars in which a sidecar elsewhere belongs to an image."""
        self.unread = set(resolver.tars)
        """The tars without a row."""

    def labelled(self, split: str | None) -> Iterator[pa.Table]:
        """Yield the members of one split, or of all, with their label in TRUTH; also the tars that have a row themselves.

        Raises:
            InputError: the inputs are ambiguous.
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
                is_tar_itself = pc.equal(table["uri"], table["tar"])
                table = table.filter(pc.or_(is_tar_itself, pa.array(splits == SPLIT_NAMES.index(split))))
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
            labels = sidecars.read(columns["cls"], columns["json"], self._resolver.config).labels
            for at in np.flatnonzero(np.asarray(labels.is_null())).tolist():
                uri, tar = rows["uri"][at].as_py(), tars[at].as_py()
                if uri != tar:
                    texts = self._elsewhere_in(tar).get(key_of(uri[len(tar) + 1 :]) or "", {})
                    self._matched.update([tar] if texts else [])
                    for kind, values in columns.items():
                        values[at] = texts.get(CARRIED + kind, values[at])
        return pa.table(
            {"uri": single_chunk(rows["uri"]), **{kind: pa.array(v, pa.string()) for kind, v in columns.items()}}
        )

    def _elsewhere_in(self, tar: str) -> Mapping[str, Mapping[str, str]]:
        if tar not in self._elsewhere:
            self._elsewhere[tar] = read_sidecars(self._resolver.stores, tar, self._resolver.config.suffixes)
        return self._elsewhere[tar]

    def _tars_of(self, uris: pa.ChunkedArray) -> pa.Array:
        """Return the listed tar of each row, null for other rows; a row is `TAR#MEMBER`, or the tar itself."""
        parts, listed = pc.split_pattern(single_chunk(uris), "#"), pa.array(sorted(self._resolver.tars), pa.string())
        tars, deepest = pa.nulls(len(parts), pa.string()), pc.max(pc.list_value_length(parts)).as_py() or 0
        for length in range(1, deepest + 1):  # folders of the tar, and members, may have a # in their names
            prefix = pc.binary_join(pc.list_slice(parts, 0, length), "#")
            tars = pc.coalesce(tars, pc.if_else(pc.is_in(prefix, listed), prefix, None))
        return tars

"""The images of an evaluation and what each truly is, by URI, in tens of bytes an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import BooksError, InputError
from imgbatch.models import Model
from imgbatch.parts import Log
from imgbatch.schema import LISTING, whole
from imgbatch.sources.labelled import TRUTH, Classes, is_tar, member_truths
from imgbatch.storage import Folder
from imgbatch.uris import UriIndex, first_of_each, uri_keys

_LISTED = pa.schema([*LISTING, (TRUTH, pa.string())])

_SHOWN = 5

Numbers = npt.NDArray[np.int32]


class Truths:
    """Images, numbered as they come, and their classes: 28 bytes an image.

    Raises:
        InputError: a truth is none of the labels.
    """

    def __init__(self, listed: Iterable[pa.RecordBatch], labels: Sequence[str]) -> None:
        self._labels, self._index = labels, UriIndex(number=np.int32)
        self._classes: Numbers = np.zeros(0, np.int32)
        self._containers = pa.chunked_array([], pa.dictionary(pa.int32(), pa.string()))
        self._tars: set[str] = set()
        self._add(listed)

    def __len__(self) -> int:
        return len(self._classes)

    def of(self, model: Model) -> Numbers:
        """Return the true class of each image, as a model numbers its classes.

        Raises:
            InputError: it has no such class.
        """
        numbers = Classes(model.labels).numbers(pa.array(self._labels, pa.string()))[self._classes]
        if lacking := np.unique(self._classes[numbers < 0]).tolist():
            names = ", ".join(repr(self._labels[number]) for number in lacking[:_SHOWN])
            without = np.count_nonzero(numbers < 0)
            raise InputError(
                f"{without:,} images are of {len(lacking)} classes that {model.name} does not know: {names}"
            )
        return numbers

    def containers(self, numbers: Numbers) -> pa.Array:
        """Return the column `container` of a listing for some images."""
        return self._containers.take(pa.array(numbers)).combine_chunks().cast(pa.string())

    def numbers(self, uris: pa.Array) -> Numbers:
        """Return the number of each image, -1 where it is none of the evaluation's."""
        numbers = np.full(len(uris), -1, np.int32)
        for columns, rows, positions in self._index.lookup(uri_keys(uris)):
            numbers[rows] = columns["number"][positions]
        return numbers

    def add_members(self, output: Folder) -> None:
        """Read from the tables of an output which members the listed tars have, and their classes.

        Raises:
            BooksError: a tar has no row at all.
            InputError: a member has no class, or one that is none of the labels.
        """
        unread = set(self._tars)
        for name in ("labels", "rejects") if self._tars else ():
            log = Log(output.folder(name))
            log.scan()
            for number in log.numbers:
                rows, _ = log.part(number)
                if len(rows):  # a seal has none of the carried columns either
                    tars = self._tars_of(rows["uri"])
                    unread.difference_update(pc.unique(tars).to_pylist())
                    self._add(self._members(rows.filter(pc.is_valid(tars))))
        if unread:
            raise BooksError(f"{min(unread)} is listed, and no row of it is in {output.uri}: have it labelled first")

    def _tars_of(self, uris: pa.ChunkedArray) -> pa.Array:
        """Return which listed tar each row is of, null where it is of none: `TAR#MEMBER`, or the tar."""
        parts, known = pc.split_pattern(whole(uris), "#"), pa.array(sorted(self._tars), pa.string())
        tars, deepest = pa.nulls(len(parts), pa.string()), pc.max(pc.list_value_length(parts)).as_py() or 0
        for most in range(1, deepest + 1):  # a folder of the tar's, and a member, may have a # in their names
            place = pc.binary_join(pc.list_slice(parts, 0, most), "#")
            tars = pc.coalesce(tars, pc.if_else(pc.is_in(place, known), place, None))
        return tars

    def _members(self, rows: pa.Table) -> list[pa.RecordBatch]:
        # A tar that could not be read has one reject itself: an image of whatever class, which is going to be missed.
        itself = pc.is_in(rows["uri"], pa.array(sorted(self._tars), pa.string()))
        truths = pc.if_else(itself, self._labels[0], member_truths(rows))
        known = {"uri": rows["uri"], TRUTH: truths}
        columns = [known.get(field.name, pa.nulls(len(rows), field.type)) for field in _LISTED]
        return list(pa.Table.from_arrays(columns, schema=_LISTED).to_batches())

    def _add(self, listed: Iterable[pa.RecordBatch]) -> None:
        classes, found, containers = Classes(self._labels), [self._classes], self._containers.chunks
        for batch in listed:
            tar = is_tar(batch)
            self._tars.update(batch["uri"].filter(tar).to_pylist())
            images = batch.filter(pc.invert(tar))
            keys, start = uri_keys(images["uri"]), len(self._index)
            new = first_of_each(keys) & ~self._index.contains(keys)
            self._index.add(keys[new], number=np.arange(start, start + np.count_nonzero(new)))
            found.append(classes.truths(images)[new])
            containers.append(images["container"].filter(pa.array(new)).dictionary_encode())
        classes.require_known()
        self._classes = np.concatenate(found)
        self._containers = pa.chunked_array(containers, self._containers.type)

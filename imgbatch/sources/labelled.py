"""Sources whose images have a known class: a column `label`, or else the folder that holds the image.

A tar is listed in place of its members; they bring their class themselves, in their rows (`member_truths`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.listing import Found
from imgbatch.schema import CARRIED, TAR
from imgbatch.sources import Source
from imgbatch.taxonomy import did_you_mean

TRUTH = CARRIED + "label"
"""The column in which an image's true class travels, whatever the source."""

_CLS, _JSON = CARRIED + "cls", CARRIED + "json"

_FOLDER = r"(?P<folder>[^/#]*)[/#][^/]*$"
_SHOWN, _REMEMBERED = 5, 1_000

Numbers = npt.NDArray[np.int32]


class Classes:
    """The classes of a model, and what the truths of an input say that is none of them."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = pa.array(labels, pa.string())
        self._unknown: Counter[str] = Counter()
        self._without, self._example = 0, ""

    def numbers(self, names: pa.Array | pa.ChunkedArray) -> Numbers:
        """Return the class of each name, -1 where the model has none."""
        names = names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names
        found = pc.fill_null(pc.index_in(names.cast(pa.string()), value_set=self._labels), -1)
        return np.asarray(found, np.int32)

    def truths(self, listed: pa.RecordBatch) -> Numbers:
        """Return the true class of each listed image; what has none is remembered."""
        numbers = self.numbers(listed[TRUTH])
        wrong = listed.filter(pa.array(numbers < 0))
        empty = pc.fill_null(pc.equal(wrong[TRUTH].cast(pa.string()), ""), True)
        if pc.any(empty).as_py():
            self._without += pc.sum(empty).as_py()
            self._example = self._example or wrong.filter(empty)["uri"][0].as_py()
        if len(self._unknown) < _REMEMBERED:
            self._unknown.update(wrong.filter(pc.invert(empty))[TRUTH].cast(pa.string()).to_pylist())
        return numbers

    def require_known(self) -> None:
        """Refuse truths that were none.

        Raises:
            InputError: naming the labels that the model lacks, or an image without one.
        """
        if self._without:
            raise InputError(
                f"{self._without:,} images have no label, {self._example} for one: give each row a label, or leave it away"
            )
        if self._unknown:
            known = self._labels.to_pylist()
            shown = [f"{name!r}{did_you_mean(name, known)}" for name, _ in self._unknown.most_common(_SHOWN)]
            more = ", …" if len(self._unknown) > _SHOWN else ""
            raise InputError(
                f"{sum(self._unknown.values()):,} images have labels that are unknown to the model: {'; '.join(shown)}{more}. "
                f"It knows {len(known):,}, such as {', '.join(map(repr, known[:3]))}; the class is the column `label`, or "
                "else the folder that holds the image"
            )


def labelled(source: Source, classes: Classes) -> Source:
    """Return a source whose images have their truth in TRUTH; its end refuses those that are no class of the model."""

    def found() -> Iterator[Found]:
        for each in source.found():
            batch = each.batch
            if TRUTH not in batch.schema.names:
                batch = batch.append_column(TRUTH, pc.if_else(is_tar(batch), None, _folders(batch["uri"])))
            classes.truths(batch.filter(pc.invert(is_tar(batch))))
            yield replace(each, batch=batch)
        classes.require_known()

    return replace(source, found=found, carried=lambda: _with_truth(source.carried()))


def is_tar(listed: pa.RecordBatch) -> pa.Array:
    """Return a mask of the rows that stand for the members of a tar."""
    return pc.fill_null(pc.equal(listed["container"], TAR), False)


def member_truths(rows: pa.Table) -> pa.Array:
    """Return the class that members of tars bring along: what `.cls` says, or else `label` in `.json`."""
    texts, records = (
        rows[name].to_pylist() if name in rows.column_names else [None] * len(rows) for name in (_CLS, _JSON)
    )
    found = []
    for text, record in zip(texts, records, strict=True):
        if text is None and record is not None:
            with suppress(ValueError, AttributeError):
                text = json.loads(record).get("label")
        found.append(None if text is None else str(text).strip())
    return pa.array(found, pa.string())


def _with_truth(carried: pa.Schema) -> pa.Schema:
    return carried if TRUTH in carried.names else carried.append(pa.field(TRUTH, pa.string()))


def _folders(uris: pa.Array) -> pa.Array:
    """Return the name of the folder that holds each image."""
    return pc.struct_field(pc.extract_regex(uris, _FOLDER), "folder")

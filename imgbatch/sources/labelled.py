"""Sources whose images have a known class: a column `label`, or else the folder that holds the image.

A tar is listed in place of its members; they bring their class themselves, in their rows (`member_truths`).
"""

from __future__ import annotations

import json
import re
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
from imgbatch.schema import CARRIED, TAR, whole
from imgbatch.sources import Source
from imgbatch.taxonomy import did_you_mean

TRUTH = CARRIED + "label"
"""The column in which an image's true class travels, whatever the source."""

SPLIT = CARRIED + "split"
TRAIN, VAL, TEST = range(3)
SPLITS = {"train": TRAIN, "training": TRAIN, "": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL}
SPLITS |= {"test": TEST, "testing": TEST}

_CLS, _JSON = CARRIED + "cls", CARRIED + "json"

_FOLDER = r"(?P<folder>[^/#]*)[/#][^/]*$"
_FOLDER_IN_TAR = r"(?i)\.(?:tar|tar\.gz|tgz)#(?:.*/)?(?P<folder>[^/]+)/[^/]*$"
_SHOWN, _REMEMBERED = 5, 1_000

Numbers = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


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


def labelled(source: Source, classes: Classes, split: str | None = None) -> Source:
    """Return a source whose images have their truth in TRUTH; its end refuses those that are no class of the model.

    Args:
        split: train, val or test: of this one alone; None: of all.
    """

    def found() -> Iterator[Found]:
        for each in source.found():
            batch = each.batch if split is None else each.batch.filter(_in_split(each.batch, source, split))
            if TRUTH not in batch.schema.names:
                batch = batch.append_column(TRUTH, pc.if_else(is_tar(batch), None, _folders(batch["uri"])))
            classes.truths(batch.filter(pc.invert(is_tar(batch))))
            yield replace(each, batch=batch)
        classes.require_known()

    return replace(source, found=found, carried=lambda: _with_truth(source.carried()))


def _in_split(listed: pa.RecordBatch, source: Source, split: str) -> pa.Array:
    """Return a mask of what the column `split` says is of a split, or else the first folder below the input."""
    if pc.any(is_tar(listed)).as_py():
        raise InputError(f"{source.uri}: members of tars say no split; name the tars of one with --input instead")
    first = pc.replace_substring_regex(
        listed["uri"], pattern=f"^{re.escape(source.uri)}/([^/]+)/[^/]+/.*$", replacement="\\1"
    )
    first = pc.utf8_lower(pc.if_else(source.kind == "folder", first, ""))
    folders = pc.if_else(pc.is_in(first, pa.array(list(SPLITS))), first, "")
    said = listed[SPLIT].cast(pa.string()) if SPLIT in listed.schema.names else pa.nulls(len(listed), pa.string())
    return pa.array(split_codes(pc.coalesce(said, folders)) == SPLITS[split])


def split_codes(splits: pa.Array) -> Ints:
    """Return TRAIN, VAL or TEST for each name of a split; an empty one is TRAIN.

    Raises:
        InputError: a name is none.
    """
    names = pc.utf8_lower(pc.utf8_trim_whitespace(splits)).dictionary_encode()
    known = names.dictionary.to_pylist()
    if unknown := [name for name in known if name not in SPLITS]:
        raise InputError(f"column 'split' holds {unknown[0]!r}: it may be train, val, test or empty")
    codes: Ints = np.array([SPLITS[name] for name in known], np.int64)[names.indices.to_numpy()]
    return codes


def is_tar(listed: pa.RecordBatch) -> pa.Array:
    """Return a mask of the rows that stand for the members of a tar."""
    return pc.fill_null(pc.equal(listed["container"], TAR), False)


def member_truths(rows: pa.Table) -> pa.Array:
    """Return the class that members of tars bring along: what `.cls` says, or `label` in `.json`, or the folder in the tar."""
    texts, records = (
        rows[name].to_pylist() if name in rows.column_names else [None] * len(rows) for name in (_CLS, _JSON)
    )
    found = []
    for text, record in zip(texts, records, strict=True):
        if text is None and record is not None:
            with suppress(ValueError, AttributeError):
                text = json.loads(record).get("label")
        found.append(None if text is None else str(text).strip())
    return pc.coalesce(pa.array(found, pa.string()), _folders_in_tars(whole(rows["uri"])))


def _folders_in_tars(uris: pa.Array) -> pa.Array:
    """Return the name of the folder in its tar that holds each member, null for one that lies in none."""
    return pc.struct_field(pc.extract_regex(uris, _FOLDER_IN_TAR), "folder")


def _with_truth(carried: pa.Schema) -> pa.Schema:
    return carried if TRUTH in carried.names else carried.append(pa.field(TRUTH, pa.string()))


def _folders(uris: pa.Array) -> pa.Array:
    """Return the name of the folder that holds each image."""
    return pc.struct_field(pc.extract_regex(uris, _FOLDER), "folder")

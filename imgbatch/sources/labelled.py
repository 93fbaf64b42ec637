"""Sources whose images have a known class: a column `label`, or else the folder that holds the image.

A tar is listed in place of its members; they bring their class themselves, in their rows (`member_truths`).
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.listing import Found
from imgbatch.schema import CARRIED, TAR, whole
from imgbatch.sources import Source
from imgbatch.taxonomy import did_you_mean
from imgbatch.uris import UriIndex, hash_strings, uri_keys

TRUTH = CARRIED + "label"
"""The column in which an image's true class travels, whatever the source."""

SPLIT = CARRIED + "split"
TRAIN, VAL, TEST = range(3)
SPLITS = {"train": TRAIN, "training": TRAIN, "": TRAIN, "val": VAL, "valid": VAL, "validation": VAL, "dev": VAL}
SPLITS |= {"test": TEST, "testing": TEST}
NAMED = [name for name in SPLITS if name]

log = logging.getLogger(__name__)

_CLS, _JSON = CARRIED + "cls", CARRIED + "json"

_FOLDER = r"(?P<folder>[^/#]*)[/#][^/]*$"
_FOLDER_IN_TAR = r"(?i)\.(?:tar|tar\.gz|tgz)#(?:.*/)?(?P<folder>[^/]+)/[^/]*$"
_SHOWN, _REMEMBERED = 5, 1_000

Numbers = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


class Classes:
    """The classes of a model, and what the truths of an input say that is none of them."""

    def __init__(self, labels: Sequence[str], model: str = "the model") -> None:
        self._labels, self._model = pa.array(labels, pa.string()), model
        self._unknown: Counter[str] = Counter()
        self._without, self._example = 0, ""

    def numbers(self, names: pa.Array | pa.ChunkedArray) -> Numbers:
        """Return the class of each name, -1 where the model has none."""
        names = names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names
        found = pc.fill_null(pc.index_in(names.cast(pa.string()), value_set=self._labels), -1)
        return np.asarray(found, np.int32)

    def truths(self, listed: pa.RecordBatch) -> Numbers:
        """Return the true class of each listed image; what has none is remembered."""
        names = text(listed, TRUTH)
        numbers = self.numbers(names)
        wrong, names = listed.filter(pa.array(numbers < 0)), names.filter(pa.array(numbers < 0))
        empty = pc.fill_null(pc.equal(names, ""), True)
        if pc.any(empty).as_py():
            self._without += pc.sum(empty).as_py()
            self._example = self._example or wrong.filter(empty)["uri"][0].as_py()
        if len(self._unknown) < _REMEMBERED:
            self._unknown.update(names.filter(pc.invert(empty)).to_pylist())
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
                f"{sum(self._unknown.values()):,} images have labels that are unknown to {self._model}: {'; '.join(shown)}"
                f"{more}. It knows {len(known):,}, such as {', '.join(map(repr, known[:3]))}; the class is the column `label`, "
                "or else the folder that holds the image"
            )


class Agreement:
    """What was said of each image so far: a second row of one is passed over, and so must not say another thing.

    Sources are listed beside each other, in threads.
    """

    def __init__(self, sources: Sequence[Source], *, splits: bool = True) -> None:
        self.roots = [source.uri for source in sources if source.kind == "folder"]
        """Below which folders say the split."""
        self._splits, self._index = splits, self._fresh()
        self._lock, self._left = threading.Lock(), len(sources)

    def _fresh(self) -> UriIndex:
        return UriIndex(label=np.uint32, split=np.uint8)

    def require(self, listed: pa.RecordBatch) -> None:
        """Refuse what says another class, or another split, of an image or a tar than was said before.

        Raises:
            InputError: naming the image.
        """
        names = text(listed, TRUTH)
        labels = hash_strings(pc.if_else(pc.equal(names, ""), None, names)).astype(np.uint32)  # 0: says nothing
        splits = (splits_of(listed, self.roots) if self._splits else np.zeros(len(listed))).astype(np.uint8)
        keys = uri_keys(listed["uri"])
        with self._lock:
            self._index.add(keys, label=labels, split=splits)
            for columns, rows, at in self._index.lookup(keys):
                before, now = columns["label"][at], labels[rows]
                unlike = {
                    "with two labels": (before != now) & (before != 0) & (now != 0),
                    "in two splits": columns["split"][at] != splits[rows],
                }
                for what, other in unlike.items():
                    if other.any():
                        uri = listed["uri"][int(rows[other.argmax()])].as_py()
                        raise InputError(f"{uri} is listed more than once, {what}: an image has one of each")

    def end(self) -> None:
        """Forget everything when the last source has ended."""
        with self._lock:
            self._left -= 1
            if not self._left:
                self._index = self._fresh()


def labelled(
    given: Sequence[Source], models: Sequence[tuple[str, Sequence[str]]], split: str | None = None
) -> list[Source]:
    """Return sources whose images have their truth in TRUTH; they end by refusing those that a model does not know.

    Args:
        models: the name and the labels of each.
        split: train, val or test: of this one alone; None: of all.
    """
    agreement = Agreement(given, splits=split is not None)

    def found(source: Source) -> Iterator[Found]:
        known, seen, kept = [Classes(labels, name) for name, labels in models], 0, 0
        for each in source.found():
            batch = each.batch
            if TRUTH not in batch.schema.names:
                batch = batch.append_column(TRUTH, pc.if_else(is_tar(batch), None, _folders(batch["uri"])))
            agreement.require(batch)
            seen += len(batch)
            if split is not None:
                batch = batch.filter(pa.array(splits_of(batch, agreement.roots) == SPLITS[split]))
            kept += len(batch)
            for classes in known:
                classes.truths(batch.filter(pc.invert(is_tar(batch))))
            yield replace(each, batch=batch)
        agreement.end()
        if seen and not kept:
            log.warning("%s holds %s images or tars, and none of the split %s", source.uri, f"{seen:,}", split)
        for classes in known:
            classes.require_known()

    return [replace(source, found=partial(found, source)) for source in given]


def split_names(listed: pa.Table | pa.RecordBatch, roots: Sequence[str]) -> pa.Array:
    """Return what the column `split` says of each image, or tar, or else the first folder below an input; null: nothing.

    Args:
        roots: the inputs that are folders; of those within each other the inner one says it.
    """
    said, contained = text(listed, SPLIT), pc.is_valid(text(listed, "container"))
    said = pc.if_else(pc.equal(said, ""), None, said)
    for root in sorted(roots, key=len, reverse=True):
        said = pc.coalesce(said, folder_splits(whole(listed["uri"]), contained, root))
    return said


def splits_of(listed: pa.Table | pa.RecordBatch, roots: Sequence[str]) -> Ints:
    """Return TRAIN, VAL or TEST for each image, or tar; see `split_names`."""
    return split_codes(pc.fill_null(split_names(listed, roots), ""))


def text(listed: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """Return a column as text, nulls where there is none.

    Raises:
        InputError: it holds lists, or what else is no text.
    """
    if name not in listed.schema.names:
        return pa.nulls(len(listed), pa.string())
    try:
        return whole(listed[name]).cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise InputError(
            f"the column {name.removeprefix(CARRIED)!r} holds {listed[name].type}: an image has one text, or number, there"
        ) from error


def folder_splits(uris: pa.Array, contained: pa.Array, root: str) -> pa.Array:
    """Return the first folder below an input where it is called as a split is, null elsewhere.

    Args:
        contained: which are, or lie in, a tar or a Parquet file: these need no second folder, for their class.

    >>> uris = pa.array(["/in/test/cat/1.jpg", "/in/test/1.jpg", "/in/Val/0.tar#1.jpg", "/in/val.jpg"])
    >>> folder_splits(uris, pa.array([False, False, True, False]), "/in").to_pylist()
    ['test', None, 'val', None]
    """
    parts = pc.extract_regex(uris, rf"(?s)^{re.escape(root)}/(?P<first>[^/]+)/(?P<rest>.*)$")
    first, rest = (pc.struct_field(parts, name) for name in ("first", "rest"))
    first = pc.utf8_lower(first)
    below = pc.or_(contained, pc.fill_null(pc.match_substring(rest, "/"), False))
    return pc.if_else(pc.and_(below, pc.is_in(first, pa.array(NAMED))), first, None)


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


def _folders(uris: pa.Array) -> pa.Array:
    """Return the name of the folder that holds each image."""
    return pc.struct_field(pc.extract_regex(uris, _FOLDER), "folder")

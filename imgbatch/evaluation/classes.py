"""Effects: the classes of a model, and the lookup of the labels of an input among them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.models.taxonomy import label_hint
from imgbatch.schema import single_chunk
from imgbatch.sources.labelled import TRUTH
from imgbatch.sources.spelling import normalised
from imgbatch.terminal.plurals import counted

log = logging.getLogger(__name__)

_SHOWN, _MAX_UNKNOWN = 5, 1_000

Numbers = npt.NDArray[np.int32]


class Classes:
    """The classes of a model, and the labels of an input that are not among them."""

    def __init__(self, labels: Sequence[str], model: str = "the model", *, label_is: str = "name") -> None:
        """Store the names of the classes.

        Args:
            labels: in the order of the head.
            model: the name of the model in messages.
            label_is: whether labels are names or numbers: see `source.label_is`.
        """
        self._labels, self._model, self._label_is = normalised(pa.array(labels, pa.string())), model, label_is
        self._unknown: Counter[str] = Counter()
        self._without, self._example = 0, ""
        self._shared: set[str] = set()
        """Labels that are the whole name of one class of ImageNet and the first word of another one."""

    def numbers(self, names: pa.Array | pa.ChunkedArray) -> Numbers:
        """Return the class of each name, -1 if the model has none of this name."""
        numbers = pc.fill_null(pc.index_in(single_chunk(names).cast(pa.string()), value_set=self._labels), -1)
        return np.asarray(numbers, np.int32)

    def of_truths(self, names: pa.Array) -> Numbers:
        """Return the class of each label, -1 if there is none: by its name or WordNet id, or by its number."""
        if self._label_is == "index":
            digits = pc.fill_null(pc.match_substring_regex(names, r"^[0-9]{1,9}$"), False)
            as_numbers = pc.fill_null(pc.if_else(digits, names, None).cast(pa.int32()), -1)
            return np.asarray(pc.if_else(pc.less(as_numbers, len(self._labels)), as_numbers, -1), np.int32)
        numbers = self.numbers(names)
        if self._wordnet_ids:
            self._shared.update({*pc.unique(names).to_pylist()} & self._shared_names.keys())
        if len(ids := self._wordnet_ids) and (numbers < 0).any():
            by_id = pc.fill_null(pc.index_in(names, value_set=pa.array(ids, pa.string())), -1)
            numbers = np.where(numbers < 0, np.asarray(by_id, np.int32), numbers)
        return numbers

    @cached_property
    def _wordnet_ids(self) -> tuple[str, ...]:
        from imgbatch.models import imagenet

        return imagenet.wordnet_ids(tuple(self._labels.to_pylist()))

    @cached_property
    def _shared_names(self) -> dict[str, str]:
        """Names of classes of ImageNet that are the first word of another class, each with the name of that class."""
        labels = self._labels.to_pylist()
        longer = {label.partition(",")[0]: label for label in labels if "," in label}
        return {label: longer[label] for label in labels if label in longer}

    def truths(self, listed: pa.RecordBatch | pa.Table) -> Numbers:
        """Return the true class of each listed image, by the column TRUTH; note images without one."""
        names = single_chunk(listed[TRUTH])
        numbers = self.of_truths(names)
        wrong, names = listed.filter(pa.array(numbers < 0)), names.filter(pa.array(numbers < 0))
        empty = pc.fill_null(pc.equal(names, ""), True)
        if pc.any(empty).as_py():
            self._without += pc.sum(empty).as_py()
            self._example = self._example or wrong["uri"].filter(empty)[0].as_py()
        if len(self._unknown) < _MAX_UNKNOWN:
            self._unknown.update(names.filter(pc.invert(empty)).to_pylist())
        return numbers

    def warn_of_shared_names(self) -> None:
        """Log the labels that are names of two classes of ImageNet."""
        for name in sorted(self._shared):
            longer_name, ids = (
                self._shared_names[name],
                dict(zip(self._labels.to_pylist(), self._wordnet_ids, strict=True)),
            )
            log.warning(
                "two classes of ImageNet have the name %r: it means %s here, not %s (%r); WordNet ids distinguish them",
                name, ids[name], ids[longer_name], longer_name,
            )  # fmt: skip

    def require_known(self) -> None:
        """Refuse images without a class.

        Raises:
            InputError: with the labels that the model lacks, or an image without a label.
        """
        if self._without:
            raise InputError(
                f"{counted(self._without, 'image')} without a label, such as {self._example}: give each image a label, or "
                "omit it"
            )
        if self._unknown:
            labels = self._labels.to_pylist()
            images = counted(sum(self._unknown.values()), "image")
            if self._label_is == "index":
                shown = ", ".join(repr(name) for name, _ in self._unknown.most_common(_SHOWN))
                raise InputError(
                    f"{images} with labels that are no class numbers of {self._model}: {shown}. With source.label_is=index "
                    f"they are 0 to {len(labels) - 1:,}, in the order of the model's head; other numberings are not supported, "
                    "such as ILSVRC's from 1 on: give names, or WordNet ids"
                )
            hints = [f"{name!r}{label_hint(name, labels)}" for name, _ in self._unknown.most_common(_SHOWN)]
            ellipsis = ", …" if len(self._unknown) > _SHOWN else ""
            index = ""
            if all(name.isdecimal() for name in self._unknown):
                index = ". With --set source.label_is=index, numbers are class numbers"
            raise InputError(
                f"{images} with labels that are unknown to {self._model}: {'; '.join(hints)}{ellipsis}{index}. It has "
                f"{len(labels):,}, such as {', '.join(map(repr, labels[:3]))}; docs/labels-and-splits.md describes where "
                "labels come from"
            )

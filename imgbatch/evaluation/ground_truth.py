"""Effects: the images of an evaluation and their true classes, by URI, in tens of bytes an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import AuditError, InputError
from imgbatch.evaluation.classes import Classes
from imgbatch.evaluation.labelled_inputs import Resolver
from imgbatch.evaluation.tar_members import TarMembers
from imgbatch.models import imagenet
from imgbatch.models.model import Model
from imgbatch.schema import LISTING, single_chunk
from imgbatch.sources.base import is_stream
from imgbatch.sources.labelled import TRUTH
from imgbatch.storage.stores import Folder
from imgbatch.terminal.plurals import counted
from imgbatch.uri_index import UriIndex, first_of_each, uri_keys

_LISTED = pa.schema([*LISTING, (TRUTH, pa.string())])

_SHOWN = 5

Numbers = npt.NDArray[np.int32]


class GroundTruth:
    """Images, numbered in the order of the listing, and their classes: 28 bytes an image.

    Raises:
        InputError: an image has no class, or one that is not among the labels.
    """

    def __init__(self, listed: Iterable[pa.RecordBatch], labels: Sequence[str], label_is: str = "name") -> None:
        self._label_is = label_is
        self._labels, self._index = labels, UriIndex(number=np.int32)
        self._classes: Numbers = np.zeros(0, np.int32)
        self.tars: frozenset[str] = frozenset()
        """The URIs of the listed tars whose members were added."""
        self._add(listed)

    def __len__(self) -> int:
        return len(self._classes)

    def of(self, model: Model) -> Numbers:
        """Return the true class of each image, in the numbering of a model.

        Raises:
            InputError: the model lacks a class.
        """
        classes = Classes(model.labels)
        class_of = classes.of_truths(pa.array(self._labels, pa.string()))
        if len(ids := imagenet.wordnet_ids(tuple(self._labels))):  # the model may name its classes by these
            class_of = np.where(class_of < 0, classes.of_truths(pa.array(ids, pa.string())), class_of)
        numbers = class_of[self._classes]
        if lacking := np.unique(self._classes[numbers < 0]).tolist():
            names = ", ".join(repr(self._labels[number]) for number in lacking[:_SHOWN])
            images = int(np.count_nonzero(numbers < 0))
            raise InputError(
                f"{counted(images, 'image')} of {counted(len(lacking), 'class', 'classes')} that {model.name} does not have: "
                f"{names}"
            )
        return numbers

    def numbers(self, uris: pa.Array) -> Numbers:
        """Return the number of each image, -1 for images that are not part of the evaluation."""
        numbers = np.full(len(uris), -1, np.int32)
        for match in self._index.lookup(uri_keys(uris)):
            numbers[match.rows] = match["number"]
        return numbers

    def add_members(
        self,
        output: Folder,
        resolver: Resolver,
        split: str | None = None,
    ) -> None:
        """Add the members of the listed tars, which are read from the tables of an output, and their classes.

        Args:
            resolver: decides again where labels and splits come from, with these members.
            split: add only the members of this split.

        Raises:
            AuditError: a tar has no row at all.
            InputError: a member has no class, or one that is not among the labels.
        """
        members, self.tars = TarMembers(output, resolver), frozenset(resolver.tars)
        for table in members.labelled(split):
            # A tar that could not be read has a reject itself. It counts as an image of any class, without a label.
            is_tar_itself = pc.is_in(table["uri"], pa.array(sorted(resolver.tars), pa.string()))
            first = self._labels[0] if self._label_is == "name" else "0"
            truths = pc.if_else(is_tar_itself, first, single_chunk(table[TRUTH]))
            values = {"uri": table["uri"], TRUTH: truths}
            columns = [values.get(field.name, pa.nulls(len(table), field.type)) for field in _LISTED]
            self._add(pa.Table.from_arrays(columns, schema=_LISTED).to_batches())
        if members.unread:
            raise AuditError(f"{min(members.unread)} is listed, but {output.uri} has no row of it: label it first")

    def _add(self, listed: Iterable[pa.RecordBatch]) -> None:
        classes = Classes(self._labels, label_is=self._label_is)
        class_numbers = [self._classes]
        for batch in listed:
            images = batch.filter(pc.invert(is_stream(batch)))
            keys, start = uri_keys(images["uri"]), len(self._index)
            is_new = first_of_each(keys) & ~self._index.contains(keys)
            self._index.add(keys[is_new], number=np.arange(start, start + np.count_nonzero(is_new)))
            class_numbers.append(classes.truths(images)[is_new])
        classes.require_known()
        classes.warn_of_shared_names()
        self._classes = np.concatenate(class_numbers)

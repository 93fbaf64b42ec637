"""Effects: the images that a model has seen in training, as 64-bit hashes of their bytes in the model directory.

Training writes `training_images.parquet`. An evaluation looks up the images that it scores, and reports how many of them the
model was trained on or selected on: figures on such images are not valid for new ones. Only files that are equal byte by byte
are recognised; a copy that was encoded or resized again is another image here.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.errors import NotFound
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal.plurals import counted, plural

log = logging.getLogger(__name__)

FILE = "training_images.parquet"
LIMIT = 1_000_000
"""Maximum number of hashes in a model directory: 8 MB."""

NOT_COMPARED, UNSEEN, SELECTED, TRAINED = -1, 0, 1, 2
"""Codes of an image: its hash is outside of the stored sample; the model has not seen it; it was held out in training, to
select the model; the model was trained on it."""

ROLES = {TRAINED: "trained", SELECTED: "selected"}
"""The values of the column `role`."""

_LARGEST = np.iinfo(np.uint64).max
_UP_TO = b"hashes_up_to"

Hashes = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.int8]


def content_hash(content: bytes) -> int:
    """Return a 64-bit hash of an image's bytes: BLAKE2b (RFC 7693) with a digest of 8 bytes, read as big-endian.

    Among a million training images and a million others, a pair of different images with one hash has a probability of
    about 5e-8.

    >>> f"{content_hash(b''):016x}"
    'e4a6a0577479b2b4'
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """The images that a model has seen, by the hashes of their bytes: all of them, or a sample of at most `LIMIT`.

    The sample holds every hash up to a certain value. Hashes are uniformly distributed, so that it is a random sample of the
    images, and for an image with such a hash it is known exactly whether it was seen.
    """

    hashes: Hashes
    """Ascending, each once."""
    trained: npt.NDArray[np.bool_]
    """False: the image was only held out, to select the model."""
    up_to: int = _LARGEST
    """The largest hash that the sample may hold."""

    @classmethod
    def of(
        cls, trained: Hashes, selected: Hashes, base: TrainingImages | None = None, limit: int = LIMIT
    ) -> TrainingImages:
        """Return the images of a training run. An image that was trained on and held out counts as trained on.

        Args:
            trained: of the images that the weights were trained on.
            selected: of those that were held out.
            base: the images that the base model has seen; the new model has seen them too.
        """
        up_to = _LARGEST
        if base is not None:
            trained = np.concatenate([trained, base.hashes[base.trained]])
            selected = np.concatenate([selected, base.hashes[~base.trained]])
            up_to = base.up_to
        hashes, first = np.unique(np.concatenate([trained, selected]), return_index=True)
        if len(hashes) > limit:
            up_to = min(up_to, int(hashes[limit - 1]))
        sampled = hashes <= np.uint64(up_to)
        return cls(hashes[sampled], first[sampled] < len(trained), up_to)

    @property
    def proportion(self) -> float:
        """The proportion of all hashes that may be in the sample: 1.0 if it holds every image."""
        return (self.up_to + 1) / (_LARGEST + 1)

    def codes(self, hashes: Hashes) -> Codes:
        """Return TRAINED, SELECTED, UNSEEN or NOT_COMPARED for each image."""
        codes = np.where(hashes <= np.uint64(self.up_to), UNSEEN, NOT_COMPARED).astype(np.int8)
        if len(self.hashes):
            positions = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
            is_seen = self.hashes[positions] == hashes
            codes[is_seen] = np.where(self.trained[positions[is_seen]], TRAINED, SELECTED)
        return codes

    def parquet(self) -> bytes:
        """Return the file: a row for each hash, ascending, with the role of its image."""
        roles = pa.DictionaryArray.from_arrays(
            pa.array((~self.trained).astype(np.int8)), [ROLES[TRAINED], ROLES[SELECTED]]
        )
        table = pa.table({"hash": pa.array(self.hashes, pa.uint64()), "role": roles.cast(pa.string())})
        sink = io.BytesIO()
        pq.write_table(
            table.replace_schema_metadata({_UP_TO: str(self.up_to)}), sink, compression="zstd", use_dictionary=["role"]
        )
        return sink.getvalue()

    @classmethod
    def read(cls, content: bytes) -> TrainingImages:
        """Read the file.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
            hashes = table["hash"].cast(pa.uint64()).to_numpy()
            trained = np.asarray(pc.equal(table["role"], ROLES[TRAINED]), bool)
            up_to = int((table.schema.metadata or {})[_UP_TO])
        except (pa.ArrowException, KeyError, OSError, TypeError) as error:
            raise ValueError(str(error)) from error
        if not 0 <= up_to <= _LARGEST:
            raise ValueError(f"{_UP_TO.decode()} is {up_to}")
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], trained[order], up_to)


def of_model(name: str, stores: Stores) -> TrainingImages | None:
    """Return the images that a model has seen; None: not known, since it has no directory, or no such file in it."""
    if "/" not in name and not name.startswith("."):
        return None
    folder = Folder(stores, absolute(name))
    try:
        return TrainingImages.read(folder.read(FILE))
    except NotFound:
        return None
    except ValueError as error:
        log.warning("%s cannot be read, so the training images of the model are not known: %s", folder.at(FILE), error)
        return None


@dataclass(frozen=True, slots=True)
class Seen:
    """The number of scored images that a model has seen."""

    n: int
    compared: int
    """The number of images with hashes in the range of the sample: all of them, unless the hashes were sampled."""
    trained: int
    """Images that it was trained on. Estimated from the compared ones if there are others."""
    selected: int
    """Images that it was selected on, and not trained on; likewise."""
    proportion: float
    """See `TrainingImages.proportion`."""

    @classmethod
    def of(cls, codes: Codes, images: TrainingImages) -> Seen | None:
        """Count the codes of the scored images; None if hashes were sampled and none of the images could be compared."""
        n, compared = len(codes), int(np.count_nonzero(codes != NOT_COMPARED))
        if not compared:
            return None
        trained, selected = (round(np.count_nonzero(codes == code) * n / compared) for code in (TRAINED, SELECTED))
        return cls(n, compared, trained, selected, images.proportion)

    def __str__(self) -> str:
        """Return the counts as a phrase.

        >>> str(Seen(96, 96, 96, 0, 1.0)), str(Seen(96, 96, 0, 6, 1.0))
        ('96 of 96 images were trained on', '6 of 96 images were used to select the model')
        >>> str(Seen(96, 96, 0, 0, 1.0)), str(Seen(2000, 20, 500, 0, 0.01))
        ('none of 96 images was trained on', 'about 500 of 2,000 images were trained on')
        """
        about = "" if self.compared == self.n else "about "
        counts = [(self.trained, "trained on"), (self.selected, "used to select the model")]
        parts = [
            f"{about}{count:,} of {counted(self.n, 'image')} {plural(count, 'was', 'were')} {role}"
            for count, role in counts
            if count
        ]
        none = (
            f"none of {counted(self.n, 'image')}"
            if self.compared == self.n
            else f"none of {counted(self.compared, 'image')} looked up"
        )
        return ", ".join(parts) or f"{none} was trained on"

    def public(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "trained": self.trained,
            "selected": self.selected,
            "compared": self.compared,
            "share_of_hashes": self.proportion,
        }


NOT_KNOWN = "whether the model was trained on them is not known"

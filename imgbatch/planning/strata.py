"""Values: the strata of a listing: format, size and folder of each image, and how many images and bytes are in each.

The format is that of the name. Memory does not grow with the listing: there are at most 896 strata.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.schema import PARQUET, TAR, single_chunk
from imgbatch.uri_index import hash_strings

FORMATS = (
    *("jpeg", "png", "webp", "gif", "bmp", "tiff", "pnm", "avif", "heic", "jp2", "dicom", "other"),
    *(PARQUET, TAR),
)
_FORMAT_OF = {
    "jpg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "apng": "png", "dib": "bmp", "tif": "tiff", "pbm": "pnm", "pgm": "pnm",
    "ppm": "pnm", "heif": "heic", "hif": "heic", "j2k": "jp2", "jpc": "jp2", "jpf": "jp2", "jpx": "jp2", "dcm": "dicom",
}  # fmt: skip
_EDGES = np.array([16_000, 64_000, 256_000, 1_000_000, 4_000_000, 16_000_000], np.int64)
SIZES = (
    *("below 16 kB", "16 to 64 kB", "64 to 256 kB", "256 kB to 1 MB", "1 to 4 MB", "4 to 16 MB", "16 MB and more"),
    "unknown size",
)
FOLDERS = 8
"""Folders are divided into this many groups, by a hash of their names."""
STRATA = len(FORMATS) * len(SIZES) * FOLDERS
CELLS = STRATA // FOLDERS
"""Format and size without the folder: costs are estimated for each cell."""

Codes = npt.NDArray[np.int64]
_SEED = np.uint64(0x5851F42D4C957F2D)


def name_of(cell: int) -> tuple[str, str]:
    """Return the format and the size class of a cell.

    >>> name_of(cell_of("png", 70_000))
    ('png', '64 to 256 kB')
    """
    return FORMATS[cell // len(SIZES)], SIZES[cell % len(SIZES)]


def cell_of(format: str, size: int | None) -> int:
    """Return the cell of an image."""
    at = len(SIZES) - 1 if size is None else int(np.searchsorted(_EDGES, size, side="right"))
    return FORMATS.index(format) * len(SIZES) + at


def strata_of(batch: pa.RecordBatch | pa.Table) -> Codes:
    """Return the stratum of each row of a listing: `cell * FOLDERS + group of its folder`."""
    uris = single_chunk(batch["uri"])
    folders = pc.replace_substring_regex(uris, pattern=r"[^/]*$", replacement="")
    groups = (hash_strings(folders, _SEED) % np.uint64(FOLDERS)).astype(np.int64)
    cells: Codes = _formats(batch, uris) * len(SIZES) + _sizes(batch)
    return cells * FOLDERS + groups


def _formats(batch: pa.RecordBatch | pa.Table, uris: pa.Array) -> Codes:
    suffixes = pc.struct_field(pc.extract_regex(uris, pattern=r"\.(?P<suffix>[A-Za-z0-9]{1,5})$"), "suffix")
    encoded = single_chunk(pc.utf8_lower(suffixes)).dictionary_encode()
    other = FORMATS.index("other")
    table = np.array([*(_code_of(suffix) for suffix in encoded.dictionary.to_pylist()), other], np.int64)
    codes: Codes = table[np.asarray(encoded.indices.fill_null(len(table) - 1))]
    containers = single_chunk(batch["container"]).fill_null("")
    for container in (PARQUET, TAR):
        codes[np.asarray(pc.equal(containers, container))] = FORMATS.index(container)
    return codes


def _code_of(suffix: str | None) -> int:
    name = _FORMAT_OF.get(suffix or "", suffix or "other")
    return FORMATS.index(name if name in FORMATS[:-2] else "other")


def _sizes(batch: pa.RecordBatch | pa.Table) -> Codes:
    column = single_chunk(batch["size"])
    codes = np.searchsorted(_EDGES, np.asarray(column.fill_null(0)), side="right")
    codes[np.asarray(column.is_null())] = len(SIZES) - 1
    return codes


@dataclass
class Population:
    """The number of images and bytes in each stratum, of all listed images and of those that will be labelled."""

    images: Codes = field(default_factory=lambda: np.zeros(STRATA, np.int64))
    pending: Codes = field(default_factory=lambda: np.zeros(STRATA, np.int64))
    bytes: Codes = field(default_factory=lambda: np.zeros(STRATA, np.int64))
    pending_bytes: Codes = field(default_factory=lambda: np.zeros(STRATA, np.int64))

    def add(self, strata: Codes, batch: pa.RecordBatch, pending: npt.NDArray[np.bool_]) -> None:
        """Count a batch of the listing."""
        sizes = np.asarray(single_chunk(batch["size"]).fill_null(0))
        for counts, mask, weights in (
            (self.images, None, None), (self.pending, pending, None),
            (self.bytes, None, sizes), (self.pending_bytes, pending, sizes),
        ):  # fmt: skip
            codes = strata if mask is None else strata[mask]
            values = None if weights is None else (weights if mask is None else weights[mask])
            counts += np.bincount(codes, values, minlength=STRATA).astype(np.int64)

    def by_cell(self, counts: Codes) -> Codes:
        """Return the sums of counts over the folders of each cell."""
        sums: Codes = counts.reshape(CELLS, FOLDERS).sum(axis=1)
        return sums

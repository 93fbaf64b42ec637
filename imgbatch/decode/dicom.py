"""Values: DICOM: the first frame, as a viewer shows it. pydicom comes with the extra `dicom`.

The values of a grey picture go through three steps (DICOM PS3.3, C.11.1 and C.11.2), each if the file has it: the modality's
table, or slope and intercept; the first VOI table, else the first window; inversion of MONOCHROME1. Without table and window,
8 bits are kept, and others are mapped from the picture's own minimum..maximum to 0..255.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset, read_partial
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from imgbatch.decode import jpeg
from imgbatch.decode.formats import sniff
from imgbatch.decode.headers import check_jp2
from imgbatch.decode.picture import Pixels, Rejected, check_size
from imgbatch.decode.to_rgb import in_strips, scaled, stretch, to_grey

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

_PREAMBLE, _UNDEFINED = 132, 0xFFFFFFFF
_MAX_ELEMENTS = 50_000  # outside sequences; each takes some microseconds
_PIXELS = [Tag(name) for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")]
# All other elements of a file are skipped.
_ELEMENTS = _PIXELS + [
    Tag(name)
    for name in (
        *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PixelPresentation"),
        *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration"),
        *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
        *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
        *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
        *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
        *(
            f"{colour}PaletteColorLookupTable{part}"
            for colour in ("Red", "Green", "Blue")
            for part in ("Descriptor", "Data")
        ),
    )
]
_GREY, _COLOURS = {"MONOCHROME1", "MONOCHROME2"}, {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}


def read(data: bytes, max_pixels: int) -> Pixels:
    """Return the first frame (H, W, 3).

    Raises:
        Rejected: too_large, unsupported, truncated or corrupt; exceptions of pydicom are translated by the caller.
    """
    dataset = _dataset(data)
    _check(dataset, max_pixels)
    stored = pixel_array(dataset, index=0)
    photometric = dataset.PhotometricInterpretation
    if photometric in _GREY:
        grey = _grey(stored, dataset)
        return to_grey(255 - grey if photometric == "MONOCHROME1" else grey)
    if photometric == "PALETTE COLOR":
        return in_strips(stored, lambda strip: scaled(apply_color_lut(strip, dataset)[..., :3]))
    return in_strips(stored, lambda strip: scaled(strip, dataset.BitsStored))


def _dataset(data: bytes) -> Any:
    """Return the elements that are needed; those in the functional groups of an enhanced picture are moved to the top level."""
    file = io.BytesIO(data)
    has_pixels, elements = False, 0

    def check(tag: Any, length: int) -> None:
        if length != _UNDEFINED and file.tell() + length > len(data):
            raise Rejected("truncated", f"the DICOM ends inside its element {tag}")

    def after_meta(tag: Any, _: str | None, length: int) -> bool:
        if tag.group == 2:
            check(tag, length)
        return bool(tag.group != 2)

    def after_pixels(tag: Any, _: str | None, length: int) -> bool:
        nonlocal has_pixels, elements
        elements += 1
        if elements > _MAX_ELEMENTS:
            raise Rejected("corrupt", f"the DICOM has more than {_MAX_ELEMENTS} elements")
        if not has_pixels:
            check(tag, length)
        is_after, has_pixels = has_pixels, has_pixels or tag in _PIXELS
        return is_after

    file.seek(_PREAMBLE)
    meta = read_dataset(file, False, True, stop_when=after_meta)
    # pydicom would decompress it completely, to any size.
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise Rejected("unsupported", "a deflated DICOM is not read")
    file.seek(0)
    dataset = read_partial(file, after_pixels, specific_tags=_ELEMENTS)
    if not has_pixels:
        raise Rejected("unsupported", "the DICOM holds no picture")
    if not any(tag in dataset for tag in _PIXELS):
        raise Rejected("truncated", "the DICOM ends inside its picture")
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for groups in (dataset.get(name) or [])[:1]:
            for step in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for values in (groups.get(step) or [])[:1]:
                    dataset.update(values)
    return dataset


def _check(dataset: Any, max_pixels: int) -> None:
    """Check the elements against the limits, and against the supported kinds."""
    check_size(dataset.Columns, dataset.Rows, max_pixels)
    photometric = dataset.get("PhotometricInterpretation")
    if photometric not in {*_GREY, *_COLOURS, "PALETTE COLOR"}:
        raise Rejected("unsupported", f"a DICOM whose photometric interpretation is {photometric}")
    if photometric == "PALETTE COLOR" and "RedPaletteColorLookupTableData" not in dataset:
        raise Rejected("unsupported", "a DICOM whose palette is segmented, or missing")
    if dataset.get("SamplesPerPixel", 1) != (3 if photometric in _COLOURS else 1):
        raise Rejected("corrupt", f"{dataset.get('SamplesPerPixel')} samples a pixel do not match {photometric}")
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        _keep_first_frame(dataset, max_pixels)


def _keep_first_frame(dataset: Any, max_pixels: int) -> None:
    """Replace the frames by the first one alone, and check the header of its image file against the limits."""
    syntax = dataset.file_meta.TransferSyntaxUID
    decoder = get_decoder(syntax)
    if not decoder.is_available:
        needs = "; ".join(decoder.missing_dependencies)
        raise Rejected("unsupported", f"the DICOM holds {syntax.name}, for which pydicom {needs}")
    tables = [dataset.get(name) for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    frame = get_frame(
        dataset.PixelData,
        0,
        number_of_frames=int(dataset.get("NumberOfFrames") or 1),
        extended_offsets=(tables[0], tables[1]) if all(tables) else None,
    )
    kind = sniff(frame)
    if kind == "jpeg":
        jpeg.read_header(frame, max_pixels)
    elif kind == "jp2":
        # DICOM requires a codestream without boxes. pydicom, which would unwrap one, may search for its box forever.
        frame = frame[check_jp2(frame, max_pixels) :]
    dataset.PixelData, dataset.NumberOfFrames = encapsulate([frame]), 1
    if all(tables):
        del dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths


def _grey(stored: Pixels, dataset: Any) -> Pixels:
    """Return uint8 (H, W)."""

    def modality(strip: Pixels) -> Pixels:
        return np.asarray(apply_modality_lut(strip, dataset))

    if dataset.get("VOILUTSequence"):
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        return in_strips(
            stored, lambda strip: scaled(apply_voi(np.rint(modality(strip)).astype(np.int32), dataset), bits)
        )
    center, width = (_first_number(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None and width > 0:
        function = dataset.get("VOILUTFunction") or "LINEAR"
        return in_strips(stored, lambda strip: windowed(modality(strip), center, width, function))
    if stored.dtype == np.uint8 and dataset.BitsAllocated == 8:
        return stored
    return stretch(in_strips(stored, lambda strip: modality(strip).astype(np.float32)))


def _first_number(value: Any) -> float | None:
    """Return a number, the first of several, or None."""
    values = value if isinstance(value, pydicom.multival.MultiValue) else [value]
    return None if not values or values[0] in (None, "") else float(values[0])


def windowed(values: Pixels, center: float, width: float, function: str) -> Pixels:
    """Map a window to 0..255 (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3).

    >>> windowed(np.array([-1000, -160, 40, 240, 3000]), 40, 400, "LINEAR").tolist()
    [0, 0, 128, 255, 255]
    """
    values = values.astype(np.float64)
    if function == "SIGMOID":
        proportion = 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    elif function == "LINEAR_EXACT":
        proportion = (values - center) / width + 0.5
    else:  # a width of 1 is a threshold
        proportion = (values - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    return np.rint(np.clip(np.nan_to_num(proportion), 0, 1) * 255).astype(np.uint8)

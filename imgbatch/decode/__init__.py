"""Values: decode the bytes of an image file to RGB pixels, or reject them with a reason.

The type is detected from the bytes alone, never from the name. JPEG is decoded by libjpeg-turbo (simplejpeg), DICOM by
pydicom, everything else by Pillow; only the first frame or page. The values in the file are converted to 8-bit RGB:

    in the file                     becomes
    ------------------------------  -----------------------------------------------------------
    RGB, 8 bits                     itself
    RGB, 9 to 16 bits               the upper 8 of 16 bits, as Pillow reads it: the full range
    grey, 8 bits                    R = G = B
    grey, 9 to 16 bits              value / 257 of 16 bits, rounded: the full range of the type
    grey, 32-bit integer or float   the picture's own minimum..maximum to 0..255; constant and NaN are 0
    1 bit                           0 and 255
    palette                         its colours
    alpha, or a transparent colour  dropped, as `Image.convert("RGB")` does and timm's training with it
    CMYK, YCCK                      Pillow's conversion; inks in a JPEG are inverted, as Adobe writes them (marked or not)
    a colour profile                ignored, as timm's and torchvision's training does
    DICOM                           see `dicom`

The orientation in the EXIF data (HEIC: in the container) is applied; invalid EXIF data counts as upright.
"""

from __future__ import annotations

import importlib

from imgbatch.decode import jpeg, pillow
from imgbatch.decode.error_mapping import to_rejected
from imgbatch.decode.formats import sniff
from imgbatch.decode.other_kinds import describe_content
from imgbatch.decode.picture import Picture, Pixels, Rejected, upright

__all__ = ["Picture", "Pixels", "Rejected", "decode", "sniff"]

_EXTRAS = {"heic": "pillow-heif", "dicom": "pydicom"}
_READ = [*pillow.READERS, "dicom"]


def decode(data: bytes, *, max_pixels: int, short_side: int | None = None) -> Picture:
    """Decode an image file. May be called from several threads; the decoders release the GIL.

    Args:
        max_pixels: a picture with more is rejected from its header, before memory is allocated for it.
        short_side: the length to which the caller will reduce the shorter side. A JPEG may then be decoded at 1/2, 1/4 or
            1/8, but to no less than twice that length, so that the visible reduction is done by the caller's filter.

    Raises:
        Rejected: empty, not_an_image, unsupported, too_large, truncated, corrupt or out_of_memory. No other
            exception is raised for any bytes.
    """
    if not data:
        raise Rejected("empty", "the object has no bytes")
    kind = sniff(data)
    if kind is None:
        raise Rejected("not_an_image", describe_content(data))
    if kind not in _READ:
        raise Rejected("unsupported", f"{kind} is not supported in this version; supported: {', '.join(_READ)}")
    pillow.ignore_warnings()
    try:
        if kind == "jpeg":
            return jpeg.decode(data, max_pixels, short_side)
        if kind in _EXTRAS:
            _require_extra(kind)
        if kind == "dicom":
            from imgbatch.decode import dicom

            pixels, orientation = dicom.read(data, max_pixels), 1
        else:
            pixels, orientation = pillow.read(data, kind, max_pixels)
        return upright(pixels, pixels.shape[1], pixels.shape[0], orientation)
    except Rejected:
        raise
    except Exception as error:
        raise to_rejected(data, kind, error) from error


def _require_extra(kind: str) -> None:
    """Import the module that reads a kind, when the first image of it is decoded."""
    try:
        importlib.import_module(f"imgbatch.decode.{kind}")
    except ImportError as error:
        raise Rejected(
            "unsupported",
            f"{kind} needs the package {_EXTRAS[kind]} on every node: pip install 'imgbatch[{kind}]', then run again with "
            "--set rejects.retry=all",
        ) from error

"""Image files made by code: small scenes in every format, and headers that promise more than they hold."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
import pillow_heif
import pydicom
import simplejpeg
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

pillow_heif.register_heif_opener()

Array = np.ndarray[Any, np.dtype[Any]]


def scene(width: int = 64, height: int = 48, seed: int = 0) -> Array:
    """Return a smooth picture without any symmetry, uint8 (height, width, 3), that lossy formats keep well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: Array | Image.Image, format: str, **options: Any) -> bytes:
    """Return the file that Pillow writes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_pillow_reads(data: bytes) -> Array:
    """Return (H, W, 3), as the training pipelines of timm and torchvision see the file; a DICOM as pydicom does."""
    if data[128:132] == b"DICM":
        return pydicom.dcmread(io.BytesIO(data)).pixel_array
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


@cache
def samples(width: int = 64, height: int = 48) -> dict[str, bytes]:
    """Return a valid file of each kind that `decode` reads, and of its main variants."""
    pixels = scene(width, height)
    grey = Image.fromarray(pixels).convert("L")
    return {
        "jpeg": encode(pixels, "JPEG", quality=90),
        "jpeg progressive": encode(pixels, "JPEG", quality=90, progressive=True),
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg cmyk": encode(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95),
        "png": encode(pixels, "PNG"),
        "png palette": encode(Image.fromarray(pixels).quantize(16), "PNG"),
        "webp": encode(pixels, "WEBP", quality=90),
        "webp lossless": encode(pixels, "WEBP", lossless=True),
        "gif": encode(pixels, "GIF"),
        "bmp": encode(pixels, "BMP"),
        "tiff": encode(pixels, "TIFF"),
        "tiff lzw": encode(pixels, "TIFF", compression="tiff_lzw"),
        "pnm": encode(pixels, "PPM"),
        "pnm grey": encode(grey, "PPM"),
        "avif": encode(pixels, "AVIF", quality=90),
        "heic": encode(pixels, "HEIF", quality=90),
        "jp2": encode(pixels, "JPEG2000"),
        "jp2 bare lossy": encode(pixels, "JPEG2000", no_jp2=True, irreversible=True, quality_layers=[10]),
        "dicom": dicom(pixels),
    }


def dicom(values: Array, syntax: str = ExplicitVRLittleEndian, pixels: bytes | None = None, **elements: Any) -> bytes:
    """Return a DICOM of uint8 (H, W, 3), or of integers (H, W) or (frames, H, W); further elements by their keywords.

    `pixels` are the encoded ones where the transfer syntax is one of compressed pictures.
    """
    colours = values.ndim == 3 and values.shape[2] == 3
    height, width = values.shape[:2] if colours else values.shape[-2:]
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = height, width
    dataset.SamplesPerPixel = 3 if colours else 1
    dataset.PhotometricInterpretation = "RGB" if colours else "MONOCHROME2"
    if colours:
        dataset.PlanarConfiguration = 0
    elif values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    bits = 8 * values.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
    raw = values.tobytes() if pixels is None else pydicom.encaps.encapsulate([pixels])
    dataset.PixelData = raw + bytes(len(raw) % 2)
    dataset["PixelData"].VR = "OW" if bits > 8 and pixels is None else "OB"
    for name, value in elements.items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def ycck(pixels: Array) -> bytes:
    """Return a JPEG of four inks as YCCK, which libjpeg-turbo makes of CMYK; the inks inverted, as Adobe has them."""
    inks = 255 - np.array(Image.fromarray(pixels).convert("CMYK"))
    return simplejpeg.encode_jpeg(inks, quality=95, colorspace="CMYK", colorsubsampling="444")


def exif(orientation: int, thumbnail: bytes = b"") -> bytes:
    """Return EXIF data with an orientation, and a thumbnail as cameras store it (IFD 1)."""
    first = struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 26 if thumbnail else 0)
    second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
    head = b"II*\0" + struct.pack("<I", 8) + first
    return b"Exif\0\0" + (head + second + thumbnail if thumbnail else head)


def as_stored(upright: Array, orientation: int) -> Array:
    """Return the pixels as a camera would store them beside this orientation (TIFF 6.0, p. 36)."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),  # shown turned clockwise, so stored turned back
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright).copy()


def jpeg_segment(marker: int, content: bytes) -> bytes:
    """Return one marker segment."""
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content


def jpeg_header(width: int, height: int, frame: int = 0xC0, bits: int = 8) -> bytes:
    """Return a JPEG that ends after the headers of frame and scan."""
    components = bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    sof = jpeg_segment(frame, struct.pack(">BHHB", bits, height, width, 3) + components)
    return b"\xff\xd8" + sof + jpeg_segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0]))


def png_chunk(name: bytes, content: bytes) -> bytes:
    """Return one chunk with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, interlace: int = 0) -> bytes:
    """Return a PNG of raw rows (each with its filter byte), also of kinds that Pillow does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def jp2_without_content(header: bytes) -> bytes:
    """Return a JPEG 2000 whose only tile-part holds next to nothing."""
    content = b"\xff\x93" + bytes(100)
    return header + b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 12 + len(content), 0, 1) + content + b"\xff\xd9"


def gif_header(width: int, height: int) -> bytes:
    """Return a GIF whose frame covers the whole canvas and holds next to nothing."""
    canvas = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return canvas + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0;"


def bmp_header(width: int, height: int) -> bytes:
    """Return a BMP of 24 bits without its pixels."""
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 58, 0, 0, 54, 40, width, height, 1, 24, 0, 4, 0, 0, 0, 0) + bytes(4)


def tiff(width: int, height: int, content: bytes, more: dict[int, tuple[int, ...]] | None = None) -> bytes:
    """Return a TIFF of one strip without compression, 8-bit grey unless `more` tags (LONG values) say otherwise."""
    tags: dict[int, tuple[int, ...]] = {256: (width,), 257: (height,), 258: (8,), 259: (1,), 262: (1,), 273: (8,)}
    tags |= {277: (1,), 278: (height,), 279: (len(content),), **(more or {})}
    content += bytes(len(content) % 2)
    entries, behind = b"", 8 + len(content) + 2 + 12 * len(tags) + 4
    values = b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, values = struct.pack("<I", behind + len(values)), values + packed
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    head = b"II*\0" + struct.pack("<I", 8 + len(content))
    return head + content + struct.pack("<H", len(tags)) + entries + bytes(4) + values


def tiff_header(width: int, height: int) -> bytes:
    """Return a TIFF of one strip of 8-bit grey, of which four bytes are there."""
    return tiff(width, height, bytes(4))


def resized_header(data: bytes, width: int, height: int) -> bytes:
    """Return an AVIF or HEIC whose boxes `ispe` name this size, whatever the picture inside says."""
    at = data.index(b"ispe") + 8
    return data.replace(data[at : at + 8], struct.pack(">II", width, height))


def jp2_header(
    width: int,
    height: int,
    tile: int = 0,
    components: int = 3,
    layers: int = 1,
    levels: int = 5,
    block: int = 6,
    precincts: bytes = b"",
) -> bytes:
    """Return a JPEG 2000 codestream that ends behind its first headers; `block` is the exponent of a code-block's side."""
    size = struct.pack(">HIIIIIIIIH", 0, width, height, 0, 0, tile or width, tile or height, 0, 0, components)
    size += bytes([7, 1, 1]) * components
    coding = [12 + len(precincts), int(bool(precincts)), 0, layers, 0, levels, block - 2, block - 2, 0, 1]
    steps = b"\xff\x52" + struct.pack(">HBBHBBBBBB", *coding) + precincts
    bands = 1 + 3 * levels
    quantisation = b"\xff\x5c" + struct.pack(">HB", 3 + bands, 0x40) + bytes([0x40] * bands)
    return b"\xff\x4f\xff\x51" + struct.pack(">H", 2 + len(size)) + size + steps + quantisation


def webp_header(width: int, height: int) -> bytes:
    """Return an extended WebP whose canvas is this large, with the small picture of a valid one behind."""
    body = encode(scene(16, 16), "WEBP")[12:]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    content = b"WEBPVP8X" + struct.pack("<II", 10, 0) + size + body
    return b"RIFF" + struct.pack("<I", len(content)) + content

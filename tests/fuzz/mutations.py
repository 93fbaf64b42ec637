"""Valid files of every format, and seeded damage to them."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from tests.unit import pictures as make

_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def corpus() -> dict[str, bytes]:
    """Return valid files by a name that begins with their kind."""
    pixels = make.scene(48, 32)
    image, deep = Image.fromarray(pixels), np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) * 40
    frames = {"save_all": True, "append_images": [Image.fromarray(make.scene(48, 32, seed=1))]}
    photo, wavelets = make.encode(pixels, "JPEG"), make.encode(deep, "JPEG2000")
    window = {"WindowCenter": 30_000, "WindowWidth": 20_000, "RescaleSlope": 1, "RescaleIntercept": -1024}
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]  # type: ignore[assignment]
        palette[f"{colour}PaletteColorLookupTableData"] = bytes(range(256)) * 2  # type: ignore[assignment]
    return {
        **make.samples(48, 32),
        "jpeg ycck": make.ycck(pixels),
        "jpeg exif": make.encode(pixels, "JPEG", exif=make.exif(6, photo)),
        "png 16 bits": make.encode(deep, "PNG"),
        "png interlaced": make.png(1, 1, 8, 0, b"\0\1", interlace=1),
        "png animated": make.encode(image, "PNG", **frames),
        "png texts": make.encode(pixels, "PNG", exif=make.exif(3), icc_profile=bytes(300)),
        "webp animated": make.encode(image, "WEBP", **frames),
        "webp exif": make.encode(pixels, "WEBP", exif=make.exif(5)),
        "gif animated": make.encode(image, "GIF", **frames),
        "bmp palette": make.encode(image.quantize(16), "BMP"),
        "tiff 16 bits": make.encode(deep, "TIFF"),
        "tiff float": make.encode(deep.astype(np.float32), "TIFF", compression="tiff_lzw"),
        "tiff deflate": make.encode(pixels, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": make.encode(pixels, "TIFF", compression="jpeg"),
        "tiff fax": make.encode(image.convert("1"), "TIFF", compression="group4"),
        "tiff cmyk": make.encode(image.convert("CMYK"), "TIFF"),
        "tiff pages": make.encode(image, "TIFF", **frames),
        "pnm plain": b"P3 4 2 255 " + b"12 200 7 " * 8,
        "avif exif": make.encode(pixels, "AVIF", exif=make.exif(6)),
        "avif animated": make.encode(image, "AVIF", **frames),
        "heic exif": make.encode(pixels, "HEIF", exif=make.exif(6)),
        "heic grid": make.encode(make.scene(160, 96), "HEIF", tile_size=64),
        "jp2 16 bits": wavelets,
        "jp2 tiles": make.encode(pixels, "JPEG2000", tile_size=(16, 16)),
        "dicom window": make.dicom(deep, **window),
        "dicom palette": make.dicom(np.array(image.convert("L")), **palette),
        "dicom jpeg": make.dicom(pixels, JPEGBaseline8Bit, photo, PhotometricInterpretation="YBR_FULL_422"),
        "dicom jp2": make.dicom(deep, JPEG2000Lossless, wavelets),
        "dicom rle": _run_lengths(pixels),
    }


def mutated(files: dict[str, bytes], number: int, seed: int) -> tuple[str, bytes]:
    """Return the name of a file and what damage number `number` makes of it; the same for the same arguments."""
    chance = random.Random(f"{seed}/{number}")
    name = list(files)[number % len(files)]
    data = bytearray(files[name])
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice((_flip, _flip, _set, _cut, _swap_head, _absurd, _absurd, _splice, _repeat, _drop))(
            data, chance, files
        )
    if name.startswith("png") and chance.random() < 0.7:
        data = _with_checksums(data)
    return name, bytes(data)


def _place(data: bytearray, chance: random.Random) -> int:
    """Choose a place, every other time among the first bytes, where the headers are."""
    return chance.randrange(max(1, len(data) if chance.random() < 0.5 else min(len(data), 400)))


def _flip(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> None:
    for _ in range(chance.choice((1, 3, 30))):
        at = _place(data, chance)
        data[at : at + 1] = bytes(byte ^ 1 << chance.randrange(8) for byte in data[at : at + 1])


def _set(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> None:
    at = _place(data, chance)
    data[at : at + 4] = chance.randbytes(len(data[at : at + 4]))


def _cut(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> None:
    del data[_place(data, chance) :]


def _swap_head(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> None:
    length = chance.choice((4, 12, 32, 132, 200))
    data[:length] = files[chance.choice(list(files))][:length]


def _absurd(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> None:
    size, order = chance.choice((1, 2, 4)), chance.choice(("little", "big"))
    at = _place(data, chance)
    if at + size <= len(data):
        number = chance.choice(_NUMBERS) & (256**size - 1)
        data[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]


def _splice(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> None:
    other = files[chance.choice(list(files))]
    start, at = chance.randrange(len(other)), _place(data, chance)
    data[at:at] = other[start : start + chance.choice((8, 64, 1000))]


def _repeat(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> None:
    start, at = _place(data, chance), _place(data, chance)
    data[at:at] = data[start : start + chance.choice((4, 12, 100))] * chance.choice((1, 10, 1000))


def _drop(data: bytearray, chance: random.Random, files: dict[str, bytes]) -> None:
    at = _place(data, chance)
    del data[at : at + chance.choice((1, 4, 100))]


def _with_checksums(data: bytearray) -> bytearray:
    """Make the chunks' checksums right again: damage that they give away gets no further."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data


def _run_lengths(pixels: make.Array) -> bytes:
    dataset, file = pydicom.dcmread(io.BytesIO(make.dicom(pixels))), io.BytesIO()
    dataset.compress(RLELossless)
    dataset.save_as(file)
    return file.getvalue()

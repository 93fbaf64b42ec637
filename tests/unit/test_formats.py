"""Features of single formats: depths, CMYK, frames, windows, and bombs."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from imgbatch.decode import Rejected, decode, sniff

from . import pictures as make
from .test_decode import LIMIT, difference, grey, little_memory, pixels_of, reason_of

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")


# Optional packages


@pytest.mark.parametrize(("name", "module"), [("heic", "pillow_heif"), ("dicom", "pydicom")])
def test_a_missing_extra_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"imgbatch.decode.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Rejected, match=rf"imgbatch\[{name}\].*rejects.retry=all") as caught:
        decode(make.samples()[name], max_pixels=LIMIT)
    assert caught.value.reason == "unsupported"


def test_an_avif_may_call_itself_a_picture_of_any_kind() -> None:
    data = make.samples()["avif"]
    renamed = data[:8] + b"mif1" + data[12:]
    assert b"avif" in renamed[16:32]
    assert sniff(renamed) == "avif"
    assert np.array_equal(pixels_of(renamed), pixels_of(data))


@pytest.mark.parametrize("name", ["jp2", "jp2 bare lossy", "avif", "heic", "dicom"])
def test_every_cut_is_detected(name: str) -> None:
    data = make.samples(24, 16)[name]
    reasons = {reason_of(data[:length]) for length in range(200, len(data), 7)}
    # Between two elements of a DICOM nothing shows that more should follow.
    assert reasons <= {"truncated", "unsupported" if name == "dicom" else "truncated"}


# Depths


def rgb_ramp() -> make.Array:
    """Return uint16 (1, 16, 3) from 0 to 65535."""
    return np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(1, 16, 3)


@pytest.mark.parametrize("kind", ["png", "tiff", "pnm", "dicom"])
def test_16_bit_colours_keep_their_full_range(kind: str) -> None:
    values = rgb_ramp()
    data = {
        "png": make.png(16, 1, 16, 2, b"\0" + values.astype(">u2").tobytes()),
        "tiff": make.tiff(16, 1, values.tobytes(), {258: (16, 16, 16), 262: (2,), 277: (3,)}),
        "pnm": b"P6 16 1 65535\n" + values.astype(">u2").tobytes(),
        "dicom": make.dicom(values),
    }[kind]
    pixels = pixels_of(data)
    assert np.abs(pixels.astype(int) - values // 257).max() <= 1
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_16_bit_grey_of_jpeg_2000_keeps_its_full_range() -> None:
    values = np.repeat(np.linspace(0, 65535, 32).round().astype(np.uint16)[None], 8, axis=0)
    assert np.array_equal(pixels_of(make.encode(values, "JPEG2000")), grey(np.rint(values / 257)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("interlaced", [False, True])
def test_every_depth_of_png_reaches_from_0_to_255(bits: int, interlaced: bool) -> None:
    top = 2**bits - 1
    row = np.arange(16) % (top + 1)
    packed = np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]).tobytes()
    if not interlaced:
        data = make.png(16, 1, bits, 0, b"\0" + packed)
    else:  # one pixel, which is the first pass of Adam7, and no other
        data = make.png(1, 1, bits, 0, bytes([0, 0xFF]), interlace=1)
    expected = np.array([row]) if not interlaced else np.array([[top]])
    assert np.array_equal(pixels_of(data), grey(np.rint(expected * 255 / top)))


def test_12_bit_grey_of_tiff_has_its_own_range() -> None:
    packed = bytes([0x00, 0x0F, 0xFF])  # two values: 0 and 4095
    assert pixels_of(make.tiff(2, 1, packed, {258: (12,)}))[0, :, 0].tolist() == [0, 255]


def test_16_bit_grey_of_tiff_may_be_white_at_zero() -> None:
    values = np.array([[0, 65535]], np.uint16)
    data = make.tiff(2, 1, values.tobytes(), {258: (16,), 262: (0,)})
    assert pixels_of(data)[0, :, 0].tolist() == [255, 0]


# CMYK


def without_adobe(data: bytes) -> bytes:
    """Remove the marker that says how CMYK values are stored."""
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def test_cmyk_jpegs_are_inverted_with_and_without_a_marker() -> None:
    data = make.samples()["jpeg cmyk"]
    assert difference(pixels_of(data), make.scene()) < 3
    assert np.array_equal(pixels_of(without_adobe(data)), pixels_of(data))


def test_ycck_is_read() -> None:
    data = make.ycck(make.scene())
    assert b"Adobe\0\x64\0\0\0\0\x02" in data
    assert difference(pixels_of(data), make.scene()) < 3
    assert np.array_equal(pixels_of(data[:-2]), pixels_of(data)), "without an end marker"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "JPEG2000"])
def test_a_colour_profile_is_ignored(format: str) -> None:
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = profile.index(b"rXYZ", 128)  # the colours' places in the table of tags change theirs
    other = profile.index(b"bXYZ", 128)
    profile[at : at + 4], profile[other : other + 4] = b"bXYZ", b"rXYZ"
    plain = pixels_of(make.encode(make.scene(), format))
    assert np.array_equal(pixels_of(make.encode(make.scene(), format, icc_profile=bytes(profile))), plain)


# DICOM


def tone(data: bytes) -> list[int]:
    """Return the grey values of the first row."""
    pixels = pixels_of(data)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    return [int(value) for value in pixels[0, :, 0]]


HOUNSFIELD = np.array([[-1000, -160, 40, 240, 3000]], np.int16)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"WindowCenter": 40, "WindowWidth": 400}, [0, 0, 128, 255, 255]),
        ({"WindowCenter": [40, 400], "WindowWidth": [400, 2000]}, [0, 0, 128, 255, 255]),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"}, [0, 0, 128, 255, 255]),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"}, [0, 30, 128, 225, 255]),
        ({"WindowCenter": 41, "WindowWidth": 1}, [0, 0, 0, 255, 255]),
        ({"WindowCenter": 40, "WindowWidth": 0}, [0, 54, 66, 79, 255]),
        ({}, [0, 54, 66, 79, 255]),
        ({"PhotometricInterpretation": "MONOCHROME1"}, [255, 201, 189, 176, 0]),
        ({"RescaleSlope": 2, "RescaleIntercept": -40, "WindowCenter": 40, "WindowWidth": 400}, [0, 0, 128, 255, 255]),
        ({"RescaleSlope": -1, "RescaleIntercept": 0}, [255, 201, 189, 176, 0]),
    ],
    ids=["window", "two windows", "exact", "sigmoid", "threshold", "no width", "none", "white", "rescaled", "turned"],
)
def test_a_window_is_applied_or_the_whole_range_shown(elements: dict[str, Any], expected: list[int]) -> None:
    assert tone(make.dicom(HOUNSFIELD, **elements)) == expected


def test_attributes_of_enhanced_dicom_frames_are_applied() -> None:
    window, scale, groups = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    window.WindowCenter, window.WindowWidth = 40, 400
    scale.RescaleSlope, scale.RescaleIntercept = 1, 0
    groups.FrameVOILUTSequence, groups.PixelValueTransformationSequence = [window], [scale]
    two = np.stack([HOUNSFIELD, HOUNSFIELD[:, ::-1]])
    data = make.dicom(two, PerFrameFunctionalGroupsSequence=[groups, pydicom.Dataset()])
    assert tone(data) == [0, 0, 128, 255, 255], "and the first frame is shown"


def test_a_voi_lookup_table_takes_precedence_over_a_window() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 12], [0, 4095, 0, 2048]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    data = make.dicom(np.array([[0, 1, 2, 3]], np.uint16), VOILUTSequence=[table], WindowCenter=1, WindowWidth=4)
    assert tone(data) == [0, 255, 0, 128]


def test_8_bit_grey_without_a_window_is_unchanged() -> None:
    values = np.array([[10, 20, 200, 100]], np.uint8)
    assert tone(make.dicom(values)) == [10, 20, 200, 100]


def test_12_stored_bits_of_colour_have_their_own_range() -> None:
    values = np.array([[[0, 2048, 4095]]], np.uint16)
    assert pixels_of(make.dicom(values, BitsStored=12, HighBit=11)).tolist() == [[[0, 128, 255]]]


def test_colours_in_planes_and_in_ycbcr() -> None:
    scene = make.scene()
    planes = make.dicom(scene, PlanarConfiguration=1, PixelData=np.moveaxis(scene, 2, 0).tobytes())
    assert np.array_equal(pixels_of(planes), scene)
    luminance = np.array(Image.fromarray(scene).convert("YCbCr"))
    assert difference(pixels_of(make.dicom(luminance, PhotometricInterpretation="YBR_FULL")), scene) < 2


def test_a_palette_of_16_bits_is_expanded() -> None:
    tables = {"Red": [0, 65535, 257], "Green": [65535, 0, 514], "Blue": [0, 0, 65535]}
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, entries in tables.items():
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        elements[f"{colour}PaletteColorLookupTableData"] = struct.pack("<3H", *entries)
    data = make.dicom(np.array([[0, 1, 2]], np.uint8), **elements)
    assert pixels_of(data).tolist() == [[[0, 255, 0], [255, 0, 0], [1, 2, 255]]]


def test_compressed_dicom_images_are_read() -> None:
    scene = make.scene()
    photo = make.encode(scene, "JPEG", quality=95)
    inside = make.dicom(scene, JPEGBaseline8Bit, photo, PhotometricInterpretation="YBR_FULL_422")
    assert difference(pixels_of(inside), scene) < 3
    slices = np.repeat(HOUNSFIELD, 4, axis=0).astype(np.uint16) % 4096
    wavelets = make.encode(slices, "JPEG2000")
    expected = tone(make.dicom(slices, WindowCenter=40, WindowWidth=400))
    for codestream in (wavelets, wavelets[wavelets.index(b"jp2c") + 4 :]):  # with and without boxes around it
        inside = make.dicom(slices, JPEG2000Lossless, codestream, WindowCenter=40, WindowWidth=400)
        assert tone(inside) == expected
    endless = wavelets[:12] + bytes(8) + wavelets[12:]
    assert reason_of(make.dicom(slices, JPEG2000Lossless, endless)) in ("corrupt", "truncated")
    colours = make.encode(scene, "JPEG2000", no_jp2=True)
    assert np.array_equal(
        pixels_of(make.dicom(scene, JPEG2000Lossless, colours, PhotometricInterpretation="YBR_RCT")), scene
    )
    frames, offsets, lengths = pydicom.encaps.encapsulate_extended([photo, make.encode(scene[::-1], "JPEG")])
    tables = {"ExtendedOffsetTable": offsets, "ExtendedOffsetTableLengths": lengths, "NumberOfFrames": 2}
    several = make.dicom(
        scene, JPEGBaseline8Bit, photo, PhotometricInterpretation="YBR_FULL_422", PixelData=frames, **tables
    )
    assert difference(pixels_of(several), scene) < 3
    runs = pydicom.dcmread(io.BytesIO(make.dicom(scene)))
    runs.compress(RLELossless)
    file = io.BytesIO()
    runs.save_as(file)
    assert np.array_equal(pixels_of(file.getvalue()), scene)


def test_unsupported_dicom_content_is_rejected() -> None:
    report = pydicom.dcmread(io.BytesIO(make.dicom(HOUNSFIELD)))
    del report.PixelData
    file = io.BytesIO()
    report.save_as(file)
    assert reason_of(file.getvalue()) == "unsupported"
    assert reason_of(make.dicom(HOUNSFIELD, JPEGLSLossless, b"\xff\xd8\xff\xf7")) == "unsupported"
    assert reason_of(make.dicom(make.scene(), PhotometricInterpretation="YBR_PARTIAL_420")) == "unsupported"
    assert (
        reason_of(make.dicom(HOUNSFIELD.astype(np.uint16), PhotometricInterpretation="PALETTE COLOR")) == "unsupported"
    )
    assert reason_of(make.dicom(make.scene(), PhotometricInterpretation="MONOCHROME2")) == "corrupt"


# Bombs


def packed_gigabyte() -> bytes:
    """Return 1 MB that decompresses to 1 GB of zeros (without a valid checksum)."""
    packer = zlib.compressobj(9)
    head = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    megabyte = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + megabyte * 1024 + packer.flush()


def test_png_metadata_is_ignored() -> None:
    bomb = packed_gigabyte()
    chunks = [
        make.png_chunk(b"zTXt", b"Comment\0\0" + bomb),
        make.png_chunk(b"iCCP", b"profile\0\0" + bomb),
        make.png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        *[make.png_chunk(b"tEXt", b"k%d\0" % number + bytes(1000)) for number in range(1000)],
    ]
    png = make.samples()["png"]
    data = png[:33] + b"".join(chunks) + png[33:]
    with little_memory():
        assert np.array_equal(pixels_of(data), make.scene())


def test_an_archive_after_or_inside_an_image_is_not_opened() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(50_000_000))
    png = make.samples()["png"]
    for data in (png + file.getvalue(), png[:33] + make.png_chunk(b"zipX", file.getvalue()) + png[33:]):
        with little_memory():
            assert np.array_equal(pixels_of(data), make.scene())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF"])
def test_deep_and_circular_exif_data_is_read_in_bounded_time(format: str) -> None:
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)  # the directory of details is the directory itself
    circle = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 400) + entry * 400 + struct.pack("<I", 8)
    data = make.encode(make.scene(), format, exif=circle if format != "TIFF" else make.exif(1))
    if format == "TIFF":
        data = make.tiff(2, 2, bytes(4), {34665: (8,), 330: (8,) * 1000})
    assert pixels_of(data).shape[2] == 3


def test_a_colour_profile_in_a_thousand_pieces_is_read_in_bounded_time() -> None:
    photo = make.samples()["jpeg"]
    pieces = [make.jpeg_segment(0xE2, b"ICC_PROFILE\0" + bytes([n % 256, 255]) + bytes(60_000)) for n in range(255)]
    data = photo[:2] + b"".join(pieces) + photo[2:]
    assert np.array_equal(pixels_of(data), pixels_of(photo))


@linux
def test_format_specific_bombs_are_refused() -> None:
    many = range(40_000, 41_000)
    tags = make.tiff(1, 1, bytes(4_000_000), dict.fromkeys(many, (0,)))
    pixels, directory = tags[:4_000_008], tags[4_000_008:]
    for tag in many:  # each one's value is the whole file: 1,000 times 4 MB
        directory = directory.replace(struct.pack("<HHI", tag, 4, 1), struct.pack("<HHI", tag, 4, 1_000_000))
    frame = struct.pack("<4H", 0, 0, 65_535, 65_535)
    gif, dicom = make.gif_header(4, 4), make.dicom(np.zeros((4, 4), np.uint8))
    pixels_at = dicom.index(b"\x28\0\2\0US")
    element = struct.pack("<HH2sH", 9, 1, b"UN", 0) + bytes(4)
    sequence = b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
    bombs = {
        "tiff tile": (make.tiff(8, 8, bytes(64), {322: (60_000,), 323: (60_000,), 259: (5,)}), "too_large"),
        "tiff tags": (pixels + directory, None),
        "jp2 tiles": (make.jp2_header(10_000, 10_000, tile=16), "unsupported"),
        "jp2 precincts": (deep_jp2(levels=0, precincts=b"\0"), "unsupported"),
        "jp2 blocks": (deep_jp2(block=2), "unsupported"),
        "jp2 layers": (deep_jp2(layers=65_535), "unsupported"),
        "gif comments": (gif[:19] + b"!\xfe" + b"\x02ab" * 2_000_000 + b"\0" + gif[19:], "corrupt"),
        "dicom elements": (dicom[:pixels_at] + element * 60_000 + dicom[pixels_at:], "corrupt"),
        "dicom sequences": (dicom[:pixels_at] + sequence * 5_000 + dicom[pixels_at:], "corrupt"),
        "jp2 components": (make.jp2_header(100, 100, components=16_384), "unsupported"),
        "dicom deflated": (deflated(), "unsupported"),
        "dicom frames": (make.dicom(np.zeros((4, 4), np.uint8), NumberOfFrames=2**31 - 1), "truncated"),
        "gif frame": (make.gif_header(1, 1).replace(b",\0\0\0\0\1\0\1\0", b"," + frame), "too_large"),
    }  # fmt: skip
    for name, (data, expected) in bombs.items():
        with little_memory():
            try:
                decode(data, max_pixels=200_000_000)
                reason = None
            except Rejected as reject:
                reason = reject.reason
        assert reason == expected, name


def deep_jp2(**cuts: Any) -> bytes:
    """Return a JPEG 2000 of 81 million pixels and 200 bytes."""
    return make.jp2_without_content(make.jp2_header(9_000, 9_000, **cuts))


def deflated() -> bytes:
    """Return a DICOM with deflated elements: 1 MB that decompresses to 1 GB."""
    plain = make.dicom(HOUNSFIELD, DeflatedExplicitVRLittleEndian)
    raw = packed_gigabyte()[2:-4]
    return plain[: 144 + int.from_bytes(plain[140:144], "little")] + raw

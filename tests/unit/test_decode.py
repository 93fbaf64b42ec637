"""`decode` for every kind of file: complete, rotated, truncated, damaged, huge, or not an image."""

from __future__ import annotations

import contextlib
import gzip
import io
import pickle
import random
import resource
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from imgbatch.decode import Picture, Rejected, decode, sniff

from . import pictures as make

LIMIT = 10_000_000
EOI = b"\xff\xd9"


def pixels_of(data: bytes, **options: Any) -> make.Array:
    """Return the decoded pixels as (H, W, 3)."""
    return decode(data, max_pixels=LIMIT, **options).pixels


def reason_of(data: bytes, max_pixels: int = LIMIT) -> str:
    """Return the reason of the reject for these data."""
    with pytest.raises(Rejected) as caught:
        decode(data, max_pixels=max_pixels)
    assert str(caught.value)
    return caught.value.reason


def difference(left: make.Array, right: make.Array) -> float:
    """Return the mean absolute difference in grey levels."""
    assert left.shape == right.shape
    return float(np.abs(left.astype(int) - right.astype(int)).mean())


# Recognition of formats


@pytest.mark.parametrize("name", make.samples())
def test_each_format_is_decoded_like_pillow(name: str) -> None:
    data = make.samples()[name]
    assert sniff(data) == name.split()[0]
    picture = decode(data, max_pixels=LIMIT)
    assert (picture.width, picture.height) == (64, 48)
    assert picture.pixels.shape == (48, 64, 3)
    assert picture.pixels.dtype == np.uint8
    assert difference(pixels_of(data), make.as_pillow_reads(data)) < 0.5


@pytest.mark.parametrize("name", ["png", "webp lossless", "bmp", "tiff", "tiff lzw", "pnm", "jp2", "dicom"])
def test_lossless_kinds_return_the_original_pixels(name: str) -> None:
    assert np.array_equal(pixels_of(make.samples()[name]), make.scene())


@pytest.mark.parametrize(
    "data",
    [
        b"just a text that somebody named x.jpg",
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"BM is how this sentence begins, and yet it is no bitmap",
        b"PK\x03\x04 a zip",
        b"\0",
        bytes(4096),
        b"RIFF\x24\0\0\0WAVEfmt ",
    ],
)
def test_other_bytes_are_not_an_image(data: bytes) -> None:
    assert sniff(data) is None
    assert reason_of(data) == "not_an_image"


def zipped(**files: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return sink.getvalue()


XML = b'<?xml version="1.0" encoding="UTF-8"?>\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page (an error page or a login page?)"),
        (b"\n  <!-- a proxy -->\n<HTML lang=en>Please log in", "an HTML page (an error page or a login page?)"),
        ("\ufeff<html>".encode("utf-16-le"), "an HTML page (an error page or a login page?)"),
        (b"<!-- drawn --><html><svg/></html>", "an HTML page (an error page or a login page?)"),
        (XML + b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>", "(AccessDenied)"),
        (b"<Error><Code>NoSuchKey</Code></Error>", "an XML error document, as stores return it (NoSuchKey)"),
        (XML + b"<rss><channel/></rss>", "an XML document ('rss')"),
        (
            b'{"error": {"code": 404, "message": "Not Found"}}',
            'a JSON document that begins with \'{"error"',
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "fetch it with git lfs pull"),
        (b"/annex/objects/SHA256E-s31390--f50d.jpg\n", "a git-annex pointer"),
        (b"just a text", "a text that begins with 'just a text'"),
        ("nur ein Gruß".encode(), "that begins with 'nur ein Gruß'"),
        (b"ab" * 2_000, "…"),
        (zipped(), "an empty zip archive"),
        (zipped(a=b"b"), "a zip archive"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "a PDF document"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video or audio file (MP4 or QuickTime)"),
        (b"\x1aE\xdf\xa3\x9fB\x86\x81\x01", "a video (Matroska or WebM)"),
        (gzip.compress(b"x"), "gzip data"),
        (bytes(4096), "only zero bytes"),
        (b"\x01\x02\x03\xff", "no image format begins with b'\\x01"),
        (b"\x89\xff\0 <html>", "no image format begins with"),
    ],
)
def test_a_reject_describes_the_content(data: bytes, message: str) -> None:
    with pytest.raises(Rejected) as caught:
        decode(data, max_pixels=LIMIT)
    assert caught.value.reason == "not_an_image" and message in str(caught.value)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_text_of_many_comments_is_described_without_backtracking() -> None:
    # It would never end if the comments were tried in all their partitions.
    assert sniff(b"<!-- a -->" * 100_000) is None and reason_of(b"<!-- a -->" * 100_000) == "not_an_image"


def test_no_bytes_are_empty() -> None:
    assert reason_of(b"") == "empty"


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("jxl", b"\xff\x0a" + bytes(20)),
        ("psd", b"8BPS\0\1" + bytes(20)),
        ("ico", b"\0\0\1\0\1\0" + bytes(20)),
        ("svg", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("svg", b"<svg/>"),
        ("svg", b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd">\n<svg/>'),
        ("svg", XML + b'<!-- drawn --><!DOCTYPE svg [ <!ENTITY a "<x>"> ]><svg/>'),
    ],
)
def test_recognised_but_unsupported_formats(kind: str, data: bytes) -> None:
    assert sniff(data) == kind
    assert reason_of(data) == "unsupported"


@pytest.mark.parametrize(("frame", "bits"), [(0xC3, 8), (0xC1, 12)], ids=["lossless", "12 bits"])
def test_rare_jpeg_variants_are_unsupported(frame: int, bits: int) -> None:
    assert reason_of(make.jpeg_header(8, 8, frame, bits)) == "unsupported"


# Colours


def ramp(dtype: str) -> make.Array:
    """Return 0..65535 in steps of 257 * 5, as an image of 4 rows."""
    return (np.arange(52).reshape(4, 13) * 257 * 5).astype(dtype)


def grey(values: make.Array) -> make.Array:
    return np.repeat(values.astype(np.uint8)[:, :, None], 3, axis=2)


def big_endian_tiff() -> bytes:
    image = Image.frombytes("I;16B", (13, 4), ramp(">u2").tobytes())
    return make.encode(image, "TIFF")


@pytest.mark.parametrize(
    "data",
    [
        make.encode(ramp("u2"), "PNG"),
        make.encode(ramp("u2"), "TIFF"),
        make.encode(ramp("u2"), "TIFF", compression="tiff_lzw"),
        big_endian_tiff(),
        b"P5 13 4 65535\n" + ramp(">u2").tobytes(),
        b"P2\n13 4\n65535\n" + " ".join(map(str, ramp("u2").ravel())).encode(),
    ],
    ids=["png", "tiff", "tiff lzw", "tiff big endian", "pgm", "plain pgm"],
)
def test_16_bit_grey_keeps_its_full_range(data: bytes) -> None:
    assert np.array_equal(pixels_of(data), grey(np.arange(52).reshape(4, 13) * 5))


def test_16_bit_grey_is_not_stretched_to_the_range_of_the_picture() -> None:
    assert np.array_equal(
        pixels_of(make.encode(np.full((3, 5), 2 * 257 + 128, np.uint16), "PNG")), grey(np.full((3, 5), 2))
    )


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[-1000, 0, 1000]], np.int32), [[0, 128, 255]]),
        (np.array([[0, 2**31 - 1]], np.int32), [[0, 255]]),
        (np.array([[0.25, 0.75]], np.float32), [[0, 255]]),
        (np.array([[np.nan, -2.0, 2.0, np.inf, -np.inf]], np.float32), [[0, 0, 255, 255, 0]]),
        (np.array([[0x7F800001, 0, 0x3F800000]], np.uint32).view(np.float32), [[0, 0, 255]]),
        (np.full((2, 2), 7.5, np.float32), [[0, 0], [0, 0]]),
        (np.full((2, 2), np.nan, np.float32), [[0, 0], [0, 0]]),
        (np.full((2, 2), -9, np.int32), [[0, 0], [0, 0]]),
    ],
    ids=["int", "int max", "float", "not finite", "signalling NaN", "constant", "all NaN", "constant int"],
)
def test_32_bit_grey_is_stretched_to_its_own_range(
    values: make.Array, expected: list[list[int]], compression: str | None
) -> None:
    data = make.encode(values, "TIFF", compression=compression)
    assert np.array_equal(pixels_of(data), grey(np.array(expected)))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM", "GIF"])
def test_1_bit_becomes_black_and_white(format: str) -> None:
    bits = np.array([[True, False, True, False], [False, False, True, True]])
    assert np.array_equal(pixels_of(make.encode(bits, format)), grey(bits * 255))


def test_grey_is_repeated() -> None:
    values = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert np.array_equal(pixels_of(make.encode(values, "PNG")), grey(values))
    flat = np.full((16, 16), 77, np.uint8)
    assert np.array_equal(pixels_of(make.encode(flat, "JPEG")), grey(flat))


@pytest.mark.parametrize(
    ("format", "transparency"), [("PNG", None), ("PNG", 1), ("PNG", b"\x00\x80\xff"), ("GIF", None), ("GIF", 1)]
)
def test_a_palette_is_expanded_and_its_transparency_dropped(format: str, transparency: int | bytes | None) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    data = make.encode(image, format, **options)
    assert pixels_of(data).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_dropped_and_the_colours_below_it_are_kept(format: str) -> None:
    colours = np.array([[[200, 100, 50, 0], [1, 2, 3, 128], [250, 251, 252, 255]]], np.uint8)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    assert np.array_equal(pixels_of(make.encode(colours, format, **options)), colours[:, :, :3])


def test_grey_with_alpha_is_repeated_without_it() -> None:
    values = np.array([[[9, 0], [200, 255]]], np.uint8)
    assert np.array_equal(pixels_of(make.encode(Image.fromarray(values, "LA"), "PNG")), grey(values[:, :, 0]))


def test_16_bit_colours_keep_their_upper_byte() -> None:
    row = b"\0" + struct.pack(">6H", 0x0102, 0x8000, 0xFFFF, 0x00FF, 0x7FFF, 0xC0DE)
    assert pixels_of(make.png(2, 1, 16, 2, row)).tolist() == [[[0x01, 0x80, 0xFF], [0x00, 0x7F, 0xC0]]]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_converted_as_pillow_does(format: str) -> None:
    inks = Image.fromarray(make.scene()).convert("CMYK")
    data = make.encode(inks, format)
    assert np.array_equal(pixels_of(data), make.as_pillow_reads(data))
    assert difference(pixels_of(data), make.scene()) < 3  # and not inverted


def test_cielab_is_unsupported() -> None:
    assert reason_of(make.encode(Image.new("LAB", (4, 4)), "TIFF")) == "unsupported"


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_only_the_first_frame_is_read(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = make.encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert pixels_of(data)[5, 5].tolist() == [255, 0, 0]


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw", "AVIF", "HEIF"])
def test_every_orientation_is_turned_upright(format: str, orientation: int) -> None:
    upright = make.scene(64, 48)
    format, _, compression = format.partition(" ")
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format, {})
    if compression:
        options = {"compression": f"tiff_{compression}"}
    data = make.encode(make.as_stored(upright, orientation), format, exif=make.exif(orientation), **options)
    picture = decode(data, max_pixels=LIMIT)
    assert (picture.width, picture.height) == (64, 48)
    assert difference(picture.pixels, upright) < {"JPEG": 2, "AVIF": 2, "HEIF": 4}.get(format, 0.001)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0" + bytes(range(256)),
        make.exif(0),
        make.exif(9),
        make.exif(6)[:-16],
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_counts_as_upright(format: str, exif: bytes) -> None:
    data = make.encode(make.scene(), format, exif=exif)
    assert difference(pixels_of(data), make.scene()) < 4


def test_big_endian_exif() -> None:
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    picture = decode(make.encode(make.scene(), "JPEG", exif=exif), max_pixels=LIMIT)
    assert (picture.width, picture.height) == (48, 64)


# Truncated and damaged files


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", make.samples())
def test_a_truncated_file_is_rejected_as_truncated(name: str, share: float) -> None:
    data = make.samples(320, 240)[name]
    assert reason_of(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize("name", make.samples())
def test_a_file_cut_in_its_header_is_truncated(name: str) -> None:
    data = make.samples()[name]
    length = {"pnm": 13, "dicom": 200}.get(name.split()[0], 24)
    assert reason_of(data[:length]) == "truncated"


@pytest.mark.parametrize("name", [name for name in make.samples() if name.startswith("jpeg")])
def test_every_cut_before_the_end_marker_is_detected(name: str) -> None:
    data = make.samples(24, 16)[name]
    for length in range(3, len(data) - 2):
        assert reason_of(data[:length]) == "truncated", length


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("name", [name for name in make.samples() if name.startswith("jpeg")])
def test_a_jpeg_that_only_lacks_its_end_marker_is_decoded(name: str, missing: int) -> None:
    data = make.samples()[name]
    assert data.endswith(EOI)
    assert np.array_equal(pixels_of(data[:-missing]), pixels_of(data))


def test_a_progressive_jpeg_cut_between_two_scans_is_truncated() -> None:
    data = make.samples(320, 240)["jpeg progressive"]
    last_scan = data.rindex(b"\xff\xda")
    start = data.rindex(b"\xff\xc4", 0, last_scan)  # its Huffman table
    assert reason_of(data[:start]) == "truncated"


@pytest.mark.parametrize("tail", [b"\0" * 100, b"garbage", EOI, b"\xff\xd8\xff and so on", bytes(range(256)) * 20])
@pytest.mark.parametrize("name", make.samples())
def test_trailing_garbage_does_not_matter(name: str, tail: bytes) -> None:
    data = make.samples()[name]
    assert np.array_equal(pixels_of(data + tail), pixels_of(data))


def test_the_end_marker_of_a_thumbnail_does_not_count() -> None:
    thumbnail = make.encode(make.scene(16, 12), "JPEG")
    data = make.encode(make.scene(320, 240), "JPEG", exif=make.exif(1, thumbnail))
    assert data.count(EOI) == 2
    assert pixels_of(data).shape == (240, 320, 3)
    assert np.array_equal(pixels_of(data[:-2]), pixels_of(data))
    assert reason_of(data[: len(data) * 2 // 3]) == "truncated"


@pytest.mark.parametrize("damage", [b"\xff\xd3", b"\xff\xe5", b"\0\0", b"\x55\xaa"], ids=bytes.hex)
def test_slight_damage_in_a_complete_jpeg_is_decoded_like_pillow(damage: bytes) -> None:
    data = bytearray(make.samples(320, 240)["jpeg"])
    middle = data.index(b"\xff\xda") + 900
    data[middle : middle + 2] = damage  # among them a restart, and a segment whose length leads beyond the end marker
    assert np.array_equal(pixels_of(bytes(data)), make.as_pillow_reads(bytes(data)))
    assert not np.array_equal(pixels_of(bytes(data)), pixels_of(make.samples(320, 240)["jpeg"]))


def test_a_jpeg_header_that_points_beyond_the_end_marker_is_corrupt() -> None:
    data = make.samples()["jpeg"]
    assert reason_of(data[:4] + b"\xff\xff" + data[6:]) == "corrupt"


def test_a_jpeg_without_tables_is_corrupt() -> None:
    data = make.samples()["jpeg"]
    assert reason_of(data.replace(b"\xff\xdb", b"\xff\xef")) == "corrupt"


def test_a_png_with_damaged_pixels_is_corrupt() -> None:
    data = bytearray(make.samples()["png"])
    start = data.index(b"IDAT") + 4
    data[start : start + 40] = bytes(40)
    assert reason_of(bytes(data)) == "corrupt"


def test_unusual_sampling_is_decoded_by_pillow() -> None:
    data = bytearray(make.encode(np.full((16, 16, 3), (200, 40, 90), np.uint8), "JPEG", subsampling=0))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11 : frame + 19 : 3] == b"\x11\x11\x11"
    data[frame + 14] = 0x12  # Cb with twice the rows of Y: turbo's interface has no name for it
    assert np.array_equal(pixels_of(bytes(data)), make.as_pillow_reads(bytes(data)))


@pytest.mark.parametrize("data", [make.jpeg_header(0, 8), make.jpeg_header(8, 0), make.bmp_header(0, 4)])
def test_an_image_without_pixels_is_corrupt(data: bytes) -> None:
    assert reason_of(data) == "corrupt"


# Size


BOMBS = {
    "png": make.png(50_000, 50_000, 8, 2, b"\0"),
    "jpeg": make.jpeg_header(65_500, 65_500),
    "jpeg cut": make.jpeg_header(65_500, 65_500)[:21],
    "gif": make.gif_header(65_500, 65_500),
    "bmp": make.bmp_header(50_000, 50_000),
    "tiff": make.tiff_header(50_000, 50_000),
    "webp": make.webp_header(16_000, 16_000),
    "webp lossy": b"RIFF\x1e\0\0\0WEBPVP8 \x12\0\0\0\x10\0\0\x9d\x01\x2a"
    + struct.pack("<HH", 16_000, 16_000)
    + bytes(8),
    "webp lossless": b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f" + struct.pack("<I", 15_999 << 14 | 15_999) + bytes(5),
    "avif": make.resized_header(make.samples()["avif"], 16_000, 16_000),
    "heic": make.resized_header(make.samples()["heic"], 16_000, 16_000),
    "jp2": make.jp2_header(50_000, 50_000),
    "dicom": make.dicom(np.zeros((1, 1), np.uint8), Rows=50_000, Columns=50_000),
    "jp2 in dicom": make.dicom(np.zeros((1, 1), np.uint8), JPEG2000Lossless, make.jp2_header(50_000, 50_000)),
    "jpeg in dicom": make.dicom(np.zeros((1, 1), np.uint8), JPEGBaseline8Bit, make.jpeg_header(65_500, 65_500)),
    "pnm": b"P6 50000 50000 255\n....",
}


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Limit the memory of the process to 200 MB more than it uses. The smallest bomb would take 768 MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200_000_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_rejected_from_its_header(name: str) -> None:
    message = r"(50000x50000|65500x65500|16000x16000) pixels .*max_pixels=200000000"
    with little_memory(), pytest.raises(Rejected, match=message) as caught:
        decode(BOMBS[name], max_pixels=200_000_000)
    assert caught.value.reason == "too_large"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")
@pytest.mark.parametrize("name", ["gif", "tiff", "bmp"])
def test_a_picture_larger_than_memory_is_a_reject(name: str) -> None:
    with little_memory():
        assert reason_of(BOMBS[name], max_pixels=10**10) == "out_of_memory"


def test_a_reject_survives_pickling() -> None:
    reject = pickle.loads(pickle.dumps(Rejected("truncated", "why")))
    assert (reject.reason, str(reject)) == ("truncated", "why")


@pytest.mark.parametrize("name", make.samples())
def test_the_limit_is_the_number_of_pixels(name: str) -> None:
    data = make.samples()[name]
    coded = 64 * 64 if name == "heic" else 64 * 48  # in whole blocks, cropped by its container
    assert decode(data, max_pixels=coded).width == 64
    assert reason_of(data, max_pixels=64 * 48 - 1) == "too_large"


def test_pillow_has_no_limit_of_its_own() -> None:
    # Pillow would warn from 89 million pixels on, and refuse from 179 million on.
    assert reason_of(make.tiff_header(20_000, 9_500), max_pixels=200_000_000) == "truncated"


def test_a_memory_error_is_a_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    data = make.samples()["png"]
    monkeypatch.setattr(Image.Image, "convert", refuse)
    assert reason_of(data) == "out_of_memory"


@pytest.mark.parametrize(
    ("short_side", "expected"), [(None, 960), (512, 960), (480, 960), (240, 480), (100, 240), (10, 120)]
)
def test_a_large_jpeg_is_decoded_at_a_reduced_scale(short_side: int | None, expected: int) -> None:
    upright = make.scene(1280, 960)
    data = make.encode(make.as_stored(upright, 6), "JPEG", exif=make.exif(6))
    picture = decode(data, max_pixels=LIMIT, short_side=short_side)
    assert (picture.width, picture.height) == (1280, 960)
    assert picture.pixels.shape == (expected, expected * 4 // 3, 3)
    small = np.array(Image.fromarray(upright).resize((expected * 4 // 3, expected), Image.Resampling.BOX))
    assert difference(picture.pixels, small) < 2


def test_a_reduced_scale_rounds_up() -> None:
    data = make.encode(make.scene(1003, 801), "JPEG")
    assert pixels_of(data, short_side=100).shape == (201, 251, 3)


# Arbitrary bytes


@pytest.mark.parametrize("name", [*make.samples(), "tiff deflate", "jpeg exif"])
def test_random_damage_yields_an_image_or_a_reject(name: str) -> None:
    data = {
        **make.samples(40, 30),
        "tiff deflate": make.encode(make.scene(40, 30), "TIFF", compression="tiff_adobe_deflate"),
        "jpeg exif": make.encode(make.scene(40, 30), "JPEG", exif=make.exif(3)),
    }[name]
    chance = random.Random(name)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 3, 20))):
            at = chance.randrange(len(damaged) if chance.random() < 0.5 else min(64, len(damaged)))
            damaged[at] = chance.choice((0, 0xFF, 0x7F, chance.randrange(256)))
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        try:
            picture = decode(bytes(damaged), max_pixels=LIMIT)
            assert picture.pixels.shape == (picture.height, picture.width, 3)
            outcomes.add("picture")
        except Rejected as reject:
            outcomes.add(reject.reason)
    allowed = {"picture", "empty", "not_an_image", "truncated", "corrupt", "unsupported", "too_large", "out_of_memory"}
    assert outcomes <= allowed
    assert len(outcomes) > 1


def test_pillow_warnings_do_not_leak_with_other_filters() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    palette = make.encode(image, "PNG", transparency=b"\x00\x80")
    png, header_end = make.samples()["png"], 8 + 25
    broken_apng = png[:header_end] + make.png_chunk(b"acTL", bytes(8)) + png[header_end:]
    odd_tiff = make.samples()["tiff"].replace(struct.pack("<HHI", 257, 3, 1), struct.pack("<HHI", 257, 3, 2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(broken_apng)).close()
        assert seen  # Pillow does warn of it
        seen.clear()
        for data in (palette, broken_apng, odd_tiff):
            decode(data, max_pixels=LIMIT)
    assert not seen


def test_several_threads_may_decode_at_once() -> None:
    files = [*make.samples(200, 150).values()] * 6
    expected = [pixels_of(data) for data in files]

    def same(index: int) -> bool:
        return np.array_equal(pixels_of(files[index]), expected[index])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(len(files))))


def test_a_picture_is_a_value_with_channels_last() -> None:
    picture = decode(make.samples()["jpeg"], max_pixels=LIMIT)
    assert isinstance(picture, Picture)
    assert picture.pixels.flags.c_contiguous

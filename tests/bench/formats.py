"""Compare, for each format, the class of a photo with that of Pillow, the model card's transform and 32 bits.

    python tests/bench/formats.py FOLDER [COUNT]

Both sides use the same network in 32 bits on one thread, so only decoding and preprocessing are compared. If Pillow does not
read a format (DICOM), or loses precision (16 bits, floats), the other side gets the photo that was saved: as RGB, as grey, or
as grey scaled from minimum to maximum, according to the rule for the format.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from PIL import Image, ImageOps
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from imgbatch.config.sections import ClassifyConfig, Config
from imgbatch.decode import decode
from imgbatch.models import loading
from imgbatch.models.runtimes.build import build
from imgbatch.storage.stores import Stores
from tests.bench.peers import common
from tests.unit import pictures as make

_crop = common.transform.transforms[:2]  # resize and crop; the runtime normalises


def _deep(grey: make.Array, bits: int) -> make.Array:
    """Return grey values with as many bits, the lower ones filled."""
    return np.rint(grey.astype(np.float64) / 255 * (2**bits - 1)).astype(np.uint16)


def _dicom_12_bits(photo: make.Array, **more: str) -> bytes:
    values = _deep(_grey(photo), 12).astype(np.int16) - 1024
    values = -1 - values + 2**12 - 2048 if "PhotometricInterpretation" in more else values
    return make.dicom(values, WindowCenter=1024, WindowWidth=4096, VOILUTFunction="LINEAR", **more)


def _grey(photo: make.Array) -> make.Array:
    return np.array(Image.fromarray(photo).convert("L"))


def _as_saved(photo: make.Array, data: bytes) -> Image.Image:
    return Image.fromarray(photo)


def _as_grey(photo: make.Array, data: bytes) -> Image.Image:
    return Image.fromarray(_grey(photo)).convert("RGB")


def _as_stretched(photo: make.Array, data: bytes) -> Image.Image:
    return ImageOps.autocontrast(Image.fromarray(_grey(photo))).convert("RGB")


def _with_its_end(photo: make.Array, data: bytes) -> Image.Image:
    return _by_pillow(photo, data + b"\xff\xd9")


def _by_pillow(photo: make.Array, data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def _png_16_bits(photo: make.Array) -> bytes:
    rows = (photo.astype(np.uint16) * 257).astype(">u2")
    return make.png(photo.shape[1], photo.shape[0], 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


def _turned(photo: make.Array) -> bytes:
    return make.encode(make.as_stored(photo, 6), "JPEG", quality=90, exif=make.exif(6))


def _saved(format: str, mode: str = "RGB", **options: object) -> Callable[[make.Array], bytes]:
    return lambda photo: make.encode(Image.fromarray(photo).convert(mode), format, **options)


Reader = Callable[[make.Array, bytes], Image.Image]
FORMATS: dict[str, tuple[Callable[[make.Array], bytes], Reader]] = {
    "JPEG": (_saved("JPEG", quality=90), _by_pillow),
    "JPEG, progressive": (_saved("JPEG", quality=90, progressive=True), _by_pillow),
    "JPEG, grey": (_saved("JPEG", "L", quality=90), _by_pillow),
    "JPEG, CMYK": (_saved("JPEG", "CMYK", quality=90), _by_pillow),
    "JPEG, YCCK": (make.ycck, _by_pillow),
    "JPEG, turned": (_turned, _by_pillow),
    "JPEG without its end": (lambda photo: make.encode(photo, "JPEG", quality=90)[:-2], _with_its_end),
    "PNG": (_saved("PNG", compress_level=1), _by_pillow),
    "PNG, palette": (lambda photo: make.encode(Image.fromarray(photo).quantize(256), "PNG"), _by_pillow),
    "PNG, alpha": (_saved("PNG", "RGBA", compress_level=1), _by_pillow),
    "PNG, 16-bit grey": (lambda photo: make.encode(_deep(_grey(photo), 16), "PNG", compress_level=1), _as_grey),
    "PNG, 16-bit RGB": (_png_16_bits, _by_pillow),
    "WebP": (_saved("WEBP", quality=85), _by_pillow),
    "GIF": (_saved("GIF"), _by_pillow),
    "BMP": (_saved("BMP"), _by_pillow),
    "TIFF": (_saved("TIFF"), _by_pillow),
    "TIFF, LZW": (_saved("TIFF", compression="tiff_lzw"), _by_pillow),
    "TIFF, CMYK": (_saved("TIFF", "CMYK"), _by_pillow),
    "TIFF, 16-bit grey": (lambda photo: make.encode(_deep(_grey(photo), 16), "TIFF"), _as_grey),
    "TIFF, float": (lambda photo: make.encode(_grey(photo).astype(np.float32) / 255, "TIFF"), _as_stretched),
    "PNM": (_saved("PPM"), _by_pillow),
    "AVIF": (_saved("AVIF", quality=75, speed=10), _by_pillow),
    "HEIC": (_saved("HEIF", quality=75, enc_params={"preset": "ultrafast"}), _by_pillow),
    "JPEG 2000": (_saved("JPEG2000", irreversible=True, quality_layers=[20]), _by_pillow),
    "DICOM, RGB": (make.dicom, _as_saved),
    "DICOM, JPEG": (
        lambda photo: make.dicom(
            photo, JPEGBaseline8Bit, _saved("JPEG", quality=90)(photo), PhotometricInterpretation="YBR_FULL_422"
        ),
        lambda photo, _: _by_pillow(photo, _saved("JPEG", quality=90)(photo)),
    ),
    "DICOM, 12 bits, window": (_dicom_12_bits, _as_grey),
    "DICOM, MONOCHROME1": (lambda photo: _dicom_12_bits(photo, PhotometricInterpretation="MONOCHROME1"), _as_grey),
    "DICOM, JPEG 2000 of 16 bits": (
        lambda photo: make.dicom(
            _deep(_grey(photo), 16), JPEG2000Lossless, make.encode(_deep(_grey(photo), 16), "JPEG2000")
        ),
        _as_stretched,
    ),
}


class Labels:
    """The class of a crop, in 32 bits. Cached, because lossless formats give the same crops again."""

    def __init__(self) -> None:
        config = Config()
        model = loading.load(config.model, Stores(config.storage))
        self.preprocess = model.preprocess
        self._runtime = build(model, k=1, device="cpu", config=ClassifyConfig(dtype="float32", batch_size=1))
        self._cache: dict[str, int] = {}

    def __call__(self, crop: make.Array) -> int:
        """Return the best class of uint8 (H, W, 3) at the network's size."""
        key = hashlib.sha1(np.ascontiguousarray(crop).tobytes()).hexdigest()
        if key not in self._cache:
            self._cache[key] = int(self._runtime(crop[None]).ids[0, 0])
        return self._cache[key]


def compare(photos: list[make.Array], labels: Labels, name: str) -> str:
    """Return a row of the table: photos, how many agree, and the mean difference of the crops in grey levels."""
    save, read = FORMATS[name]
    same, differences = 0, []
    for photo in photos:
        data = save(photo)
        ours = labels.preprocess(decode(data, max_pixels=2 * 10**8, short_side=labels.preprocess.short_side).pixels)
        image = read(photo, data)
        for step in _crop:
            image = step(image)
        theirs = np.array(image)
        same += labels(ours) == labels(theirs)
        differences.append(np.abs(ours.astype(int) - theirs).mean())
    return f"| {name} | {len(photos)} | {same} | {same / len(photos):.1%} | {np.mean(differences):.2f} |"


def main(folder: str, count: str = "300") -> None:
    """Print the table, one format at a time."""
    files = sorted(Path(folder).iterdir())[: int(count)]
    photos = [np.array(Image.open(file).convert("RGB")) for file in files]
    labels = Labels()
    print(
        "| format | photos | same class | proportion | mean difference of the crops |\n| --- | --- | --- | --- | --- |"
    )
    for name in FORMATS:
        print(compare(photos, labels, name), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

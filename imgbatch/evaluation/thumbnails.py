"""Effects: images that were labelled before, fetched again and reduced for the page of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from imgbatch.config.sections import Config
from imgbatch.storage.stores import Stores

_SIDE = 240  # pixels


def thumbnails(stores: Stores, config: Config, rows: pa.Table) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield each row with a small JPEG of its image; empty if the image cannot be read, or has changed since."""
    from PIL import Image

    from imgbatch.decode import Rejected, decode
    from imgbatch.sources.fetch import Fetcher

    for row, fetched in zip(rows.to_pylist(), Fetcher(stores, config.fetch, config.source)(rows), strict=True):
        jpeg = io.BytesIO()
        if isinstance(fetched.content, bytes) and fetched.etag == row["etag"]:
            try:
                pixels = decode(fetched.content, max_pixels=config.decode.max_pixels, short_side=_SIDE).pixels
                image = Image.fromarray(pixels)
                image.thumbnail((_SIDE, _SIDE))
                image.save(jpeg, "JPEG", quality=80)
            except Rejected:
                pass
        yield row, jpeg.getvalue()

"""Values: HEIC: importing this module makes Pillow read it, by libheif. The package comes with the extra `heic`."""

from __future__ import annotations

import pillow_heif

# A worker decodes in one thread; everything but the main picture is ignored.
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)

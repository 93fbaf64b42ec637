"""Compare the labels of the job with those of Pillow, the model card's transform and torch in 32 bits.

    python tests/bench/parity.py FOLDER

If names begin with their WordNet synset, as in `n01440764_tench.JPEG`, the correct labels are counted as well.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data import ImageNetInfo

from imgbatch.config.sections import Config
from imgbatch.decode import decode
from imgbatch.models import loading
from imgbatch.models.runtimes.build import build
from imgbatch.storage.stores import Stores
from tests.bench.peers import common

Ids = npt.NDArray[np.int64]
_BATCH = 64
_SYNSET = re.compile(r"n\d{8}")


def compare(images: list[Path]) -> dict[str, Any]:
    """Label the images both ways.

    Returns:
        `images`; `right_fast` and `right_reference`, how many of them got the class of their name, None if a name has
        no class; `agreement`, the proportion that got the same class both ways.
    """
    fast, reference = _in_batches(images, _fast()), _in_batches(images, _reference())
    truth = _truth(images)
    return {
        "images": len(images),
        "right_fast": None if truth is None else int((fast == truth).sum()),
        "right_reference": None if truth is None else int((reference == truth).sum()),
        "agreement": round(float((fast == reference).mean()), 4),
    }


def _fast() -> Callable[[list[Path]], Ids]:
    """Return a function that labels images as the job does with its default configuration on a CPU."""
    config = Config()
    model = loading.load(config.model, Stores(config.storage))
    runtime, preprocess = build(model, k=config.top_k, device="cpu", config=config.classify), model.preprocess

    def label(batch: list[Path]) -> Ids:
        limits = {"max_pixels": config.decode.max_pixels, "short_side": preprocess.short_side}
        pixels = [preprocess(decode(path.read_bytes(), **limits).pixels) for path in batch]
        return runtime(np.stack(pixels)).ids[:, 0].astype(np.int64)

    return label


def _reference() -> Callable[[list[Path]], Ids]:
    """Return a function that labels images as the other programs do."""
    net = common.network()

    def label(batch: list[Path]) -> Ids:
        pixels = [common.transform(Image.open(path).convert("RGB")) for path in batch]
        with torch.inference_mode():
            ids: Ids = net(torch.stack(pixels)).argmax(1).numpy()
        return ids

    return label


def _in_batches(images: list[Path], label: Callable[[list[Path]], Ids]) -> Ids:
    def batches() -> Iterator[Ids]:
        for start in range(0, len(images), _BATCH):
            yield label(images[start : start + _BATCH])

    return np.concatenate(list(batches()))


def _truth(images: list[Path]) -> Ids | None:
    """Return the class of each image, None if a name has none. Both networks have timm's order of classes."""
    order = {name: number for number, name in enumerate(ImageNetInfo().label_names())}
    synsets = [match[0] if (match := _SYNSET.match(path.name)) else "" for path in images]
    return np.array([order[synset] for synset in synsets]) if all(synset in order for synset in synsets) else None


if __name__ == "__main__":
    print(json.dumps(compare(sorted(Path(sys.argv[1]).iterdir())), indent=2))

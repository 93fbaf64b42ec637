"""The bare stages, each alone on one core, and what a run's record says."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch import config, models
from imgbatch.decode import decode
from imgbatch.fetch import Fetcher
from imgbatch.models.runtime import build
from imgbatch.sources.objects import below
from imgbatch.storage import Folder, Stores
from tests.bench.processes import cpu_seconds

_IMAGES = 500
_TURNS = 3


def measure(uri: str, server: int) -> dict[str, float]:
    """Return CPU milliseconds an image: fetch, the S3 server's share of it, decode with resize, forward. Best of three."""
    import torch

    torch.set_num_threads(1)
    chosen = config.Config()
    stores = Stores(chosen.storage)
    listed = pa.Table.from_batches([found.batch for found in below(stores, uri, "images")]).slice(0, _IMAGES)
    model = models.load(chosen.model, stores)
    runtime = build(model, k=chosen.top_k, device="cpu", config=chosen.classify)
    fetcher, preprocess = Fetcher(stores, chosen.fetch, chosen.source), model.preprocess
    contents = [fetched.content for fetched in fetcher(listed)]
    pixels = np.stack([preprocess(_decoded(each, preprocess.short_side)) for each in contents])
    best: dict[str, float] = {}

    def keep(name: str, call: Callable[[], Any]) -> None:
        began = time.process_time()
        call()
        cost = 1000 * (time.process_time() - began) / len(contents)
        best[name] = min(best.get(name, cost), cost)

    for _ in range(_TURNS):
        before = cpu_seconds(server)
        keep("fetch", lambda: list(fetcher(listed)))
        served = 1000 * (cpu_seconds(server) - before) / len(contents)
        best["S3 server"] = min(best.get("S3 server", served), served)
        keep("decode + resize", lambda: [preprocess(_decoded(each, preprocess.short_side)) for each in contents])
        keep("forward", lambda: runtime(pixels))
    return {name: round(value, 3) for name, value in best.items()}


def record(output: str) -> dict[str, Any]:
    """Return the newest run.json of an output."""
    folder = Folder(Stores(config.Config().storage, os.environ), output)
    newest = sorted(folder.folders("runs"))[-1]
    found: dict[str, Any] = json.loads(folder.read(f"runs/{newest}/run.json"))
    return found


def _decoded(content: Any, short_side: int) -> Any:
    return decode(content, max_pixels=200_000_000, short_side=short_side).pixels

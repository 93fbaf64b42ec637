"""Measure each stage by itself, on all cores at once; and read the record of a run."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.config import sections
from imgbatch.decode import decode
from imgbatch.models import loading
from imgbatch.models.runtimes.build import build
from imgbatch.sources.fetch import Fetcher
from imgbatch.sources.recognise import recognise
from imgbatch.storage.stores import Folder, Stores
from tests.bench.processes import cpu_seconds

_IMAGES = 500
_REPETITIONS = 3


def measure(uri: str, server: int) -> dict[str, float]:
    """Return CPU milliseconds per image: fetch, the S3 server's part of it, decode with resize, forward. Medians of three.

    One process per core runs the same stage at the same time, as in a run. Cores share caches, memory and clock rates, so the
    speed of one core while the others are idle is not a limit of the machine.
    """
    spawning, cores = multiprocessing.get_context("spawn"), len(os.sched_getaffinity(0))
    together, found = spawning.Barrier(cores), spawning.Queue()
    processes = [spawning.Process(target=_stages, args=(uri, server, together, found)) for _ in range(cores)]
    for process in processes:
        process.start()
    costs = [found.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    bare = {name: float(np.mean([each[name] for each in costs])) for name in costs[0]}
    bare["S3 server"] /= cores  # each process has measured all of its CPU seconds
    return {name: round(value, 3) for name, value in bare.items()}


def _stages(uri: str, server: int, together: Any, found: Any) -> None:
    """Measure the stages in one of the processes."""
    import torch

    torch.set_num_threads(1)
    config = sections.Config()
    stores = Stores(config.storage)
    (source,) = recognise(stores, [uri], config.source)
    listed = pa.Table.from_batches([found.batch for found in source.list_images()]).slice(0, _IMAGES)
    model = loading.load(config.model, stores)
    runtime = build(model, k=config.top_k, device="cpu", config=config.classify)
    fetcher, preprocess = Fetcher(stores, config.fetch, config.source), model.preprocess
    contents = [fetched.content for fetched in fetcher(listed)]
    pixels = np.stack([preprocess(_decoded(each, preprocess.short_side)) for each in contents])
    costs: dict[str, list[float]] = defaultdict(list)

    def keep(name: str, call: Callable[[], Any]) -> None:
        together.wait()
        began, before = time.process_time(), cpu_seconds(server)
        call()
        spent = time.process_time() - began
        together.wait()
        served = cpu_seconds(server) - before
        for what, seconds in {name: spent, **({"S3 server": served} if name == "fetch" else {})}.items():
            costs[what].append(1000 * seconds / len(contents))

    for _ in range(_REPETITIONS):
        keep("fetch", lambda: list(fetcher(listed)))
        keep("decode + resize", lambda: [preprocess(_decoded(each, preprocess.short_side)) for each in contents])
        keep("forward", lambda: runtime(pixels))
    found.put({name: float(np.median(each)) for name, each in costs.items()})


def record(output: str) -> dict[str, Any]:
    """Return the newest run.json of an output."""
    folder = Folder(Stores(sections.Config().storage, os.environ), output)
    newest = sorted(folder.folders("runs"))[-1]
    found: dict[str, Any] = json.loads(folder.read(f"runs/{newest}/run.json"))
    return found


def _decoded(content: Any, short_side: int) -> Any:
    return decode(content, max_pixels=200_000_000, short_side=short_side).pixels

"""Effects: the canary on a worker: labelled images that a node labels before its first image, and their accuracy.

The accuracy is computed once per node, runtime and device: the first process computes it, the others wait and read it. A worker
whose canary fails yields no row.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from imgbatch.config.secrets import masked
from imgbatch.config.worker import ReadOptions
from imgbatch.errors import Unreachable
from imgbatch.inference.blocks import classify_images
from imgbatch.ledger.streams import UNIT_COLUMNS
from imgbatch.models import node_cache
from imgbatch.models.model import Model
from imgbatch.models.runtimes.base import Runtime
from imgbatch.schema import single_chunk
from imgbatch.storage.stores import Folder

log = logging.getLogger(__name__)

CLASSES = "classes.parquet"
"""The file in the folder of a canary with the class of each image: `uri`, and `class`, its number in the model."""

_SHOWN = 3  # wrong images in a message
_LOCK_S = 900.0
_OLD_S = 86_400.0  # files of earlier runs are removed when they are older

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Canary:
    """The canary of a run."""

    folder: Folder
    """Below the run: its listing as pages, and CLASSES."""
    is_stream: tuple[bool, ...]
    """For each row of the listing, whether it is a tar."""
    min_accuracy: float
    source: ReadOptions

    def units(self) -> Iterator[pa.Table]:
        """Yield the numbers of its images in the units in which a worker reads them: all images, and each tar."""
        images = np.flatnonzero(~np.array(self.is_stream, bool))
        if len(images):
            yield pa.table({"index": images})
        for number in np.flatnonzero(self.is_stream):
            position = dict(zip(UNIT_COLUMNS, ([0], [-1]), strict=True))
            yield pa.table({"index": np.array([number]), **position})


class CanaryError(Exception):
    """Fewer images than required have the right label."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(f"the canary has an accuracy of {facts['accuracy']}")
        self.facts = facts


def require_accuracy(
    canary: Canary, model: Model, runtime: Runtime, node: str, decoded: Callable[[bool], Iterable[pa.Table]]
) -> Facts:
    """Return the facts about the canary on this node, with this runtime and device, for the record of the run.

    Args:
        canary: of the run.
        model: whose classes are compared.
        runtime: in which it is loaded.
        node: the id of this node.
        decoded: returns the images of the canary, decoded; the argument is whether to decode in child processes.

    Raises:
        CanaryError: the accuracy is too low.
        Unreachable: an image could not be fetched, and may be later.
    """
    loaded = runtime.facts()
    place = {"node": node, "host": socket.gethostname()} | {
        key: loaded[key] for key in ("runtime", "device", "dtype") if key in loaded
    }
    if place.get("device", "cpu") != "cpu":  # Ray shows each actor only its own GPUs
        place["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    score = _once_per_node(
        [canary.folder.uri, place], lambda isolated: _score(canary, model, runtime, decoded(isolated))
    )
    facts = {**place, **score, "required": canary.min_accuracy}
    if score["right"] < canary.min_accuracy * score["images"] - 1e-9:
        raise CanaryError(facts | {"passed": False})
    return facts | {"passed": True}


def _score(canary: Canary, model: Model, runtime: Runtime, decoded: Iterable[pa.Table]) -> dict[str, Any]:
    """Label the images of a canary, and compare with their classes. An image that cannot be decoded counts as wrong."""
    expected = pq.read_table(io.BytesIO(canary.folder.read(CLASSES)), use_threads=False)
    uris, truths = single_chunk(expected["uri"]), expected["class"].to_numpy()
    labels = np.full(len(truths), -1, np.int64)
    for images in decoded:
        rows = classify_images(images, runtime, model, 0.0)
        for row in rows.filter(pc.and_(pc.equal(rows["stage"], "fetch"), rows["passing"])).slice(0, 1).to_pylist():
            raise Unreachable(f"the image {masked(row['uri'])} of guard.canary could not be read: {row['message']}")
        at = pc.index_in(single_chunk(rows["uri"]), value_set=uris)
        is_expected = pc.is_valid(at)
        ids = pc.fill_null(single_chunk(rows["label_id"]), -1)
        labels[at.filter(is_expected).to_numpy()] = ids.filter(is_expected).to_numpy()
    wrong = np.flatnonzero(labels != truths)
    examples = [
        {
            "uri": masked(uris[number].as_py()),
            "truth": model.labels[truths[number]],
            "label": model.labels[labels[number]] if labels[number] >= 0 else None,
        }
        for number in wrong[:_SHOWN].tolist()
    ]
    images, right = len(truths), len(truths) - len(wrong)
    counts = {"images": images, "right": right, "rejected": int(np.count_nonzero(labels < 0))}
    return {"accuracy": round(right / images, 6), **counts, "wrong": examples}


def _once_per_node(identity: list[Any], compute: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
    """Return what `compute` returns in the first process of this node that calls it with this identity.

    If the cache of the node cannot be used, each process computes it.

    Args:
        identity: JSON.
        compute: its argument is whether a process has died before in this function, so that an image may be the reason.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    path = node_cache.folder() / f"canary-{key}.json"
    try:
        with FileLock(f"{path}.lock", timeout=_LOCK_S):
            score = _read(path)
            if score is None:
                started = path.with_suffix(".started")
                has_died = started.exists()
                with suppress(OSError):
                    started.touch()
                try:
                    score = compute(has_died)
                finally:
                    with suppress(OSError):
                        started.unlink()
                with suppress(OSError):
                    _write(path, score)
            return score
    except (Timeout, OSError) as error:
        log.warning("this process labels the canary itself, since the node's result cannot be shared: %s", error)
        return compute(True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        score = json.loads(path.read_text())
        return score if isinstance(score, dict) and {"accuracy", "images", "right"} <= score.keys() else None
    except (OSError, ValueError):
        return None


def _write(path: Path, score: Facts) -> None:
    for old in path.parent.glob("canary-*"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _OLD_S:
                old.unlink()
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(score))
    partial.replace(path)

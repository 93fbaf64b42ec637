"""Ray Data as its documentation shows batch inference: read_images, map, map_batches with an actor, write_parquet."""

from __future__ import annotations

import sys
from typing import Any

import common
import ray
import s3fs
import torch
from PIL import Image


def prepare(row: dict[str, Any]) -> dict[str, Any]:
    """Transform one picture."""
    return {"path": row["path"], "pixels": common.transform(Image.fromarray(row["image"])).numpy()}


class Predictor:
    """Predicts batches."""

    def __init__(self) -> None:
        self.net = common.network()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            scores, ids = self.net(torch.from_numpy(batch["pixels"])).softmax(1).max(1)
        return {"path": batch["path"], "label_id": ids.numpy(), "score": scores.numpy()}


if __name__ == "__main__":
    source, target = sys.argv[1:]
    store = s3fs.S3FileSystem(**common.S3)
    ray.init(address="local", logging_level="ERROR", runtime_env={"working_dir": "tests/bench/peers"})
    photos = ray.data.read_images(source, filesystem=store, include_paths=True, mode="RGB")
    labels = photos.map(prepare).map_batches(Predictor, batch_size=common.BATCH, concurrency=1, num_cpus=1)
    labels.write_parquet(target, filesystem=store)

"""timm with a folder: objects are copied to a disk, and timm's dataset and loader feed the network in batches of 256."""

from __future__ import annotations

import sys
import tempfile

import common
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
import torch
from timm.data import create_dataset, create_loader

if __name__ == "__main__":
    source, target = sys.argv[1:]
    store, net, ids, scores = s3fs.S3FileSystem(**common.S3), common.network(), [], []
    with tempfile.TemporaryDirectory() as folder:
        store.get(source, folder, recursive=True)
        images = create_dataset("", root=folder)
        batches = create_loader(
            images, input_size=(3, 224, 224), batch_size=256, num_workers=2, device=torch.device("cpu"),
            interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875,
        )  # fmt: skip
        with torch.inference_mode():
            for pixels, _ in batches:
                best = net(pixels).softmax(1).max(1)
                ids += best.indices.tolist()
                scores += best.values.tolist()
        table = {"path": images.filenames(), "label_id": ids, "score": scores}
    with store.open(target + "/labels.parquet", "wb") as file:
        pq.write_table(pa.table(table), file)

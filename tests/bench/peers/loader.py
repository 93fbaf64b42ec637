"""A DataLoader over s3fs: two processes fetch and decode, one predicts and writes one Parquet file at the end."""

from __future__ import annotations

import io
import sys

import common
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
import torch
from PIL import Image


class Photos(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Objects of a prefix."""

    def __init__(self, paths: list[str]) -> None:
        self.paths, self.store = paths, None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        self.store = self.store or s3fs.S3FileSystem(**common.S3)
        picture = Image.open(io.BytesIO(self.store.cat_file(self.paths[number])))
        return common.transform(picture.convert("RGB")), number


if __name__ == "__main__":
    source, target = sys.argv[1:]
    store = s3fs.S3FileSystem(**common.S3)
    paths, net, rows = sorted(store.find(source)), common.network(), []
    batches = torch.utils.data.DataLoader(
        Photos(paths), batch_size=common.BATCH, num_workers=2, multiprocessing_context="spawn"
    )
    with torch.inference_mode():
        for pixels, numbers in batches:
            scores, ids = net(pixels).softmax(1).max(1)
            rows += zip(numbers.tolist(), ids.tolist(), scores.tolist(), strict=True)
    table = {
        "path": [paths[row[0]] for row in rows],
        "label_id": [row[1] for row in rows],
        "score": [row[2] for row in rows],
    }
    with store.open(target + "/labels.parquet", "wb") as file:
        pq.write_table(pa.table(table), file)

"""Daft: list, download, decode, transform, a class UDF, write_parquet."""

from __future__ import annotations

import sys

import common
import daft
import numpy as np
import torch
from PIL import Image

S3 = daft.io.S3Config(
    endpoint_url=common.S3["endpoint_url"],
    key_id=common.S3["key"],
    access_key=common.S3["secret"],
    region_name="us-east-1",
)


@daft.cls(max_concurrency=1)
class Predictor:
    """Predicts batches."""

    def __init__(self) -> None:
        self.net = common.network()

    @daft.method.batch(return_dtype=daft.DataType.int64(), batch_size=common.BATCH)
    def __call__(self, pixels: daft.Series) -> list[int]:
        if not len(pixels):
            return []
        with torch.inference_mode():
            return self.net(torch.from_numpy(np.array(pixels.to_pylist()))).argmax(1).tolist()


if __name__ == "__main__":
    source, target = sys.argv[1:]
    daft.set_planning_config(default_io_config=daft.io.IOConfig(s3=S3))
    photos = daft.from_glob_path(f"s3://{source}/**")
    photos = photos.with_column("image", photos["path"].download().decode_image(mode=daft.ImageMode.RGB))
    pixels = photos["image"].apply(
        lambda image: common.transform(Image.fromarray(image)).numpy(),
        return_dtype=daft.DataType.tensor(daft.DataType.float32(), (3, 224, 224)),
    )
    photos = photos.with_column("pixels", pixels)
    photos.with_column("label_id", Predictor()(daft.col("pixels"))).select("path", "label_id").write_parquet(
        f"s3://{target}"
    )

"""What a job left, read as its users read it: tables with DuckDB, records as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import obstore
from obstore.store import S3Store

Row = dict[str, Any]


def rows(output: Path, table: str = "labels") -> list[Row]:
    """Return all rows of a table, read with one glob, ordered by uri."""
    if not any(output.glob(f"{table}/*.parquet")):
        return []
    with duckdb.connect() as connection:
        # Through Arrow: DuckDB's own `fetchall` wants pytz for a timestamp with a zone.
        found = connection.sql(f"select * from read_parquet('{output}/{table}/*.parquet') order by uri")
        listed: list[Row] = found.to_arrow_table().to_pylist()
        return listed


def names(output: Path, table: str = "labels") -> list[str]:
    """Return the base names of the images in a table, in order."""
    return [row["uri"].rpartition("/")[2] for row in rows(output, table)]


def labels(output: Path) -> dict[str, str]:
    """Return the label of each image, by base name; an image in two rows is an error."""
    found = {row["uri"].rpartition("/")[2]: row["label"] for row in rows(output)}
    assert len(found) == len(rows(output)), "an image is in two rows"
    return found


def reasons(output: Path) -> dict[str, str]:
    """Return why each rejected image has no label, by base name."""
    return {row["uri"].rpartition("/")[2]: row["reason"] for row in rows(output, "rejects")}


def parts(output: Path) -> dict[str, bytes]:
    """Return the content of every part, by its name in the output."""
    found = [*output.glob("labels/*"), *output.glob("rejects/*")]
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(found)}


def success(output: Path) -> Row:
    """Return what `_SUCCESS` says."""
    said: Row = json.loads((output / "_SUCCESS").read_text())
    return said


def runs(output: Path) -> list[Row]:
    """Return the records of all runs, in the order in which they were started."""
    records = [json.loads(path.read_text()) for path in output.glob("runs/*/run.json")]
    return sorted(records, key=lambda record: (record["started"], record.get("finished", "9")))


def download(bucket: S3Store, prefix: str, target: Path) -> Path:
    """Copy everything below a prefix into a folder."""
    for batch in obstore.list(bucket, prefix):
        for entry in batch:
            path = target / entry["path"].removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(obstore.get(bucket, entry["path"]).bytes()))
    return target


def require_single(output: Path, expected: Sequence[str]) -> None:
    """Require that each expected image is in exactly one row of the two tables, and nothing else is."""
    assert sorted(names(output) + names(output, "rejects")) == sorted(expected)


def by_hand(model: Path, images: list[Path]) -> dict[str, tuple[str, float, float]]:
    """Return label, score and lead over the second best of each image, with timm's own transform and network."""
    import timm
    import torch
    from PIL import Image

    config = json.loads((model / "config.json").read_text())
    net = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
    found = {}
    for path in images:
        with Image.open(path) as image, torch.inference_mode():
            scores = net(transform(image.convert("RGB"))[None]).softmax(1)[0].topk(2)
        lead = float(scores.values[0] - scores.values[1])
        found[path.name] = (config["label_names"][int(scores.indices[0])], float(scores.values[0]), lead)
    return found

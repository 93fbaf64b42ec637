"""Make the output that the tests of the clients read: two real runs, with all that makes a table hard to read.

    python -m tests.clients.make_tables FOLDER

It runs in the environment of the jobs. Beside `out/`, the output, it writes `expected.json`: the rows of both tables, as
pyarrow reads them part by part.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "data" / "v0.1.0"
BOX = pa.struct([("name", pa.string()), ("xy", pa.list_(pa.float32()))])


def manifest(place: Path, names: list[str]) -> Path:
    """Write a Parquet manifest of these images whose further columns are of many types, nulls among the values."""
    count = range(len(names))
    table = pa.table({
        "uri": names,
        "size": [(place / name).stat().st_size for name in names],
        "text": pa.array([None if n == 1 else f"Ærø {n}" for n in count], pa.string()),
        "number": pa.array([None if n == 2 else n for n in count], pa.int64()),
        "share": pa.array([n / 7 for n in count], pa.float64()),
        "day": pa.array([datetime(2026, 1, 1 + n).date() for n in count], pa.date32()),
        "moment": pa.array([datetime(2026, 1, 1, n, tzinfo=UTC) for n in count], pa.timestamp("us", "UTC")),
        "good": pa.array([n % 2 == 0 for n in count], pa.bool_()),
        "words": pa.array([None if n == 3 else ["a"] * n for n in count], pa.list_(pa.string())),
        "box": pa.array([None if n == 4 else {"name": str(n), "xy": [n / 2]} for n in count], BOX),
        "boxes": pa.array([[{"name": "b", "xy": [float(n)]}] * (n % 3) for n in count], pa.list_(BOX)),
    })  # fmt: skip
    path = place / "manifest.parquet"
    pq.write_table(table, path)
    return path


def classify(place: Path, images: list[str]) -> None:
    """Run the main job on these images, with embeddings."""
    listed = manifest(place, images)
    command = [sys.executable, "jobs/classify.py", "--input", str(listed), "--output", str(place / "out")]
    settings = ("output.embeddings=true", "cluster.device=cpu", "rejects.max_share=0.5")
    options = [argument for setting in settings for argument in ("--set", setting)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    environment["PYTHONPATH"] = str(ROOT)
    subprocess.run([*command, "--model", str(OLD / "model"), *options], cwd=ROOT, env=environment, check=True)


def rows(table: Path) -> list[dict[str, object]]:
    """Return all rows, read part by part."""
    parts = [pq.ParquetFile(path).read() for path in sorted(table.glob("*.parquet"))]
    return [row for part in parts for row in part.to_pylist()]


def main(place: Path) -> None:
    """Run twice: in between the only image of the first part changes, so that the part loses its row."""
    shutil.copytree(OLD / "images" / "unseen", place / "images")
    names = sorted(str(path.relative_to(place)) for path in place.glob("images/*/*.jpg"))
    classify(place, names[:1])
    (place / names[0]).write_bytes((place / names[-1]).read_bytes() + b"\0")  # of another size
    (place / "images" / "damaged.jpg").write_bytes(b"\xff\xd8\xff no more")
    classify(place, [*names, "images/damaged.jpg"])
    counted = [pq.read_metadata(path).num_rows for path in sorted(place.glob("out/labels/*.parquet"))]
    assert counted.count(0) >= 3, f"two seals and a part that lost its row, not {counted}"
    expected = {table: rows(place / "out" / table) for table in ("labels", "rejects")}
    assert len(expected["labels"]) == len(names) and len(expected["rejects"]) == 1
    (place / "expected.json").write_text(json.dumps(expected, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The commands in docs/inputs.md, on a real S3 server."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT, Job, S3Server
from tests.integration import tables
from tests.integration.test_containers import parquet_of, tar_of
from tests.unit.pictures import encode, scene

COMMANDS = re.findall(
    r"^    \.venv/bin/python jobs/classify\.py (--input '?s3://.*)$",  # other stores: tests/stores
    (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
ALBUM = [
    f"album/{folder:02d}/{side}-{number}.jpg" for folder in range(5) for side in ("front", "back") for number in (1, 2)
]
LISTED = ["album/00/front-1.jpg", "album/03/back-2.jpg"]
EXPECTED = {
    "prefix": ALBUM,
    "glob": [name for name in ALBUM if "front" in name],
    "numbered": ALBUM[:16],
    "object": ALBUM[:1],
    "manifest": LISTED,
    "parquet": [f"tables/train.parquet#{row}" for row in range(5)],
    "inventory": LISTED,
    "tars": [f"shard-{shard:03d}.tar#{number}.jpg" for shard in range(2) for number in range(3)],
}


@pytest.fixture(scope="module")
def store(s3: S3Server) -> S3Server:
    """A server with the images of the commands."""
    bucket = s3.bucket("images")
    pictures = {f"{number}.jpg": encode(scene(seed=number), "JPEG") for number in range(6)}
    for number, name in enumerate(ALBUM):
        bucket.put(name, pictures[f"{number % 6}.jpg"])
    bucket.put("list.csv", "uri,shop\n{},north\ns3://images/{},south\n".format(*LISTED).encode())
    bucket.put("tables/train.parquet", parquet_of({name: pictures[name] for name in list(pictures)[:5]}, group=2))
    for shard in range(2):
        bucket.put(
            f"shard-{shard:03d}.tar", tar_of({f"{number}.jpg": pictures[f"{number}.jpg"] for number in range(3)})
        )
    rows = io.StringIO()
    csv.writer(rows).writerows(["images", name, len(pictures[f"{ALBUM.index(name) % 6}.jpg"])] for name in LISTED)
    bucket.put("inventory/1.csv.gz", gzip.compress(rows.getvalue().encode()))
    report = {"sourceBucket": "images", "destinationBucket": "arn:aws:s3:::images", "version": "2016-11-30",
              "fileFormat": "CSV", "fileSchema": "Bucket, Key, Size", "files": [{"key": "inventory/1.csv.gz"}]}  # fmt: skip
    bucket.put("inventory/manifest.json", json.dumps(report).encode())
    return s3


def test_every_form_of_input_has_a_command() -> None:
    assert [command.rpartition("/")[2] for command in COMMANDS] == list(EXPECTED)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.rpartition("/")[2])
def test_a_command_of_the_page(warm: Job, store: S3Server, tiny_model: Path, tmp_path: Path, command: str) -> None:
    whole = ("classify", *shlex.split(command), "--model", tiny_model)
    ended = warm(*whole, env=store.environment)
    assert ended.code == 0, ended.err
    name = command.rpartition("/")[2]
    output = tables.download(store.bucket("out"), name, tmp_path)
    assert sorted(row["uri"] for row in tables.rows(output)) == sorted(
        f"s3://images/{image}" for image in EXPECTED[name]
    )
    again = warm(*whole, env=store.environment)
    assert again.code == 0 and f"({len(EXPECTED[name])} already done" in again.out, again.err

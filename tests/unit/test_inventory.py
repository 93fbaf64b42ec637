"""S3 Inventory reports as inputs, in CSV and in Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.sources.recognise import list_all, recognise
from imgbatch.storage.stores import Folder

MOMENT = datetime(2026, 11, 24, 1, 2, 3, tzinfo=UTC)
OBJECTS = [("a b+c ü.jpg", 7, True, False), ("old.jpg", 5, False, False), ("gone.jpg", 0, True, True),
           ("notes.txt", 3, True, False), ("deep/x.png", 9, True, False)]  # fmt: skip


@pytest.fixture
def bucket(s3: Any, request: pytest.FixtureRequest) -> Folder:
    return Folder(s3.stores(retries=0), f"s3://images/inventory-{abs(hash(request.node.name))}")


def as_csv() -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    for key, size, latest, marker in OBJECTS:
        row = ["photos", quote_plus(key), str(latest).lower(), str(marker).lower(), "" if marker else size]
        writer.writerow([*row, "2026-11-24T01:02:03.000Z", "" if marker else "abc", "STANDARD"])
    return gzip.compress(text.getvalue().encode())


def as_parquet() -> bytes:
    keys, sizes, latest, markers = zip(*OBJECTS, strict=True)
    table = pa.table({
        "bucket": ["photos"] * len(keys), "key": list(keys), "is_latest": list(latest), "is_delete_marker": list(markers),
        "size": pa.array([None if marker else size for size, marker in zip(sizes, markers, strict=True)], pa.int64()),
        "last_modified_date": pa.array([MOMENT] * len(keys), pa.timestamp("ms", "UTC")),
        "e_tag": [None if marker else "abc" for marker in markers], "storage_class": ["STANDARD"] * len(keys),
    })  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


SCHEMA = "Bucket, Key, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag, StorageClass"


def report(bucket: Folder, form: str, **more: Any) -> str:
    key = f"{bucket.uri.removeprefix('s3://images/')}/data/1.{form.lower()}"
    manifest = {
        "sourceBucket": "photos", "destinationBucket": "arn:aws:s3:::images", "version": "2016-11-30", "fileFormat": form,
        "fileSchema": SCHEMA, "files": [{"key": key, "size": 1, "MD5checksum": ""}], **more,
    }  # fmt: skip
    bucket.put("manifest.json", json.dumps(manifest).encode())
    return bucket.at("manifest.json")


@pytest.mark.parametrize("form", ["CSV", "Parquet"])
def test_the_latest_versions_of_candidates_are_listed(bucket: Folder, form: str) -> None:
    bucket.put(f"data/1.{form.lower()}", as_csv() if form == "CSV" else as_parquet())
    (source,) = recognise(bucket.stores, [report(bucket, form)], SourceConfig())
    result = list(list_all([source]))
    rows = [row for each in result for row in each.batch.to_pylist()]
    assert source.kind == "inventory" and sum(each.ignored for each in result) == 3
    version = {"etag": "abc", "last_modified": MOMENT, "container": None}
    assert rows == [
        {"uri": "s3://photos/a b+c ü.jpg", "size": 7, **version}, {"uri": "s3://photos/deep/x.png", "size": 9, **version},
    ]  # fmt: skip


def test_a_report_without_versions_has_no_such_columns(bucket: Folder) -> None:
    text = "".join(f'"photos","{number}.jpg","5"\n' for number in range(3))
    bucket.put("data/1.csv", gzip.compress(text.encode()))
    sources = recognise(bucket.stores, [report(bucket, "CSV", fileSchema="Bucket, Key, Size")], SourceConfig())
    rows = [row for each in list_all(sources) for row in each.batch.to_pylist()]
    assert [(row["uri"], row["size"], row["etag"]) for row in rows] == [
        (f"s3://photos/{n}.jpg", 5, None) for n in range(3)
    ]


@pytest.mark.parametrize("suffixes", ["images", "*"])
def test_junk_and_markers_are_ignored_and_counted(bucket: Folder, suffixes: str) -> None:
    keys = ["a/x.jpg", "a/.thumbs/x.jpg", "a/@eaDir/x.jpg", "a/_SUCCESS", "a_$folder$", "a/", "LICENSE", "a/_y"]
    text = "".join(f'"photos","{quote_plus(key)}","5"\n' for key in keys)
    bucket.put("data/1.csv", gzip.compress(text.encode()))
    uri = report(bucket, "CSV", fileSchema="Bucket, Key, Size")
    result = list(list_all(recognise(bucket.stores, [uri], SourceConfig(suffixes=suffixes))))
    uris = [uri for each in result for uri in each.batch["uri"].to_pylist()]
    assert uris == ["s3://photos/a/x.jpg", "s3://photos/a/_y"] and sum(each.ignored for each in result) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fileFormat": "ORC"}, "ORC are not supported"), ({"files": None}, "not the manifest of an S3 Inventory")],
)
def test_an_unreadable_report_is_refused_with_the_reason(bucket: Folder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recognise(bucket.stores, [report(bucket, "CSV", **changes)], SourceConfig())


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b'"photos"\n')])
def test_a_damaged_data_file_is_named(bucket: Folder, data: bytes) -> None:
    bucket.put("data/1.csv", data)
    sources = recognise(bucket.stores, [report(bucket, "CSV")], SourceConfig())
    with pytest.raises(InputError, match=r"data/1\.csv cannot be read"):
        list(list_all(sources))


def test_another_file_of_that_name_is_an_input_error(bucket: Folder) -> None:
    bucket.put("manifest.json", b"[1, 2]")
    with pytest.raises(InputError, match="not the manifest of an S3 Inventory"):
        recognise(bucket.stores, [bucket.at("manifest.json")], SourceConfig())


@pytest.mark.parametrize("before", [0, 40_000])
def test_a_line_of_megabytes_is_reported_with_its_number(bucket: Folder, before: int) -> None:
    uri = report(bucket, "CSV")
    row = '"photos","%s","true","false","1","2026-11-24T01:02:03.000Z","abc","STANDARD"\n'
    lines = [row % f"{number}.jpg" for number in range(before)] + [row % ("x" * (3 << 20)), row % "last.jpg"]
    bucket.put("data/1.csv", gzip.compress("".join(lines).encode()))
    with pytest.raises(InputError) as refused:
        list(list_all(recognise(bucket.stores, [uri], SourceConfig())))
    message = str(refused.value)
    assert (
        f"{bucket.at('data/1.csv')} cannot be read as CSV: after line {before:,} comes a line of more than 1 MB"
        in message
    )
    assert "block size" not in message and "give the prefix itself" in message

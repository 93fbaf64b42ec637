"""Tables with a log next to their Parquet files are refused with a remedy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import SourceConfig, StorageConfig
from imgbatch.errors import InputError
from imgbatch.sources.recognise import list_all, recognise
from imgbatch.storage.stores import Folder, Stores

LOGS = {
    "Delta": ["_delta_log/00000000000000000000.json", "_delta_log/00000000000000000010.checkpoint.parquet"],
    "Iceberg": ["metadata/snap-1-1-c.avro", "metadata/v1.metadata.json", "metadata/00000-c.gz.metadata.json"],
    "Hudi": [".hoodie/hoodie.properties", ".hoodie/timeline/20261128.commit"],
    "Paimon": ["snapshot/snapshot-1", "snapshot/LATEST"],
}
EACH = [(format, log) for format, logs in LOGS.items() for log in logs]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """Return an empty folder."""
    if request.param == "disk":
        yield Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path / "set"))
        return
    folder = Folder(request.getfixturevalue("s3").stores(retries=0), f"s3://images/{uuid.uuid4().hex}")
    yield folder
    for name in folder.names():  # another test lists the whole bucket, and would be refused
        folder.delete(name)


def put_table(place: Folder, name: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"jpg": [b"1"]}), sink)
    place.put(name, sink.getvalue().to_pybytes())


def listed_uris(place: Folder, uri: str, **config: Any) -> list[str]:
    sources = recognise(place.stores, [uri], SourceConfig(**config))
    return [row["uri"] for each in list_all(sources) for row in each.batch.to_pylist()]


@pytest.mark.parametrize(("format", "log"), EACH)
@pytest.mark.parametrize("files", ["0.parquet", "data/split=train/z.parquet"])
def test_a_table_is_refused_at_any_depth(place: Folder, format: str, log: str, files: str) -> None:
    place.put("photos/a.jpg", b"1")
    place.put(f"lake/table/{log}", b"1")
    put_table(place, f"lake/table/{files}")
    for uri in (place.uri, place.at("lake/table"), place.at("lake/*/**")):
        with pytest.raises(
            InputError, match=f"{place.uri}/lake/table is a table in the {format} format.* plain Parquet"
        ):
            listed_uris(place, uri)


@pytest.mark.parametrize(("format", "log"), EACH)
def test_a_glob_or_partition_of_a_table_is_refused(place: Folder, format: str, log: str) -> None:
    place.put(f"t/{log}", b"1")
    put_table(place, "t/0.parquet")
    put_table(place, "t/date=1/hour=2/0.parquet")
    partitions = [place.at("t/date=1"), place.at("t/date=1/hour=2/*.parquet")] if format in ("Delta", "Hudi") else []
    for uri in (place.at("t/*.parquet"), *partitions):
        with pytest.raises(InputError, match=f"{place.uri}/t is a table in the {format} format"):
            listed_uris(place, uri)


def test_the_data_folder_of_an_iceberg_table_is_refused(place: Folder) -> None:
    place.put("t/metadata/snap-1-1-c.avro", b"1")
    put_table(place, "t/data/date=1/0.parquet")
    for uri in (place.at("t/data"), place.at("t/data/date=1"), place.at("t/data/*/*.parquet")):
        with pytest.raises(InputError, match=f"{place.uri}/t is a table in the Iceberg format"):
            listed_uris(place, uri)


@pytest.mark.parametrize(("format", "log"), EACH)
def test_images_next_to_a_log_are_read(place: Folder, format: str, log: str) -> None:
    place.put(log, b"1")
    place.put("a.jpg", b"1")
    assert listed_uris(place, place.uri, suffixes="jpg") == [place.at("a.jpg")]
    put_table(place, "0.parquet")
    assert listed_uris(place, place.at("*.jpg")) == [place.at("a.jpg")]
    assert listed_uris(place, place.uri, format="objects", suffixes="jpg") == [place.at("a.jpg")]


@pytest.mark.parametrize(
    "name", ["metadata/notes.json", "delta_log/0.json", "metadata.json", "snapshot/a.jpg", "x/.hoodie"]
)
def test_other_folders_of_tables_are_read(place: Folder, name: str) -> None:
    place.put(name, b"1")
    put_table(place, "data/0.parquet")
    assert place.at("data/0.parquet#0") in listed_uris(place, place.uri)


def test_a_log_after_many_files_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.storage.local._BATCH", 2)
    place = Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path))
    for number in range(5):
        put_table(place, f"a/A={number}/0.parquet")
    place.put("a/_delta_log/0.json", b"1")
    with pytest.raises(InputError, match="Delta"):
        listed_uris(place, place.uri)

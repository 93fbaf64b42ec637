"""Images that are rows of Parquet files: listed from footers, read a row group at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import FetchConfig, SourceConfig
from imgbatch.engine import units
from imgbatch.errors import InputError
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.rejects import Refusal
from imgbatch.sources import parquet
from imgbatch.sources.base import ListingBatch
from imgbatch.sources.fetch import Fetched, Fetcher
from imgbatch.sources.image_column import image_column
from imgbatch.sources.recognise import Source, list_all, recognise
from imgbatch.storage.local import LocalStore
from imgbatch.storage.stores import Folder
from tests.unit.test_sources import disk, place

__all__ = ["disk", "place"]

BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(first: int, count: int, **more: Any) -> pa.Table:
    """Return rows as Hugging Face writes them. The bytes have the number of the row."""
    numbers = range(first, first + count)
    images = [{"bytes": f"image {number}".encode(), "path": f"{number}.jpg"} for number in numbers]
    return pa.table({"image": pa.array(images, BYTES_AND_PATH), "split": [f"s{number}" for number in numbers], **more})


def put(place: Folder, name: str, rows: pa.Table, group: int = 3) -> str:
    sink = io.BytesIO()
    pq.write_table(rows, sink, row_group_size=group)
    place.put(name, sink.getvalue())
    return place.at(name)


def listed(place: Folder, *inputs: str, **config: Any) -> tuple[pa.Table, list[ListingBatch], list[Source]]:
    sources = recognise(place.stores, inputs, SourceConfig(**config))
    result = list(list_all(sources))
    tables = [pa.Table.from_batches([each.batch]) for each in result]
    return pa.concat_tables(tables, promote_options="permissive"), result, sources


def fetched(place: Folder, rows: pa.Table, **config: Any) -> list[Fetched]:
    return list(Fetcher(place.stores, FetchConfig(**config), SourceConfig())(rows))


def contents(result: list[Fetched]) -> list[bytes | str]:
    return [each.content.reason if isinstance(each.content, Refusal) else each.content for each in result]


def test_rows_are_listed_with_carried_columns(place: Folder) -> None:
    uri = put(place, "a.parquet", table(0, 7, label=pa.array([0, 1, 2, 0, 1, -1, None], pa.int64())))
    rows, result, (source,) = listed(place, uri)
    _, meta = place.stores.read(uri)
    assert source.kind == "parquet"
    assert rows["uri"].to_pylist() == [f"{uri}#{number}" for number in range(7)]
    assert rows["input_split"].to_pylist() == [f"s{number}" for number in range(7)]
    assert rows["input_path"].to_pylist() == [f"{number}.jpg" for number in range(7)]
    assert rows["input_label"].to_pylist() == [0, 1, 2, 0, 1, -1, None]
    assert set(rows["etag"].to_pylist()) == {meta.etag}
    assert set(rows["last_modified"].to_pylist()) == {meta.last_modified}
    assert rows["size"].null_count == 7 and set(rows["container"].to_pylist()) == {"parquet"}
    assert [(len(each.batch), each.whole) for each in result] == [(3, True), (3, True), (1, True)]


def test_class_numbers_become_the_names_in_the_footer(disk: Folder) -> None:
    rows = table(0, 3, label=pa.array([1, 0, -1], pa.int64()))
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = json.dumps({"info": {"features": features}})
    uri = put(disk, "a.parquet", rows.replace_schema_metadata({"huggingface": metadata}))
    assert listed(disk, uri)[0]["input_label"].to_pylist() == ["dog", "cat", None]


@pytest.mark.parametrize("metadata", ["", "no JSON", "[]", '{"info": {"features": {"label": 3}}}'])
def test_an_invalid_huggingface_footer_is_ignored(disk: Folder, metadata: str) -> None:
    rows = table(0, 1, label=pa.array([1], pa.int64())).replace_schema_metadata({"huggingface": metadata})
    assert listed(disk, put(disk, "a.parquet", rows))[0]["input_label"].to_pylist() == [1]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())])])
def test_the_image_column_is_found_by_its_type(disk: Folder, kind: pa.DataType) -> None:
    value: Any = {"bytes": b"x"} if pa.types.is_struct(kind) else b"x"
    uri = put(disk, "a.parquet", pa.table({"id": [1], "whatever": pa.array([value], kind)}))
    rows, _, _ = listed(disk, uri)
    assert contents(fetched(disk, rows)) == [b"x"]
    assert [name for name in rows.column_names if name.startswith("input_")] == ["input_id"]


def test_several_image_columns_are_refused(disk: Folder) -> None:
    rows = pa.table({"thumb": pa.array([b"t"]), "full": pa.array([b"f"])})
    uri = put(disk, "a.parquet", rows)
    with pytest.raises(InputError, match=r"thumb, full .*source.image_column"):
        listed(disk, uri)
    result, _, _ = listed(disk, uri, image_column="full")
    assert contents(list(Fetcher(disk.stores, FetchConfig(), SourceConfig(image_column="full"))(result))) == [b"f"]
    with pytest.raises(InputError, match="no column 'other' of bytes; it has: thumb, full"):
        listed(disk, uri, format="parquet", image_column="other")


def test_a_struct_of_bytes_takes_precedence_over_plain_bytes() -> None:
    result = image_column(pa.schema([("hash", pa.binary()), ("image", BYTES_AND_PATH)]), None)
    assert result is not None and result.path == "image"
    assert image_column(pa.schema([("id", pa.int64()), ("name", pa.string())]), None) is None


def test_a_file_with_a_uri_column_is_a_manifest_by_default(disk: Folder) -> None:
    uri = put(disk, "a.parquet", table(0, 2, uri=pa.array(["x.jpg", "y.jpg"])))
    assert listed(disk, uri)[2][0].kind == "manifest"
    rows, _, (source,) = listed(disk, uri, format="parquet")
    assert source.kind == "parquet" and rows["uri"].to_pylist() == [f"{uri}#0", f"{uri}#1"]


def test_a_file_without_images_or_uris_is_refused_with_its_columns(disk: Folder) -> None:
    uri = put(disk, "a.parquet", pa.table({"id": [1], "name": ["x"]}))
    with pytest.raises(InputError, match=r"no column 'uri'.*id, name"):
        listed(disk, uri)


def test_a_folder_may_have_tables_and_images(place: Folder) -> None:
    put(place, "in/b.parquet", table(0, 4))
    put(place, "in/a.parquet", pa.table({"id": [1]}))
    put(place, "in/deep/c.parquet", table(4, 2).drop_columns("split"))
    place.put("in/x.jpg", b"loose")
    place.put("in/torn.parquet", b"PAR1 no more")
    rows, result, (source,) = listed(place, place.at("in"))
    assert source.kind == "folder" and sum(each.ignored for each in result) == 1
    by_name = dict(
        zip([uri.removeprefix(place.at("in/")) for uri in rows["uri"].to_pylist()], rows.to_pylist(), strict=True)
    )
    tables = [f"b.parquet#{number}" for number in range(4)] + ["deep/c.parquet#0", "deep/c.parquet#1"]
    assert sorted(by_name) == sorted([*tables, "x.jpg", "torn.parquet"])  # what is torn becomes a reject of that name
    assert by_name["b.parquet#3"]["input_split"] == "s3" and by_name["deep/c.parquet#0"]["input_split"] is None
    assert by_name["torn.parquet"]["container"] is None
    only, _, _ = listed(place, place.at("in"), format="parquet")
    assert len(only) == 7 and "x.jpg" not in str(only["uri"].to_pylist())
    without, result, _ = listed(place, place.at("in"), format="objects")
    assert without["uri"].to_pylist() == [place.at("in/x.jpg")] and sum(each.ignored for each in result) == 4


def test_bytes_are_in_the_order_of_the_listing(place: Folder) -> None:
    uris = [put(place, f"in/{number}.parquet", table(10 * number, 10)) for number in range(3)]
    place.put("in/loose.jpg", b"loose")
    rows, _, _ = listed(place, *uris, place.at("in/loose.jpg"))
    expected = [f"image {number}".encode() for number in range(30)] + [b"loose"]
    result = fetched(place, rows)
    assert contents(result) == expected
    assert [each.size for each in result] == [len(content) for content in expected]
    assert [each.etag for each in result] == rows["etag"].to_pylist()
    selected = [2, 3, 7, 15, 29, 30]
    assert contents(fetched(place, rows.take(selected))) == [expected[at] for at in selected]


@pytest.mark.parametrize("at_once", [0, 1 << 20])
def test_a_large_row_group_is_read_in_pieces(disk: Folder, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(parquet, "_AT_ONCE_BYTES", at_once)
    monkeypatch.setattr(parquet, "_PIECE_BYTES", 4096)
    random = np.random.default_rng(0)
    values = [random.bytes(1000) for _ in range(300)]
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"jpg": values}),
        sink,
        data_page_size=2000,
        compression="none",
        use_dictionary=False,
        write_batch_size=2,
    )
    disk.put("a.parquet", sink.getvalue())
    rows, _, _ = listed(disk, disk.at("a.parquet"))
    read = _reads(monkeypatch)
    assert contents(fetched(disk, rows)) == values
    assert (max(read[1:]) < 20_000) == (at_once == 0)


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    inner = LocalStore.read_range

    def counted(self: LocalStore, path: str, start: int, end: int, etag: str | None) -> bytes:
        read.append(end - start)
        return inner(self, path, start, end, etag)

    monkeypatch.setattr(LocalStore, "read_range", counted)
    return read


def test_only_required_columns_are_read(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = [np.random.default_rng(number).bytes(200_000) for number in range(6)]
    images = pa.array([{"bytes": content, "path": None} for content in heavy], BYTES_AND_PATH)
    other = pa.array([{"mask": content} for content in heavy], pa.struct([("mask", pa.binary())]))
    uri = put(disk, "a.parquet", pa.table({"image": images, "other": other, "id": range(6)}))
    read = _reads(monkeypatch)
    rows, _, _ = listed(disk, uri)
    assert sum(read) < 200_000 and rows["input_id"].to_pylist() == list(range(6))
    read.clear()
    assert contents(fetched(disk, rows)) == heavy
    assert 1_200_000 < sum(read) < 1_400_000
    assert len(read) == 1 + 2  # the footer once a worker, then a GET a row group


def test_a_row_without_bytes_and_one_with_too_many_are_rejects(disk: Folder) -> None:
    images = [{"bytes": b"good"}, {"bytes": None}, None, {"bytes": b"x" * 100}, {"bytes": b""}]
    kind = pa.struct([("bytes", pa.binary())])
    rows, _, _ = listed(disk, put(disk, "a.parquet", pa.table({"image": pa.array(images, kind)})))
    assert contents(fetched(disk, rows, max_bytes=50)) == [b"good", "empty", "empty", "too_large", b""]


def _replaced(place: Folder) -> None:
    put(place, "a.parquet", table(100, 9))


def _gone(place: Folder) -> None:
    place.delete("a.parquet")


def _torn(place: Folder) -> None:
    place.put("a.parquet", place.read("a.parquet")[:-40])


@pytest.mark.parametrize(("happens", "reason"), [(_replaced, "changed"), (_gone, "vanished"), (_torn, "changed")])
def test_a_file_that_changes_after_the_listing_is_a_conflict(
    s3: Any, happens: Callable[[Folder], None], reason: str, request: pytest.FixtureRequest
) -> None:
    place = Folder(s3.stores(retries=0), f"s3://images/{abs(hash(request.node.name))}")
    rows, _, _ = listed(place, put(place, "a.parquet", table(0, 5)))
    happens(place)
    result = fetched(place, rows)
    assert contents(result) == [reason] * 5
    assert all(isinstance(each.content, Refusal) and each.content.passing for each in result)


def test_a_damaged_row_group_loses_only_its_own_rows(disk: Folder) -> None:
    uri = put(disk, "a.parquet", table(0, 9))
    data = bytearray(disk.read("a.parquet"))
    chunk = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(1).column(0)
    data[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    disk.put("a.parquet", bytes(data))
    rows, _, _ = listed(disk, uri)
    result = contents(fetched(disk, rows))
    assert result[:3] == [b"image 0", b"image 1", b"image 2"] and result[6:] == [b"image 6", b"image 7", b"image 8"]
    assert result[3:6] == ["corrupt"] * 3


def test_missing_rows_are_rejects_and_shift_no_others(disk: Folder) -> None:
    def promising(name: str, rows: pa.Table) -> str:
        uri = put(disk, name, rows, 100)
        data = bytearray(disk.read(name))
        at = data.rfind(b"\x16\xc8\x01")  # Thrift: the next field, of 64 bits, is 100
        data[at : at + 3] = b"\x16\xdc\x01"
        disk.put(name, bytes(data))
        assert pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(0).num_rows == 110
        return uri

    first = promising("a.parquet", pa.table({"image": [b"image %d" % number for number in range(100)]}))
    rows, _, _ = listed(
        disk, first, put(disk, "b.parquet", pa.table({"image": [b"image 100", b"image 101", b"image 102"]}))
    )
    result = contents(fetched(disk, rows))
    assert result == [b"image %d" % number for number in range(100)] + ["corrupt"] * 10 + [
        b"image 100",
        b"image 101",
        b"image 102",
    ]
    with pytest.raises(InputError, match=r"c\.parquet: row group 0 has 100 rows, but the footer says 110"):
        listed(disk, promising("c.parquet", table(0, 100)))


@pytest.mark.parametrize("other", [table(0, 4), pa.table({"n": [1, 2, 3]})], ids=["shorter", "no images"])
def test_a_local_file_that_is_replaced_after_the_listing_is_a_conflict(disk: Folder, other: pa.Table) -> None:
    uri = put(disk, "a.parquet", table(0, 9))
    rows, _, _ = listed(disk, uri)
    put(disk, "a.parquet", other)
    result = fetched(disk, rows)
    assert contents(result) == ["changed"] * 9


def test_row_groups_are_not_split_across_units() -> None:
    pending = np.ones(10_000, bool)
    pending[5_000:5_003] = False
    wholes = np.array([[start, start + 1000] for start in range(2_000, 10_000, 1000)])
    cut = [
        unit["index"].to_numpy() for unit in units.cut_units(WorkPlan(pending, wholes, {}), units.ROUNDS[0], actors=2)
    ]
    assert np.array_equal(np.concatenate(cut), np.flatnonzero(pending))
    for start, end in wholes.tolist():
        holders = [unit for unit in cut if ((unit >= start) & (unit < end)).any()]
        assert len(holders) == 1, (start, end)
    assert len(cut[0]) == 32  # before them, the first rows come soon

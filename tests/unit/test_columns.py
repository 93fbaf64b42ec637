"""Columns of Parquet files: image bytes in all of Arrow's types, and carried values without pixels."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.config.sections import FetchConfig, SourceConfig
from imgbatch.errors import InputError
from imgbatch.rejects import Refusal
from imgbatch.sources.column_types import as_carried, carried_type
from imgbatch.sources.columns import MAX_CARRIED_BYTES
from imgbatch.sources.fetch import Fetcher
from imgbatch.sources.image_column import image_column
from imgbatch.storage.stores import Folder
from tests.unit.test_parquet import BYTES_AND_PATH, _reads, contents, disk, fetched, listed, put

__all__ = ["disk"]

A, B, PIXELS = b"a" * 100, b"b" * 100, b"p" * (MAX_CARRIED_BYTES + 1)
NESTED = pa.struct([("image", BYTES_AND_PATH), ("n", pa.int64())])


def image(content: bytes | None, path: str = "x.jpg") -> dict[str, Any]:
    return {"bytes": content, "path": path}


def read(disk: Folder, column: pa.Array, name: str = "column", **config: Any) -> list[bytes | str]:
    """Write a file with this column and an id; return what a worker reads."""
    nested_view = pa.types.is_struct(column.type) and pa.types.is_binary_view(column.type.field(0).type)
    group = 10 if nested_view else 2  # pyarrow 26 cannot cut these into row groups
    uri = put(disk, "a.parquet", pa.table({"id": range(len(column)), name: column}), group)
    rows, _, (source,) = listed(disk, uri, **config)
    assert source.kind == "parquet" and rows["input_id"].to_pylist() == list(range(len(column)))
    assert [each for each in rows.column_names if each.startswith("input_")][:1] == ["input_id"]
    return contents(list(Fetcher(disk.stores, FetchConfig(), SourceConfig(**config))(rows)))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([A, B, A]).dictionary_encode(),
        pa.array([A, B, A], pa.large_binary()),
        pa.array([A, B, A], pa.binary_view()),
        pa.array([A, B, A], pa.binary(100)),
        pa.array([image(A), image(B), image(A)], BYTES_AND_PATH),
        pa.array([{"bytes": A}, {"bytes": B}, {"bytes": A}], pa.struct([("bytes", pa.binary_view())])),
        pa.array([{"image": image(each), "n": 1} for each in (A, B, A)], NESTED),
        pa.array([{"s": {"image": image(each), "n": 1}} for each in (A, B, A)], pa.struct([("s", NESTED)])),
        pa.array([[image(A)], [image(B)], [image(A)]], pa.list_(BYTES_AND_PATH)),
        pa.array([[A], [B], [A]], pa.list_(pa.binary())),
        pa.array([[A], [B], [A]], pa.large_list(pa.large_binary())),
        pa.array([[A], [B], [A]], pa.list_view(pa.binary_view())),
        pa.array([[A], [B], [A]], pa.list_(pa.binary(), 1)),
    ],
    ids=lambda column: str(column.type).replace(" ", ""),
)  # fmt: skip
@pytest.mark.parametrize("name", ["column", "a.column", " column "])
def test_images_are_read_from_every_binary_type(disk: Folder, column: pa.Array, name: str) -> None:
    assert read(disk, column, name) == [A, B, A]
    assert read(disk, column, name, image_column=name) == [A, B, A]
    folder, _, _ = listed(disk, disk.uri)
    assert contents(fetched(disk, folder)) == [A, B, A]


@pytest.mark.parametrize(
    "column, named",
    [
        (pa.array([{"jpg": A, "n": 1}], pa.struct([("jpg", pa.binary()), ("n", pa.int64())])), "column"),
        (pa.array([{"jpg": A, "png": B}], pa.struct([("jpg", pa.binary()), ("png", pa.binary())])), "column.jpg"),
        (
            pa.array([{"a": image(A), "b": image(B)}], pa.struct([("a", BYTES_AND_PATH), ("b", BYTES_AND_PATH)])),
            "column.a",
        ),
        (pa.array([{"views": [image(A)]}], pa.struct([("views", pa.list_(BYTES_AND_PATH))])), "column.views"),
        (pa.array([[[A]]], pa.list_(pa.list_(pa.binary()))), "column"),
        (pa.array([A[:16]], pa.binary(16)), "column"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_image_column_can_be_named(disk: Folder, column: pa.Array, named: str) -> None:
    expected = A[:16] if pa.types.is_fixed_size_binary(column.type) else A
    assert read(disk, column, image_column=named) == [expected]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ([("image", BYTES_AND_PATH), ("crops", pa.list_(BYTES_AND_PATH))], "image"),
        ([("image", pa.binary()), ("thumbs", pa.list_(pa.binary()))], "image"),
        ([("image", pa.binary()), ("blobs", pa.map_(pa.string(), pa.binary()))], "image"),
        ([("image", pa.binary()), ("md5", pa.binary(16))], "image"),
        ([("image", pa.binary()), ("id", pa.uuid())], "image"),
        ([("hash", pa.binary()), ("sample", NESTED)], "sample.image"),
        ([("hash", pa.binary(32)), ("id", pa.int64())], None),
        ([("blobs", pa.map_(pa.string(), pa.binary()))], None),
        ([("meta", pa.struct([("hash", pa.binary())]))], None),
    ],
)
def test_the_image_column_is_recognised(fields: list[tuple[str, pa.DataType]], expected: str | None) -> None:
    column = image_column(pa.schema(fields), None)
    assert (column and column.path) == expected


@pytest.mark.parametrize(
    "fields, named, names",
    [
        ([("left", pa.binary()), ("right", pa.binary_view())], None, "left, right"),
        ([("left", BYTES_AND_PATH), ("right", BYTES_AND_PATH)], None, "left, right"),
        ([("pair", pa.struct([("a", BYTES_AND_PATH), ("b", BYTES_AND_PATH)]))], None, r"pair\.a, pair\.b"),
        ([("pair", pa.struct([("a", pa.binary()), ("b", pa.binary())]))], "pair", r"pair\.a, pair\.b"),
        ([("a", pa.list_(pa.binary())), ("b", pa.list_(pa.binary()))], None, "a, b"),
    ],
)
def test_several_image_columns_are_refused(
    fields: list[tuple[str, pa.DataType]], named: str | None, names: str
) -> None:
    with pytest.raises(InputError, match=rf"{names} could all be images: name one with source\.image_column"):
        image_column(pa.schema(fields), named)


def test_several_image_columns_in_a_folder_are_refused(disk: Folder) -> None:
    put(disk, "in/a.parquet", pa.table({"left": [A], "right": [B]}))
    with pytest.raises(InputError, match=r"a\.parquet: the columns left, right could all be images"):
        listed(disk, disk.at("in"))
    rows, _, _ = listed(disk, disk.at("in"), image_column="right")
    assert contents(list(Fetcher(disk.stores, FetchConfig(), SourceConfig(image_column="right"))(rows))) == [B]


def test_a_file_with_a_named_image_column_is_not_a_manifest(disk: Folder) -> None:
    uri = put(disk, "a.parquet", pa.table({"uri": ["x.jpg"], "path": ["y.jpg"], "image": [A]}))
    assert listed(disk, uri)[2][0].kind == "manifest"
    assert listed(disk, uri, image_column="image")[2][0].kind == "parquet"
    assert listed(disk, uri, image_column="other")[2][0].kind == "manifest"
    with pytest.raises(InputError, match=r"no column 'other' of bytes; it has: id"):
        listed(disk, put(disk, "b.parquet", pa.table({"id": [1]})), image_column="other")
    uri = put(disk, "c.parquet", pa.table({"path": ["y.jpg"], "image": [A]}))
    assert listed(disk, uri)[2][0].kind == "parquet"
    rows, _, (source,) = listed(disk, uri, uri_column="path")
    assert source.kind == "manifest" and rows["uri"].to_pylist() == [disk.at("y.jpg")]


def rejected(disk: Folder, column: pa.Array) -> list[bytes | tuple[str, str]]:
    rows, _, _ = listed(disk, put(disk, "a.parquet", pa.table({"column": column}), group=2))
    result = [each.content for each in fetched(disk, rows)]
    return [(each.reason, each.message) if isinstance(each, Refusal) else each for each in result]


def test_several_images_in_a_row_are_refused_row_by_row(disk: Folder) -> None:
    for column in (
        pa.array([[image(A)], [image(A), image(B)], [], None, [None]], pa.list_(BYTES_AND_PATH)),
        pa.array([[A], [A, B], [], None, [None]], pa.list_(pa.binary())),
    ):
        result = rejected(disk, column)
        assert result[0] == A
        assert result[1] == ("unsupported", "the row has 2 images: write one row per image")
        assert [each[0] for each in result[2:]] == ["empty"] * 3


def test_a_row_with_only_a_path_is_rejected_with_the_path(disk: Folder) -> None:
    images = [image(None, "cat.jpg"), image(A), image(None, "dog.jpg"), None, {"bytes": None, "path": None}]
    nested = [None if each is None else {"image": each, "n": 1} for each in images]
    for column in (pa.array(images, BYTES_AND_PATH), pa.array(nested, NESTED)):
        result = rejected(disk, column)
        assert result[1] == A and result[3] == result[4] == ("empty", "the row has no bytes")
        for at, path in ((0, "cat.jpg"), (2, "dog.jpg")):
            reason, message = result[at]
            assert reason == "empty" and f"only the path '{path}'" in str(message) and "manifest" in str(message)


# Carried values


def test_names_are_trimmed_composed_and_distinct(disk: Folder) -> None:
    uri = put(disk, "a.parquet", pa.table({" image ": [A], "label ": ["cat"], "Cafe\u0301": [1]}))
    rows, _, _ = listed(disk, uri)
    assert rows.column_names[5:] == ["input_label", "input_Caf\u00e9"]
    assert contents(fetched(disk, rows)) == [A]
    for twice in (["image", "label", "label"], ["image", "label", "label "]):
        table = pa.Table.from_arrays([pa.array([A]), pa.array(["a"]), pa.array(["b"])], names=twice)
        put(disk, "b.parquet", table)
        for uri in (disk.at("b.parquet"), disk.uri):
            with pytest.raises(InputError, match=r"b\.parquet.*'label'.*rename"):
                listed(disk, uri)


VALUES: dict[str, tuple[pa.Array, Any]] = {
    "ids": (pa.array([b"\x00\xff"]), b"\x00\xff"),
    "views": (pa.array([b"id"], pa.binary_view()), b"id"),
    "hashes": (pa.array([b"0123456789abcdef"], pa.binary(16)), b"0123456789abcdef"),
    "uuids": (pa.array([b"0123456789abcdef"], pa.uuid()), b"0123456789abcdef"),
    "dictionaries": (pa.array([b"id"]).dictionary_encode(), b"id"),
    "large texts": (pa.array(["x"], pa.large_string()), "x"),
    "text views": (pa.array(["x"], pa.string_view()), "x"),
    "structs": (pa.array([{"w": 1, "h": "x"}]), {"w": 1, "h": "x"}),
    "lists": (pa.array([["a", "b"]], pa.large_list(pa.string())), ["a", "b"]),
    "list views": (pa.array([["a", "b"]], pa.list_view(pa.string())), ["a", "b"]),
    "nulls": (pa.nulls(1), None),
    "maps": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), [("a", 1)]),
}
NOT_CARRIED = {
    "pixels": pa.array([PIXELS]),
    "pixel views": pa.array([PIXELS], pa.binary_view()),
    "fixed pixels": pa.array([PIXELS], pa.binary(len(PIXELS))),
    "thumbs": pa.array([[A] * 20], pa.list_(pa.binary())),
    "crops": pa.array([[image(A)]], pa.list_(BYTES_AND_PATH)),
    "blobs": pa.array([[("a", PIXELS)]], pa.map_(pa.string(), pa.binary())),
    "masks": pa.array([{"mask": PIXELS}]),
}


@pytest.mark.parametrize("kind", ["images", "manifest"])
def test_values_are_carried_and_pixels_are_not(disk: Folder, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    of_images: dict[str, Any] = {"image": pa.array([image(A)], BYTES_AND_PATH)}
    first = of_images if kind == "images" else {"uri": ["x.jpg"]}
    columns = {**first, **{name: value for name, (value, _) in VALUES.items()}, **NOT_CARRIED}
    uri = put(disk, "a.parquet", pa.table(columns))
    for inputs in ([uri], [uri, put(disk, "b.parquet", pa.table(columns))]):
        rows, _, (source, *_) = listed(disk, *inputs)
        assert source.kind == ("parquet" if kind == "images" else "manifest")
        (row, *_) = rows.to_pylist()
        carried = {name: row[f"input_{name}"] for name in VALUES}
        assert carried == {name: value for name, (_, value) in VALUES.items()}
        assert {name for name in row if name.startswith("input_")} - {"input_path"} == {
            f"input_{name}" for name in VALUES
        }
    logged = [record.getMessage() for record in caplog.records if "are omitted from the tables" in record.getMessage()]
    assert len(logged) == 1 and all(repr(name) in logged[0] for name in NOT_CARRIED)


def test_long_values_in_a_column_of_short_ones_are_omitted(disk: Folder) -> None:
    ids = [b"id"] * 50 + [PIXELS] + [None]
    uri = put(disk, "m.parquet", pa.table({"uri": [f"{at}.jpg" for at in range(52)], "id": ids}), group=100)
    rows, _, _ = listed(disk, uri)
    assert rows["input_id"].to_pylist() == [b"id"] * 50 + [None, None]


def test_a_long_value_is_not_copied_for_each_row(disk: Folder) -> None:
    """The file has the value once. 4,000 copies of a megabyte would not fit into memory."""
    thumbs = pa.DictionaryArray.from_arrays(pa.array([0] * 4_000, pa.int32()), pa.array([b"p" * (1 << 20)]))
    uri = put(disk, "m.parquet", pa.table({"uri": [f"{at}.jpg" for at in range(4_000)], "thumb": thumbs}), group=4_000)
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    rows, _, _ = listed(disk, uri)
    assert pool.max_memory() - before < 1 << 30
    assert rows["input_thumb"].null_count == 4_000


def test_pixels_are_not_read_by_the_driver(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = [np.random.default_rng(number).bytes(200_000) for number in range(4)]
    uri = put(
        disk, "a.parquet", pa.table({"image": pa.array(heavy), "crops": [[each] for each in heavy], "id": range(4)})
    )
    read = _reads(monkeypatch)
    listed(disk, uri)
    assert sum(read) < 100_000


def test_class_numbers_have_their_names_in_manifests(disk: Folder) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"uri": ["a", "b", "c"], "label": pa.array([1, 0, -1])})
    metadata = json.dumps({"info": {"features": features}})
    rows, _, _ = listed(disk, put(disk, "m.parquet", table.replace_schema_metadata({"huggingface": metadata})))
    assert rows["input_label"].to_pylist() == ["dog", "cat", None]


def test_a_damaged_column_is_named_with_its_file(disk: Folder) -> None:
    texts = [f"{number:05d}" * 20 for number in range(100)]
    uri = put(disk, "a.parquet", pa.table({"text": texts, "image": [A] * 100}), group=100)
    data = bytearray(disk.read("a.parquet"))
    data[40:400] = b"\xff" * 360
    disk.put("a.parquet", bytes(data))
    with pytest.raises(InputError, match=r"a\.parquet: row group 0 cannot be read"):
        listed(disk, uri)


@pytest.mark.parametrize(
    "value, kind", [(value.to_pylist(), value.type) for value, _ in VALUES.values()], ids=list(VALUES)
)
def test_the_carried_type_has_the_same_values(value: list[Any], kind: pa.DataType) -> None:
    if isinstance(kind, pa.BaseExtensionType):
        value = [each.bytes for each in value]
    array = pa.array(value, kind) if not pa.types.is_dictionary(kind) else pa.array(value).dictionary_encode()
    assert as_carried(array, carried_type(kind)).to_pylist() == value
    assert carried_type(carried_type(kind)) == carried_type(kind)

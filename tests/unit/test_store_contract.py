"""What every store must do: the same verbs and errors on disk and on S3 here, and on other servers in tests/stores."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import Conflict, Exists, NotFound, StoreError, TooLarge
from imgbatch.storage.base import STORE_LISTING
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import is_local

STRANGE = [
    "a b.jpg", "h#x.jpg", "p%20.jpg", "p%.jpg", "pl+us.jpg", "co::lon.jpg", "co:lon.jpg", "br[1].jpg", "st*r.jpg", "q?.jpg",
    "ü日本.jpg", "u\u0308.jpg", "🍎.jpg", "_x.jpg", ".hidden.jpg", "UP.JPG", "nosuffix", "tilde~", "~", "quo\"te'.jpg",
    "amp&lt;.jpg", " lead.jpg", "trail.jpg ", "two..dots.jpg", "dollar$@=,;!.jpg", "{model}.jpg", "sub folder/x.jpg",
]  # fmt: skip
CONTROL = ["c\x01d.jpg", "new\nline.jpg", "tab\t.jpg", "del\x7f.jpg"]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """Return an empty folder."""
    if request.param == "disk":
        return Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path / "folder"))
    return Folder(request.getfixturevalue("s3").stores(retries=0), f"s3://images/{uuid.uuid4().hex}")


@pytest.fixture
def write_any_key(s3: Any) -> Callable[[Folder, str, bytes], None]:
    """Write an object with a key that obstore refuses."""
    return lambda place, name, data: s3.write("images", place.at(name).removeprefix("s3://images/"), data)


def listed(folder: Folder) -> dict[str, dict[str, Any]]:
    prefix = folder.stores.resolve(folder.uri)[1] + "/"
    return {row["path"].removeprefix(prefix): row for batch in folder.list_objects() for row in batch.to_pylist()}


def test_written_objects_are_read_and_listed(place: Folder) -> None:
    before = datetime.now(UTC)
    place.create("a/x.jpg", b"one")
    place.put("y.jpg", b"three")
    assert place.read("a/x.jpg") == b"one"
    data, meta = place.stores.read(place.at("y.jpg"))
    assert (data, meta.size) == (b"three", 5)
    assert meta.last_modified is not None
    assert abs((meta.last_modified - before).total_seconds()) < 60
    result = listed(place)
    assert list(result) == ["a/x.jpg", "y.jpg"]
    assert result["y.jpg"]["size"] == 5
    assert result["y.jpg"]["etag"] == meta.etag
    assert (meta.etag is None) == is_local(place.uri)
    assert place.names() == ["a/x.jpg", "y.jpg"]
    assert place.folders() == ["a"]
    assert all(batch.schema == STORE_LISTING for batch in place.list_objects())


def test_an_object_has_the_same_etag_in_list_head_and_read(place: Folder) -> None:
    place.put("x", b"1")
    head = place.stores.call("look at", place.at("x"), lambda store, path: store.head(path))
    _, meta = place.stores.read(place.at("x"))
    row = listed(place)["x"]
    assert (head.size, head.etag) == (meta.size, meta.etag) == (row["size"], row["etag"])
    assert '"' not in (meta.etag or "")


def test_creating_an_existing_object_fails_and_changes_nothing(place: Folder) -> None:
    place.create("x", b"first")
    with pytest.raises(Exists, match=r"create .*x"):
        place.create("x", b"second")
    assert place.read("x") == b"first"
    assert place.names() == ["x"]


def test_of_many_concurrent_creations_one_succeeds(place: Folder) -> None:
    def create(number: int) -> int | None:
        try:
            place.create(f"race{number % 8}", str(number).encode())
        except Exists:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        won = [number for number in pool.map(create, range(64)) if number is not None]
    assert sorted(number % 8 for number in won) == list(range(8))
    assert [place.read(f"race{number % 8}") for number in won] == [str(number).encode() for number in won]


def test_replacing_a_changed_object_fails_and_changes_nothing(place: Folder) -> None:
    place.create("x", b"0")
    _, tag = place.read_tagged("x")
    place.replace("x", b"1", tag)
    with pytest.raises(Conflict):
        place.replace("x", b"2", tag)
    place.put("x", b"1")  # the same content, another version on disk
    assert place.read("x") == b"1"
    assert place.names() == ["x"]


def test_of_many_concurrent_replacements_one_succeeds(place: Folder) -> None:
    place.create("n", b"0")

    def count(_: int) -> int:
        done = 0
        for _ in range(6):
            data, tag = place.read_tagged("n")
            try:
                place.replace("n", str(int(data) + 1).encode(), tag)
            except Conflict:
                continue
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(count, range(4))) == int(place.read("n")) > 0
    assert place.names() == ["n"]


def test_replacing_a_deleted_object_does_not_create_it(place: Folder) -> None:
    place.create("x", b"0")
    _, tag = place.read_tagged("x")
    place.delete("x")
    with pytest.raises((Conflict, NotFound)):
        place.replace("x", b"1", tag)
    assert place.names() == []


def test_deleting_a_changed_object_fails_and_changes_nothing(place: Folder) -> None:
    place.create("x", b"0")
    _, old = place.read_tagged("x")
    place.replace("x", b"1", old)
    with pytest.raises(Conflict, match=r"delete .*x"):
        place.delete("x", old)
    assert place.read("x") == b"1"
    _, tag = place.read_tagged("x")
    place.delete("x", tag)
    assert place.names() == []
    place.delete("x", tag)  # the answer to a first try was lost
    place.folder("nowhere").delete("x", tag)


def test_missing_objects_are_not_found(place: Folder) -> None:
    with pytest.raises(NotFound, match=r"read .*/x"):
        place.read("x")
    assert not place.exists("x")
    assert place.names() == place.folders() == list(place.list_objects()) == []
    place.delete("x")
    place.put("x", b"")
    assert place.exists("x")
    place.delete("x")
    assert not place.exists("x")


def test_a_folder_is_not_an_object(place: Folder) -> None:
    place.put("a/x", b"")
    assert not place.exists("a")
    with pytest.raises(StoreError):
        place.read("a")


def test_a_folder_does_not_include_names_with_the_same_prefix(place: Folder) -> None:
    for name in ("a/x", "ab/y", "a.txt", "a-b"):
        place.put(name, b"")
    assert place.names("a") == ["x"]
    assert place.folders() == ["a", "ab"]


def test_an_object_that_is_too_large_is_not_read(place: Folder) -> None:
    place.put("x", b"12345")
    assert place.stores.read(place.at("x"), 5)[0] == b"12345"
    with pytest.raises(TooLarge, match="5 bytes are more than 4"):
        place.stores.read(place.at("x"), 4)


def test_an_empty_object_is_listed_and_read(place: Folder) -> None:
    place.put("empty", b"")
    assert listed(place)["empty"]["size"] == 0
    assert place.read("empty") == b""


def test_more_objects_than_a_page_are_listed_once_each(place: Folder) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: place.put(f"{number:04d}", b"x"), range(1203)))
    assert list(listed(place)) == [f"{number:04d}" for number in range(1203)]
    assert sum(len(batch) for batch in place.list_objects()) == 1203


@pytest.mark.parametrize("name", STRANGE)
def test_unusual_names_are_written_listed_and_read(place: Folder, name: str) -> None:
    place.put(name, name.encode())
    (result,) = listed(place)
    assert result == name
    assert place.read(result) == name.encode()
    with place.stores.open(place.at(name)) as file:
        assert file.read() == name.encode()


@pytest.mark.parametrize("name", CONTROL)
def test_names_with_control_characters_are_listed_and_read(place: Folder, write_any_key: Any, name: str) -> None:
    if is_local(place.uri):
        place.put(name, b"x")
    else:  # as other clients write it
        write_any_key(place, name, b"x")
        place.put("zz.jpg", b"x")
    result = listed(place)
    assert name in result
    assert (len(result) == 2) != is_local(place.uri)
    assert place.read(name) == b"x"

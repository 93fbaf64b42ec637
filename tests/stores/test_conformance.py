"""The same list for every server: verbs, conditions, names, errors, listings of many pages and of many folders."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.errors import BadPath, Conflict, NotFound
from imgbatch.storage import obstore_listing
from imgbatch.storage.stores import Folder, Stores
from tests.unit.test_store_contract import *  # noqa: F403 - the tests of every store, with the fixtures below
from tests.unit.test_store_contract import listed

HABITS = {
    "seaweedfs": ("//", "/..", "./"),  # cleans keys up, as if they were paths
    "azurite": ("\x01", "\n", "\t", "/..", "./"),  # fails to list some, and adlfs drops the others or cannot sign them
    "moto": ("\n",),
    "fake-gcs-server": ("\n",),  # as at Google, no name may have one
}
"""Parts of keys that a server does not take, or does not give back."""


@pytest.fixture
def place(server: Any) -> Folder:
    """An empty folder in each server's bucket `images`."""
    return Folder(server.stores(retries=2), f"{server.scheme}://images/{uuid.uuid4().hex}")


@pytest.fixture
def write_any_key(request: pytest.FixtureRequest, server: Any) -> Callable[[Folder, str, bytes], None]:
    """Write an object with a key that obstore refuses."""
    name = request.node.callspec.params["server"]

    def write(place: Folder, key: str, data: bytes) -> None:
        if any(part in key for part in HABITS[name]):
            pytest.skip(f"{name} does not keep such keys")
        server.write("images", place.at(key).partition("://images/")[2], data)

    return write


def test_writes_are_conditional(place: Folder) -> None:
    assert place.conditional


@pytest.mark.parametrize("name", ["a//b.jpg", "//x.jpg", "dots/../y.jpg", "./z.jpg"])
def test_keys_that_obstore_refuses_are_listed_and_read(place: Folder, write_any_key: Any, name: str) -> None:
    place.put("a.jpg", b"before")
    write_any_key(place, name, b"strange")
    place.put("zz.jpg", b"after")
    bucket_and_prefix = place.uri.partition("://")[2].partition("/")[2]
    keys = {row["path"] for batch in place.list_objects() for row in batch.to_pylist()}
    assert keys == {f"{bucket_and_prefix}/{key}" for key in ("a.jpg", name, "zz.jpg")}
    assert place.stores.read(place.at(name))[0] == b"strange"


def test_what_marks_a_folder_is_no_object(place: Folder, write_any_key: Any) -> None:
    write_any_key(place, "sub/", b"")
    place.put("sub/x.jpg", b"1")
    assert list(listed(place)) == ["sub/x.jpg"]


def test_a_stream_starts_anywhere_and_is_of_one_version(place: Folder) -> None:
    content = bytes(range(256)) * 8_000
    place.put("x", content)
    _, meta = place.stores.read(place.at("x"))
    with place.stores.stream(place.at("x"), meta) as stream:
        assert b"".join(iter(lambda: stream.read(), b"")) == content
    with place.stores.stream(place.at("x"), meta, 1_000_001) as stream:
        assert b"".join(iter(lambda: stream.read(), b"")) == content[1_000_001:]
    place.put("x", b"another")
    with pytest.raises(Conflict), place.stores.stream(place.at("x"), meta) as stream:
        stream.read()


def test_a_table_is_read_by_ranges_and_of_one_version(place: Folder) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": list(range(1000))}), sink, row_group_size=100)
    place.put("t.parquet", sink.getvalue().to_pybytes())
    _, meta = place.stores.read(place.at("t.parquet"))
    with place.stores.ranges(place.at("t.parquet"), meta) as file:
        assert pq.ParquetFile(file).read_row_group(7)["n"].to_pylist() == list(range(700, 800))
    with place.stores.open(place.at("t.parquet")) as file:
        assert pq.read_table(file)["n"].to_pylist() == list(range(1000))
    place.put("t.parquet", b"another")
    with pytest.raises(Conflict), place.stores.ranges(place.at("t.parquet"), meta) as file:
        file.read(8)


def test_the_tag_of_a_version_is_not_that_of_the_same_content_written_again(place: Folder, server: Any) -> None:
    """Where the store has generations; an ETag that is a digest of the content cannot tell them apart."""
    if server.scheme == "s3":
        pytest.skip("S3 compares ETags, which are digests of the content")
    place.put("x", b"1")
    tag = place.read_tagged("x")[1]
    place.put("x", b"1")
    with pytest.raises(Conflict):
        place.replace("x", b"2", tag)
    with pytest.raises(Conflict):
        place.delete("x", tag)


@pytest.mark.parametrize("folders", [3, 20], ids=lambda count: f"{count} folders")
def test_folders_are_listed_at_the_same_time_and_nothing_is_lost(
    place: Folder, server: Any, write_any_key: Any, folders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstore_listing, "_PAGES_IN_TURN", 2)
    monkeypatch.setattr(obstore_listing, "_PAGE", 100)
    names = [f"{n % folders:02d}/{'deep/' * (n % 3)}{n:04d}.jpg" for n in range(320)]
    names += ["between.jpg", "00.jpg", "zz.jpg"]
    bucket, root = server.bucket("images"), place.uri.rpartition("/")[2]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: obstore.put(bucket, f"{root}/{name}", name.encode()), names))
    if server.scheme != "s3" or "moto" in server.environment["AWS_ACCESS_KEY_ID"]:
        names.append("00/a//b.jpg")
        write_any_key(place, names[-1], b"x")
    store: Any = place.stores.resolve(place.uri)[0]

    assert len(store._listing._split(root)) > folders
    rows = [row for batch in store.list_objects(root) for row in batch.to_pylist()]

    assert sorted(row["path"] for row in rows) == sorted(f"{root}/{name}" for name in names)
    in_turn = [row for batch in store._listing._in_turn(root) for row in batch.to_pylist()]
    assert {row["path"]: row for row in rows} == {row["path"]: row for row in in_turn}
    for thread in threading.enumerate():
        if thread.name.startswith("streams"):
            thread.join(10)


def test_a_listing_resumes_after_its_last_key(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstore_listing, "_PAGE", 100)
    names = [f"{number:04d}" for number in range(250)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: place.put(name, b"x"), names))
    store: Any = place.stores.resolve(place.uri)[0]
    root = place.uri.rpartition("/")[2]
    first = next(store._listing._pages(root, ""))["path"].to_pylist()
    rest = [path for page in store._listing._pages(root, first[-1]) for path in page["path"].to_pylist()]
    assert first + rest == [f"{root}/{name}" for name in names]
    after = [path for page in store._listing._list_any_key(root, first[-1]) for path in page["path"].to_pylist()]
    assert after == rest


def test_a_bucket_that_is_missing_is_not_found(server: Any, request: pytest.FixtureRequest) -> None:
    name = f"missing-{uuid.uuid4().hex[:8]}"
    missing = Folder(server.stores(), f"{server.scheme}://{name}/x")
    verbs = [lambda: missing.read("a"), missing.names, missing.folders, lambda: list(missing.list_objects())]
    if request.node.callspec.params["server"] != "seaweedfs":  # which makes a bucket of anything that is written
        verbs += [lambda: missing.create("a", b""), lambda: missing.put("a", b"")]
    for verb in verbs:
        with pytest.raises(NotFound, match=name) as caught:
            verb()
        assert caught.value.attempts == 1


def test_a_name_that_no_bucket_can_have_is_refused_before_any_request(server: Any) -> None:
    with pytest.raises(BadPath, match="name"):
        server.stores().read(f"{server.scheme}://evil.org#/x")


def test_stores_travel_to_workers(server: Any, place: Folder) -> None:
    import pickle

    place.put("x", b"1")
    stores: Stores = pickle.loads(pickle.dumps(place.stores))
    assert stores.read(place.at("x"))[0] == b"1"
    assert "test" not in repr(stores)

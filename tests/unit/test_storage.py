"""Stores: the same operations and errors on disk, on S3 and through fsspec; unusual names; retries."""

from __future__ import annotations

import errno
import fcntl
import http.server
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import obstore
import pyarrow as pa
import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import (
    BadPath,
    ConfigError,
    Conflict,
    Exists,
    Forbidden,
    NotFound,
    StoreError,
    TimedOut,
    Unreachable,
)
from imgbatch.storage import fsspec_store
from imgbatch.storage.base import unquote_etag, unquote_etags
from imgbatch.storage.local import LocalStore
from imgbatch.storage.stores import Folder, Meta, Stores, time
from imgbatch.storage.uris import absolute, is_local, join
from tests.integration import faults
from tests.unit.test_store_contract import listed


def local(**options: Any) -> Stores:
    return Stores(StorageConfig(**options), {})


# URIs


@pytest.mark.parametrize(
    "text, uri",
    [
        ("/data/a.jpg", "/data/a.jpg"),
        ("/data/photos/", "/data/photos"),
        ("/data//x/../a.jpg", "/data/a.jpg"),
        ("file:///data/a b%20.jpg", "/data/a b%20.jpg"),
        ("local:///data", "/data"),
        ("/", "/"),
        ("/data/co::lon.jpg", "/data/co::lon.jpg"),
        ("s3://bucket/photos/", "s3://bucket/photos"),
        ("s3://bucket//photos//a/../b", "s3://bucket//photos//a/../b"),
        ("s3://bucket", "s3://bucket"),
        ("https://host/a?b=c#d", "https://host/a?b=c#d"),
        ("s3://bucket/file://x", "s3://bucket/file://x"),
    ],
)
def test_a_uri_has_one_spelling(text: str, uri: str) -> None:
    assert absolute(text) == uri
    assert absolute(uri) == uri


def test_a_relative_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("photos/a.jpg") == f"{tmp_path}/photos/a.jpg"
    assert absolute("~/photos") == "/home/me/photos"


@pytest.mark.parametrize(
    "folder, name, uri",
    [
        ("/data/lists", "a.jpg", "/data/lists/a.jpg"),
        ("/data/lists", "../a.jpg", "/data/a.jpg"),
        ("/data/lists", "x//./a.jpg", "/data/lists/x/a.jpg"),
        ("/data/lists", "/a.jpg", "/a.jpg"),
        ("/data/lists", "s3://b/a.jpg", "s3://b/a.jpg"),
        ("/data/lists", "file:///a.jpg", "/a.jpg"),
        ("/data/lists", "~/a.jpg", "/data/lists/~/a.jpg"),
        ("/data/lists", "co::lon.jpg", "/data/lists/co::lon.jpg"),
        ("/data/lists", "a b%20#[1].jpg", "/data/lists/a b%20#[1].jpg"),
        ("", "a.jpg", "/a.jpg"),
        ("s3://b", "a.jpg", "s3://b/a.jpg"),
        ("s3://b/x", "../a.jpg", "s3://b/a.jpg"),
        ("s3://b/x", "y//a.jpg", "s3://b/x/y//a.jpg"),
        ("https://host/x", "a.jpg", "https://host/x/a.jpg"),
    ],
)
def test_a_name_in_a_manifest_is_resolved_against_its_place(folder: str, name: str, uri: str) -> None:
    assert join(folder, name) == uri


def test_is_local() -> None:
    assert all(map(is_local, ("a", "/a", "file:///a", "local:///a", "a::b.jpg", "/a/b://c")))
    assert not any(map(is_local, ("s3://b/a", "https://h/a", "simplecache::s3://b/a", "memory://a")))


@pytest.mark.parametrize("uri", ["simplecache::s3://b/x", "zip::s3://b/x.zip", "filecache::https://h/x"])
def test_chained_file_systems_are_refused(uri: str) -> None:
    with pytest.raises(BadPath, match="chained"):
        local().read(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "gs://", "az:///x"])
def test_a_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(BadPath, match="names no bucket"):
        local().read(uri)


def test_an_unknown_protocol_is_an_error_of_the_object() -> None:
    with pytest.raises(BadPath, match="foo"):
        local().read("foo://b/x.jpg")
    with pytest.raises(ConfigError, match="foo"):
        Folder(local(), "foo://b").names()


def test_the_missing_package_of_a_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: Any, **options: Any) -> None:
        raise ImportError("Please install ossfs")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(ConfigError, match="install ossfs"):
        local().read("oss://b/x.jpg")


def test_what_needs_the_packages_of_a_cloud_names_the_extra_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gcsfs", "azure"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(BadPath, match=r"a//b.*imgbatch\[gcs\]"):
        local(options={"anon": True}).read("gs://bucket/a//b")
    with pytest.raises(ConfigError, match=r"imgbatch\[azure\]"):
        local(options={"anon": True, "account_name": "me"}).read("az://photos/x")


# Operations


@pytest.mark.parametrize("answer", [501, 403, 400, 405])
def test_without_conditional_deletion_the_etag_is_compared_first(s3: Any, answer: int) -> None:
    def plan(method: str, path: str, before: int) -> int | None:
        return answer if method == "DELETE" and "X-Amz-Signature" in path else None

    with faults.proxy(s3.endpoint, plan) as endpoint:
        stores = Stores(StorageConfig(), {**s3.environment, "AWS_ENDPOINT_URL": endpoint})
        place = Folder(stores, f"s3://out/deletions/{answer}")
        place.put("x", b"0")
        _, old = place.read_tagged("x")
        place.put("x", b"1")
        with pytest.raises(Conflict):
            place.delete("x", old)
        assert place.read("x") == b"1"
        place.delete("x", place.read_tagged("x")[1])
    assert place.names() == []


def test_a_failed_conditional_deletion_is_retried_and_logs_no_signature(s3: Any) -> None:
    answers = iter([503, "lost", 503, 503, 503])

    def plan(method: str, path: str, before: int) -> int | str | None:
        return next(answers) if method == "DELETE" else None

    with faults.proxy(s3.endpoint, plan) as endpoint:
        stores = Stores(StorageConfig(retries=2), {**s3.environment, "AWS_ENDPOINT_URL": endpoint})
        place = Folder(stores, "s3://out/deletions")
        place.put("x", b"0")
        tag = place.read_tagged("x")[1]
        answers = iter([503, "lost", None])
        place.delete("x", tag)
        assert not place.exists("x")
        place.put("x", b"0")
        answers = iter([503] * 3)
        with pytest.raises(Unreachable) as caught:
            place.delete("x", tag)
        assert "Signature" not in str(caught.value) and s3.endpoint not in str(caught.value)


@pytest.mark.parametrize("folders", [1, 3, 20], ids=lambda count: f"{count} folders")
def test_folders_are_listed_concurrently_without_losses(s3: Any, folders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.storage.obstore_listing._PAGES_IN_TURN", 2)
    root, bucket = uuid.uuid4().hex, s3.bucket("images")
    names = [f"{n % folders:02d}/{'deep/' * (n % 3)}{n:04d}.jpg" for n in range(1500)]
    names += ["between.jpg", "00.jpg", "zz.jpg"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: obstore.put(bucket, f"{root}/{name}", name.encode()), names))
    names.append("00/new\nline.jpg")
    s3.write("images", f"{root}/{names[-1]}", b"x")
    store, path = s3.stores().resolve(f"s3://images/{root}")

    streams = store._listing._split(path)
    assert len(streams) > folders
    result = [row for batch in store.list_objects(path) for row in batch.to_pylist()]

    assert sorted(row["path"] for row in result) == sorted(f"{root}/{name}" for name in names)
    in_turn = [row for batch in store._listing._in_turn(path) for row in batch.to_pylist()]
    assert {row["path"]: row for row in result} == {row["path"]: row for row in in_turn}
    assert [row["path"] for batch in store.list_objects(path) for row in batch.to_pylist()] == [
        row["path"] for row in result
    ]


def test_an_abandoned_listing_ends_its_threads(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.storage.obstore_listing._PAGES_IN_TURN", 2)
    root, bucket = uuid.uuid4().hex, s3.bucket("images")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: obstore.put(bucket, f"{root}/{n % 20:02d}/{n}", b"x"), range(1100)))
    listing = Folder(s3.stores(), f"s3://images/{root}").list_objects()
    next(listing)
    listing.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("streams"):
            thread.join(10)
            assert not thread.is_alive()


# Disk


def test_links_are_followed_but_not_in_loops(tmp_path: Path) -> None:
    for name in ("a/x", "b/y"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/to-b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to-a").symlink_to(tmp_path / "a")
    (tmp_path / "b/self").symlink_to("self")
    (tmp_path / "b/one").symlink_to("two")
    (tmp_path / "b/two").symlink_to("one")
    (tmp_path / "nothing").symlink_to("gone")
    (tmp_path / "file").symlink_to("a/x")
    result = listed(Folder(local(), str(tmp_path)))
    files, nowhere = ["a/to-b/y", "a/x", "b/to-a/x", "b/y", "file"], ["one", "self", "two"]
    assert [name for name, row in result.items() if row["size"] is not None] == files
    assert [name for name, row in result.items() if row["size"] is None] == [
        *(f"a/to-b/{name}" for name in nowhere), *(f"b/{name}" for name in nowhere), "nothing"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["x.jpg", "folder/y.jpg"])
def test_a_link_target_without_permission_is_an_error(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.jpg").symlink_to(f"/closed/{name}")
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:  # root may look everywhere, so it is not done with chmod
        if os.fsencode(path).endswith(b"/link.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(Forbidden, match=r"link\.jpg"):
        list(Folder(local(), str(tmp_path)).list_objects())


FAR = 253_402_300_800  # the first second of the year 10000


@pytest.mark.parametrize(
    ("seconds", "year"), [(-11_644_473_601, 1600), (0, 1970), (1 << 33, 2242), (FAR - 1, 9999), (FAR, None), (1 << 41, None)]
)  # fmt: skip
def test_file_times_out_of_range_are_null(seconds: int, year: int | None) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:  # a file system whose times have 64 bits
        path = Path(place) / "x.jpg"
        path.write_bytes(b"1")
        os.utime(path, ns=(0, seconds * 10**9 + 123_456_789))
        assert path.stat().st_mtime_ns == seconds * 10**9 + 123_456_789
        (row,) = listed(Folder(local(), place)).values()
        _, read = local().read(str(path))
        assert row["last_modified"] == read.last_modified == LocalStore().head(str(path)).last_modified
        moment = read.last_modified
        assert (moment and (moment.year, moment.microsecond)) == (year and (year, 123_456))


@pytest.mark.parametrize(
    ("time", "year"),
    [(float(FAR), None), (1e300, None), ("no time", None), (0.5, 1970), ("2026-11-28T01:02:03+00:00", 2026)],
)
def test_times_out_of_range_are_null_in_other_stores(time: object, year: int | None) -> None:
    moment = fsspec_store._meta({"size": 1, "mtime": time}).last_modified
    assert (moment and moment.year) == year


def test_pipes_sockets_and_devices_are_not_listed_or_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(tmp_path)  # the path of a socket must be short
        bound.bind("socket.jpg")
        assert listed(Folder(local(), str(tmp_path))) == {}
        for name in ("pipe.jpg", "device.jpg", "socket.jpg"):
            with pytest.raises(BadPath):
                local(retries=0).read(f"{tmp_path}/{name}")
            assert not Folder(local(), str(tmp_path)).exists(name)


@pytest.fixture(autouse=True)
def _same_working_directory() -> Iterator[None]:
    before = os.getcwd()
    yield
    os.chdir(before)


def test_a_folder_without_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"1")
    scandir = os.scandir

    def guarded(path: Any) -> Any:  # root may read everything, so it is not done with chmod
        if b"closed" in os.fsencode(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(Forbidden, match="closed"):
        list(Folder(local(), str(tmp_path)).list_objects())


def test_a_name_that_is_not_utf8_is_listed_and_refused_when_read(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/a\xff.jpg", "wb") as file:
        file.write(b"1")
    assert list(listed(Folder(local(), str(tmp_path)))) == ["a\\xff.jpg"]
    with pytest.raises(BadPath, match="not UTF-8"):
        local().read(f"{tmp_path}/a\\xff.jpg")


def test_a_tree_deeper_than_the_recursion_limit_is_listed(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("x.jpg").write_bytes(b"1")
    os.chdir(tmp_path)
    try:
        assert list(listed(Folder(local(), str(tmp_path)))) == [f"{'d/' * 1200}x.jpg"]
    finally:
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # shutil's own recursion is as deep


def test_files_that_are_deleted_during_a_listing_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"1")
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if os.fsencode(path).endswith(b"/b"):
            raise FileNotFoundError(errno.ENOENT, "No such file", path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert list(listed(Folder(local(), str(tmp_path)))) == ["a", "c"]


def test_a_file_system_without_hard_links_is_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match=r"no hard links.*another file system"):
        Folder(local(), str(tmp_path)).create("x", b"")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    folder = Folder(local(retries=0), str(tmp_path))
    folder.create("y", b"old")
    _, tag = folder.read_tagged("y")
    monkeypatch.setattr(os, "fsync", fsync)
    for write in (
        lambda: folder.create("x", b""),
        lambda: folder.put("y", b""),
        lambda: folder.replace("y", b"", tag),
    ):
        with pytest.raises(StoreError, match="No space left"):
            write()
    assert folder.names() == ["y"]
    assert folder.read("y") == b"old"


def test_a_file_system_that_cannot_sync_folders_is_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = Folder(local(retries=0), str(tmp_path))
    folder.create("x", b"1")
    assert folder.read("x") == b"1"


def test_waiting_for_a_lock_has_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.storage.local._LOCK_S", 0.05)
    folder = Folder(local(retries=0), str(tmp_path))
    folder.create("x", b"1")
    _, tag = folder.read_tagged("x")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(TimedOut, match="lock"):
        folder.replace("x", b"2", tag)
    os.close(handle)
    folder.replace("x", b"2", tag)
    assert folder.names() == ["x"]


# S3


def test_a_wrong_secret_is_forbidden_in_every_operation(s3: Any) -> None:
    wrong = Folder(Stores(StorageConfig(), {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}), "s3://images/wrong")
    for verb in (
        lambda: wrong.read("x"),
        lambda: wrong.names(),
        lambda: list(wrong.list_objects()),
        lambda: wrong.folders(),
        lambda: wrong.create("x", b""),
        lambda: wrong.put("x", b""),
        lambda: wrong.exists("x"),
        lambda: wrong.replace("x", b"", '"tag"'),
    ):
        with pytest.raises(Forbidden, match="s3://images/wrong") as caught:
            verb()
        assert caught.value.attempts == 1
        assert "\n" not in str(caught.value)


def test_a_missing_bucket_is_not_found(s3: Any) -> None:
    missing = Folder(s3.stores(), f"s3://missing-{uuid.uuid4().hex[:8]}/x")
    for verb in (lambda: missing.read("a"), missing.names, missing.folders, lambda: list(missing.list_objects())):
        with pytest.raises(NotFound, match="missing-"):
            verb()
    assert not missing.exists("a")


def test_missing_credentials_name_the_ways_to_set_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Forbidden, match=r"AWS_ACCESS_KEY_ID.*storage\.options\.anon"):
        local().read("s3://bucket/x")
    with pytest.raises(Forbidden, match="nobody"):
        local(options={"profile": "nobody"}).read("s3://bucket/x")


def test_credentials_of_a_profile_are_used(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, secret = s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"]
    (tmp_path / "c").write_text(f"[me]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "c"))
    s3.bucket("images").put("profile/x", b"1")
    stores = Stores(StorageConfig(options={"profile": "me"}), {"AWS_ENDPOINT_URL": s3.endpoint})
    assert stores.read("s3://images/profile/x")[0] == b"1"


def test_credentials_that_expire_are_renewed(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that returns credentials, like single sign-on: the server refuses those of a minute ago."""
    key, secret = s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"]
    program, asked = tmp_path / "program", tmp_path / "asked"
    program.write_text(
        f"""#!{sys.executable}
import datetime, json, pathlib
asked = pathlib.Path({str(asked)!r})
asked.open("a").write(".")
soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=1)
print(json.dumps({{"Version": 1, "AccessKeyId": {key!r} if asked.stat().st_size > 2 else "stale",
                  "SecretAccessKey": {secret!r}, "SessionToken": "", "Expiration": soon.isoformat()}}))
"""
    )
    program.chmod(0o700)
    (tmp_path / "c").write_text(f"[profile me]\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "c"))
    monkeypatch.setattr("imgbatch.storage.s3._CREDENTIALS_VALID_FOR", timedelta())
    s3.bucket("images").put("renewed/x", b"1")
    stores = Stores(StorageConfig(options={"profile": "me"}, retries=0), {"AWS_ENDPOINT_URL": s3.endpoint})
    with pytest.raises(Forbidden):
        stores.read("s3://images/renewed/x")
    assert stores.read("s3://images/renewed/x")[0] == b"1"
    assert len(asked.read_text()) >= 3


@pytest.mark.parametrize(
    "options",
    [
        {"key": "K", "secret": "S", "endpoint_url": "E"},
        {"key": "K", "secret": "S", "client_kwargs": {"endpoint_url": "E", "region_name": "us-east-1"}},
        {"username": "K", "password": "S", "endpoint_url": "E", "use_ssl": False},
        {"s3": {"key": "K", "secret": "S", "endpoint_url": "E"}, "gs": {"token": "anon"}},
        {"key": "other", "secret": "one", "s3": {"key": "K", "secret": "S", "endpoint_url": "E"}},
        {"key": "K", "secret": "S", "endpoint_url": "E", "config_kwargs": {"s3": {"addressing_style": "path"}}},
    ],
)
def test_options_have_the_names_of_s3fs(s3: Any, options: dict[str, Any]) -> None:
    words = {
        "K": s3.environment["AWS_ACCESS_KEY_ID"],
        "S": s3.environment["AWS_SECRET_ACCESS_KEY"],
        "E": s3.endpoint,
    }

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return words.get(value, value) if isinstance(value, str) else value

    s3.bucket("images").put("options/x", b"1")
    folder = Folder(local(options=filled(options), retries=0), "s3://images/options")
    assert folder.read("x") == b"1"
    assert folder.names() == ["x"]
    with pytest.raises(Exists):
        folder.create("x", b"2")


def test_credentials_in_options_exclude_those_of_the_environment(s3: Any) -> None:
    stores = Stores(StorageConfig(options={"key": "other", "secret": "one"}), s3.environment)
    with pytest.raises(Forbidden):
        stores.read("s3://images/x")


@pytest.mark.parametrize("options", [{"anon": "perhaps"}, {"ServerSideEncryption": "bogus", "anon": True}])
def test_an_unusable_option_is_a_config_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"storage\.options"):
        local(options=options).read("s3://bucket/x")


def test_a_key_of_digits_is_text() -> None:
    assert local(options={"key": 123, "secret": 456}).resolve("s3://bucket/a/b")[1] == "a/b"


def test_s3a_is_s3(s3: Any) -> None:
    s3.bucket("images").put("s3a/x", b"1")
    assert Folder(s3.stores(), "s3a://images/s3a").read("x") == b"1"


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers with the test's `reply(handler)`."""

    reply: Any

    def do_GET(self) -> None:
        type(self).reply(self)

    do_HEAD = do_PUT = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start a server with replies that a test sets: `fake(reply) -> Stores`."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    servers = []

    def start(reply: Any, **config: Any) -> Stores:
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), type("S", (_Server,), {"reply": staticmethod(reply)})
        )
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        return Stores(StorageConfig(**config), {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"})

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


MOMENT = {"Last_Modified": "Fri, 02 Jan 2026 03:04:05 GMT"}


def test_folder_markers_are_not_listed(fake: Any) -> None:
    keys = {"p/": 0, "p/sub/": 0, "p/sub/x.jpg": 3, "p/empty": 0}

    def reply(request: _Server) -> None:
        if request.command == "HEAD":
            there = request.path.removeprefix("/b/") in keys
            request.answer(200 if there else 404, ETag='"e"', **MOMENT)
            return
        entries = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified><ETag>&quot;e&quot;</ETag>"
            f"<Size>{size}</Size></Contents>" for key, size in keys.items()
        )  # fmt: skip
        body = f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        request.answer(200, body.encode())

    assert list(listed(Folder(fake(reply), "s3://b/p"))) == ["sub/x.jpg", "empty"]


def test_transient_failures_are_retried_and_permanent_ones_are_not(fake: Any) -> None:
    asked: list[int] = []
    todo = {"busy": [503, 429, 500, 200], "down": [503] * 9, "gone": [404], "closed": [403]}

    def reply(request: _Server) -> None:
        asked.append(todo[request.path.rpartition("/")[2]].pop(0))
        request.answer(asked[-1], b"x", ETag='"e"', **MOMENT)

    stores = fake(reply, retries=3)
    assert stores.read("s3://b/busy")[0] == b"x"
    assert asked == [503, 429, 500, 200]
    for name, kind, attempts in (("down", Unreachable, 4), ("gone", NotFound, 1), ("closed", Forbidden, 1)):
        asked.clear()
        with pytest.raises(kind) as caught:
            stores.read(f"s3://b/{name}")
        assert caught.value.attempts == attempts == len(asked)


def test_a_permanent_failure_after_a_transient_one_counts_two_attempts(fake: Any) -> None:
    todo = [503, 404]
    stores = fake(lambda request: request.answer(todo.pop(0)), retries=3)
    with pytest.raises(NotFound) as caught:
        stores.read("s3://b/x")
    assert caught.value.attempts == 2


def test_a_truncated_body_is_an_error(fake: Any) -> None:
    asked = []

    def reply(request: _Server) -> None:
        asked.append(request.path)
        request.answer(200, b"half", 8, ETag='"e"', **MOMENT)
        request.close_connection = True

    with pytest.raises(Unreachable):
        fake(reply, retries=1).read("s3://b/x")
    assert len(asked) == 2


WAS = {"etag": "e", "last_modified": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)}


@pytest.mark.parametrize(
    ("listed_meta", "raised", "attempts"),
    [
        (Meta(size=8, **WAS), Unreachable, 3),  # the listed version, so that its body was cut: tried again
        (Meta(size=8), Conflict, 1),  # a manifest that is wrong, or old
        (Meta(size=8, last_modified=WAS["last_modified"]), Conflict, 1),
        (Meta(size=8, etag="old"), None, 1),  # overwritten since: read as it is now, with its own ETag
        (Meta(size=8, last_modified=datetime(2025, 1, 1, tzinfo=UTC)), None, 1),
        (Meta(size=4, **WAS), None, 1),
        (Meta(), None, 1),
    ],
)
def test_a_body_of_another_length_than_listed_is_an_error(
    fake: Any, listed_meta: Meta, raised: type[Exception] | None, attempts: int
) -> None:
    asked = []

    def reply(request: _Server) -> None:
        asked.append(request.path)
        request.answer(200, b"half", ETag='"e"', **MOMENT)

    stores = fake(reply, retries=2)
    if raised is None:
        assert stores.read("s3://b/x", None, listed_meta) == (b"half", Meta(size=4, **WAS))
    else:
        with pytest.raises(raised, match=r"4 .*8 bytes"):
            stores.read("s3://b/x", None, listed_meta)
    assert len(asked) == attempts


def test_fsspec_stores_have_a_timeout() -> None:
    options = {"key": "k", "secret": "s"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options["endpoint_url"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TimedOut):
            local(options=options, timeout_s=0.5, retries=0).read("s3://b/x//y")  # a key that s3fs reads


def test_stores_declare_conditional_creation(s3: Any, tmp_path: Path) -> None:
    assert Folder(local(), str(tmp_path)).conditional and Folder(s3.stores(), "s3://out/x").conditional
    assert not Folder(local(), "memory://x").conditional


def test_a_server_that_never_responds_times_out(fake: Any) -> None:
    done = threading.Event()
    with pytest.raises(TimedOut):
        fake(lambda request: done.wait(20), retries=1, timeout_s=0.2).read("s3://b/x")
    done.set()


def test_a_missing_server_is_unreachable(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        stores = local(options={"anon": True, "endpoint_url": endpoint}, retries=9)
        with pytest.raises(Unreachable, match="read s3://b/x"):
            stores.read("s3://b/x")
    assert len(waits) == 9
    assert waits[:3] == sorted(waits[:3])
    assert 0 < min(waits) <= max(waits) <= 20


# Secrets, pickling, other stores


def test_secrets_are_pickled_but_not_in_the_repr(s3: Any) -> None:
    stores = Stores(StorageConfig(options={"secret": "hunter2", "key": "k"}), s3.environment)
    shown = f"{stores!r} {stores} {Folder(stores, 's3://b')!r}"
    assert "hunter2" not in shown
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in shown
    s3.bucket("images").put("travel/x", b"1")
    ours = s3.stores()
    ours.read("s3://images/travel/x")
    assert pickle.loads(pickle.dumps(ours)).read("s3://images/travel/x")[0] == b"1"


def test_fsspec_stores_are_read_listed_and_written() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    folder = Folder(local(), root)
    folder.create("a/x", b"1")
    folder.put("y", b"22")
    with pytest.raises(Exists):
        folder.create("y", b"3")
    assert folder.names() == ["a/x", "y"]
    assert folder.folders() == ["a"]
    data, tag = folder.read_tagged("y")
    folder.replace("y", data * 2, tag)
    assert folder.read("y") == b"2222"
    assert not folder.exists("a")
    folder.delete("y")
    folder.delete("y")
    assert folder.names() == ["a/x"]
    with pytest.raises(NotFound):
        folder.read("y")


def test_etags_are_unquoted() -> None:
    raw = ['"abc"', 'W/"abc"', "abc", "", '""', None, '"W/abcW"', "/x/", '"a"b"', "0x8D"]
    bare = ["abc", "abc", "abc", None, None, None, "W/abcW", "/x/", 'a"b', "0x8D"]
    assert unquote_etags(pa.array(raw)).to_pylist() == bare == [unquote_etag(etag) for etag in raw]


def test_another_client_sees_the_written_objects(s3: Any) -> None:
    Folder(s3.stores(), "s3://out/seen").create("x", b"1")
    assert bytes(obstore.get(s3.bucket("out"), "seen/x").bytes()) == b"1"


def test_slashes_at_the_ends_of_a_key_are_kept(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = s3.stores().resolve("s3://images/a")
    for operation in (store.read, store.head):
        with pytest.raises(BadPath):
            operation("/a.jpg")
    monkeypatch.setattr(store._listing, "_has_keys_from_a_slash", lambda: True)
    monkeypatch.setattr(store._listing, "_level", lambda path: None)
    monkeypatch.setattr(store._listing, "_pages", None)  # the client that drops them is not asked
    assert next(batch.schema.names[0] for batch in store.list_objects("")) == "path"

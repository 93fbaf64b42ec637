"""The listing of each kind of input: folders, globs, single objects, manifests."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import IMAGE_SUFFIXES, SourceConfig, StorageConfig
from imgbatch.errors import BadPath, Forbidden, ImgbatchError, InputError, NotFound
from imgbatch.ledger.candidates import candidates, no_image
from imgbatch.ledger.carried import CarriedColumns
from imgbatch.ledger.listing import Counts
from imgbatch.schema import LISTING, carried_fields, with_carried
from imgbatch.sources.objects import are_images
from imgbatch.sources.recognise import list_all, recognise
from imgbatch.storage.stores import Folder, Meta, Stores

CANDIDATES = [
    "a.jpg", "UP.JPG", "MiXed.JpEg", "_x.jpg", "nosuffix", "_under", "two.dots.png", "a b.jpg", "h#x.jpg", "p%20.jpg",
    "pl+us.jpg", "co::lon.jpg", "br[1].jpg", "st*r.jpg", "q?.jpg", "ü日本.jpg", "🍎.webp", "deep/er/x.gif",
    "dotted.folder/nosuffix", " lead.jpg", "quo'te\".jpg",
]  # fmt: skip
CONTROL = ["tab\tx.jpg", "new\nline.jpg", "bell\x07"]
IGNORED = [
    ".hidden.jpg", ".DS_Store", "notes.txt", "a.jpg.bak", "list.json", "sub/.x", "x.jpg~", "trail.jpg ", ".hidden/x.jpg",
    "cat/.ipynb_checkpoints/x-checkpoint.jpg", "cat/@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg", ".Trash-1000/files/x.jpg",
    "__MACOSX/cat/._x.jpg", "LICENSE", "cat/_SUCCESS", "cat_$folder$",
]  # fmt: skip


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """Return an empty folder."""
    if request.param == "disk":
        (tmp_path / "folder").mkdir()
        return Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path / "folder"))
    return Folder(request.getfixturevalue("s3").stores(retries=0), f"s3://images/{uuid.uuid4().hex}")


@pytest.fixture
def disk(tmp_path: Path) -> Folder:
    return Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path))


def rows(place: Folder, *inputs: str, **config: Any) -> list[dict[str, Any]]:
    """List the inputs as the job does."""
    sources = recognise(place.stores, inputs, SourceConfig(**config))
    columns, batches = CarriedColumns(), []
    with candidates(sources, allow_empty=True) as listing:
        for listed in listing:
            assert listed.batch.schema == with_carried(LISTING, carried_fields(listed.batch.schema))
            columns.take(listed.batch.schema)
            batches.append(listed.batch)
    return [row for batch in batches for row in columns.cast(batch).to_pylist()]


def uris(place: Folder, *inputs: str, **config: Any) -> list[str]:
    return [row["uri"] for row in rows(place, *inputs, **config)]


def below(place: Folder, *inputs: str, **config: Any) -> list[str]:
    """Return the names below the folder, sorted."""
    listed = uris(place, *inputs, **config)
    assert all(uri.startswith(f"{place.uri}/") for uri in listed)
    return sorted(uri.removeprefix(f"{place.uri}/") for uri in listed)


def ignored(place: Folder, uri: str, **config: Any) -> int:
    (source,) = recognise(place.stores, [uri], SourceConfig(**config))
    return sum(batch.ignored for batch in source.list_images())


def kind(place: Folder, uri: str, **config: Any) -> str:
    return recognise(place.stores, [uri], SourceConfig(**config))[0].kind


# Folders


def test_a_folder_lists_its_candidates_and_counts_the_others(place: Folder) -> None:
    for name in CANDIDATES + IGNORED:
        place.put(name, name.encode())
    assert below(place, place.uri) == below(place, f"{place.uri}/") == sorted(CANDIDATES)
    assert ignored(place, place.uri) == len(IGNORED)
    assert kind(place, place.uri) == "folder"
    for row in rows(place, place.uri):
        data, meta = place.stores.read(row["uri"])
        assert row["uri"].endswith(data.decode())
        assert (row["size"], row["etag"]) == (len(data), meta.etag)
        assert row["last_modified"] is not None


def test_names_with_control_characters_are_candidates(disk: Folder) -> None:
    for name in CONTROL:
        disk.put(name, b"1")
    assert below(disk, disk.uri) == sorted(CONTROL)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_known_suffix_is_a_candidate_in_any_case(disk: Folder, suffix: str) -> None:
    for name in (f"a.{suffix}", f"b.{suffix.upper()}", f"c.{suffix}x"):
        disk.put(name, b"")
    assert below(disk, disk.uri) == [f"a.{suffix}", f"b.{suffix.upper()}"]


@pytest.mark.parametrize(
    "suffixes, expected",
    [
        ("*", ["a.JPG", "b.png", "c.txt", "none"]),
        ("jpg", ["a.JPG"]),
        ("JPG", ["a.JPG"]),
        (" .jpg , txt,,", ["a.JPG", "c.txt"]),
        ("images", ["a.JPG", "b.png", "none"]),
    ],
)
def test_suffixes_are_configurable(disk: Folder, suffixes: str, expected: list[str]) -> None:
    for name in ("a.JPG", "b.png", "c.txt", "none", ".hidden.jpg"):
        disk.put(name, b"")
    assert below(disk, disk.uri, suffixes=suffixes) == expected
    assert ignored(disk, disk.uri, suffixes=suffixes) == 5 - len(expected)


def test_listings_are_reproducible(place: Folder) -> None:
    for name in ("b/2.jpg", "a.jpg", "b.jpg", "b/1.jpg", "c/x/y.jpg", "B.jpg"):
        place.put(name, b"")
    assert uris(place, place.uri) == uris(place, place.uri)


def test_links_are_followed_and_loops_and_pipes_are_not(disk: Folder) -> None:
    root = Path(disk.uri)
    disk.put("real/a.jpg", b"1")
    (root / "link.jpg").symlink_to("real/a.jpg")
    (root / "folder").symlink_to("real")
    (root / "real/up").symlink_to("..")
    (root / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(root / "pipe.jpg")
    assert below(disk, disk.uri) == ["folder/a.jpg", "link.jpg", "real/a.jpg", "self.jpg"]
    with pytest.raises(NotFound, match=r"self\.jpg: a link to self\.jpg, which is not there"):
        disk.stores.read(disk.at("self.jpg"))


def test_a_folder_without_permission_is_an_error(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.put("closed/a.jpg", b"1")
    scandir = os.scandir

    def guarded(path: Any) -> Any:  # root may read list_all, so it is not done with chmod
        if os.fsencode(path).endswith(b"closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(Forbidden, match="closed"):
        uris(disk, disk.uri)


def test_a_name_that_is_not_utf8_becomes_a_reject(disk: Folder) -> None:
    with open(os.fsencode(disk.uri) + b"/\xe4.jpg", "wb"):
        pass
    (uri,) = uris(disk, disk.uri)
    assert uri == f"{disk.uri}/\\xe4.jpg"
    with pytest.raises(BadPath, match=r"'ä\.jpg' in Windows-1252.* is not UTF-8.*convmv -f cp1252"):
        disk.stores.read(uri)


@pytest.mark.parametrize("form", ["folder", "glob"])
def test_an_input_below_a_hidden_folder_is_listed(place: Folder, form: str) -> None:
    for name in ("a.jpg", "cat/b.jpg", ".thumbs/c.jpg", "lost+found/d.jpg"):
        place.put(f".cache/@eaDir/{name}", b"1")
    inner = place.folder(".cache/@eaDir")
    assert below(inner, inner.uri if form == "folder" else f"{inner.uri}/**") == ["a.jpg", "cat/b.jpg"]
    assert uris(place, place.uri) == []


def test_junk_hides_tars_and_tables_too(disk: Folder) -> None:
    for folder in (".trash/", "$Recycle.Bin/", "#recycle/", ""):
        disk.put(f"{folder}a.tar", b"1")
        Path(disk.at(f"{folder}b.parquet")).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"jpg": [b"1"]}), disk.at(f"{folder}b.parquet"))
    for suffixes in ("images", "*"):
        assert below(disk, disk.uri, suffixes=suffixes) == ["a.tar", "b.parquet#0"]
        assert ignored(disk, disk.uri, suffixes=suffixes) == 6


def test_hidden_objects_may_be_named_explicitly(disk: Folder) -> None:
    for name in (".a.jpg", "LICENSE", ".git/b.jpg"):
        disk.put(name, b"1")
        assert below(disk, disk.at(name)) == [name]
    disk.put("list.csv", b"uri\n.a.jpg\nLICENSE\n.git/b.jpg\n")
    assert below(disk, disk.at("list.csv")) == [".a.jpg", ".git/b.jpg", "LICENSE"]


# Objects without a suffix


def test_objects_without_a_suffix_are_recognised_by_their_first_bytes(place: Folder) -> None:
    contents = {"png": b"\x89PNG\r\n\x1a\n" + bytes(5000), "jpeg": b"\xff\xd8\xff\xe0", "text": b"Permission is granted " * 500,
                "empty": b"", "dicom": bytes(128) + b"DICM" + bytes(9)}  # fmt: skip
    for name, data in contents.items():
        place.put(name, data)
    names = [*contents, "gone"]
    assert dict(zip(names, are_images(place.stores, [place.at(name) for name in names]), strict=True)) == {
        "png": True, "jpeg": True, "text": False, "empty": False, "dicom": True, "gone": True,
    }  # fmt: skip
    assert are_images(place.stores, []) == []


# Links


def test_a_broken_link_is_listed_and_reported_when_read(disk: Folder) -> None:
    root = Path(disk.uri)
    disk.put("cat/a.jpg", b"1")
    (root / "cat/b.jpg").symlink_to("../.store/gone")
    (root / "cat/c.jpg").symlink_to("a.jpg/below-a-file")
    (root / "dogs").symlink_to("/mnt/dogs-of-another-machine")
    (root / "notes.txt").symlink_to("gone")
    assert below(disk, disk.uri) == ["cat/a.jpg", "cat/b.jpg", "cat/c.jpg", "dogs"] and ignored(disk, disk.uri) == 1
    unknown = {"size": None, "etag": None, "last_modified": None, "container": None}
    for row in rows(disk, disk.uri)[1:]:
        target = os.readlink(row["uri"])
        assert row == {"uri": row["uri"], **unknown}
        with pytest.raises(NotFound, match=f"{row['uri']}: a link to {target}, which is not there"):
            disk.stores.read(row["uri"])


@pytest.mark.parametrize("name", ["a.tar", "b.parquet"])
def test_a_tar_or_table_that_is_a_broken_link_is_listed(disk: Folder, name: str) -> None:
    (Path(disk.uri) / name).symlink_to("gone")
    assert below(disk, disk.uri) == [name]
    with pytest.raises(NotFound, match="a link to gone"), disk.stores.stream(disk.at(name), Meta()) as file:
        file.read()


def test_an_input_that_is_a_broken_link_is_refused_with_its_target(disk: Folder) -> None:
    (Path(disk.uri) / "set").symlink_to("/mnt/gone")
    with pytest.raises(InputError, match="set: a link to /mnt/gone, which is not there"):
        uris(disk, disk.at("set"))


def test_folders_that_link_to_each_other_are_refused(disk: Folder) -> None:
    root = Path(disk.uri)
    for one in range(9):
        disk.put(f"{one}/x.jpg", b"1")
        for other in range(9):
            (root / f"{one}/to{other}").symlink_to(f"../{other}")
    with pytest.raises(InputError, match="more than 1,000 links lead into one folder"):
        uris(disk, disk.uri)


# Names in other encodings


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [("猫.jpg", "cp932", "'猫.jpg' in Shift-JIS"), ("写真/猫.jpg", "cp932", "'写真' in Shift-JIS"),
     ("ä" * 200 + ".jpg", "latin-1", "in Windows-1252"), ("\x81.jpg", "latin-1", "'ü.jpg' in DOS")],
    ids=["file", "folder", "long", "dos"],
)  # fmt: skip
def test_a_name_in_another_encoding_is_reported_with_its_decodings(
    disk: Folder, name: str, code: str, message: str
) -> None:
    path = Path(os.fsdecode(os.fsencode(disk.uri) + b"/" + name.encode(code)))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"1")
    disk.put("good.jpg", b"1")
    _, uri = sorted(uris(disk, disk.uri), key=lambda uri: uri.endswith("good.jpg"), reverse=True)
    with pytest.raises(BadPath) as caught:
        disk.stores.read(uri)
    assert message in str(caught.value) and "is not UTF-8" in str(caught.value) and "convmv" in str(caught.value)


@pytest.mark.parametrize("name", ["back\\slash.jpg", "\\xe4.jpg", "new\nline.jpg", "bell\x07.jpg"])
def test_unusual_utf8_names_are_read(disk: Folder, name: str) -> None:
    disk.put(name, b"odd")
    (uri,) = uris(disk, disk.uri)
    assert disk.stores.read(uri)[0] == b"odd"


@pytest.mark.parametrize("end", ["", "/*.jpg"])
def test_an_input_whose_path_is_not_utf8_is_refused(disk: Folder, end: str) -> None:
    folder = os.fsdecode(os.fsencode(disk.uri) + b"/caf\xe9")
    os.mkdir(folder)
    with pytest.raises(InputError, match=r"caf\\xe9.* is not UTF-8"):
        recognise(disk.stores, [folder + end], SourceConfig())


def test_a_missing_folder_is_empty(place: Folder) -> None:
    assert uris(place, f"{place.uri}/nothing", allow_empty=True) == []
    assert kind(place, f"{place.uri}/nothing", allow_empty=True) == "folder"


def test_a_whole_bucket_is_a_folder(s3: Any) -> None:
    s3.bucket("images").put("whole/x.jpg", b"1")
    place = Folder(s3.stores(), "s3://images")
    assert "s3://images/whole/x.jpg" in uris(place, "s3://images")
    assert "s3a://images/whole/x.jpg" in uris(place, "s3a://images/whole")


def test_a_missing_bucket_and_a_wrong_key_are_errors(s3: Any) -> None:
    place = Folder(s3.stores(), "s3://images")
    with pytest.raises(InputError, match="missing-bucket"):
        uris(place, "s3://missing-bucket/x")
    wrong = Stores(StorageConfig(), {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong"})
    with pytest.raises(Forbidden):
        recognise(wrong, ["s3://images/x"], SourceConfig())


# Globs


@pytest.mark.parametrize(
    "glob, expected",
    [
        ("*.jpg", ["a.jpg", "b.jpg"]),
        ("?.jpg", ["a.jpg", "b.jpg"]),
        ("[ac].jpg", ["a.jpg"]),
        ("[!a].jpg", ["b.jpg"]),
        ("*", ["a.jpg", "b.jpg", "c.png"]),
        ("*/*.jpg", ["x/a.jpg", "y/a.jpg"]),
        ("x/*", ["x/a.jpg", "x/b.png"]),
        ("**/a.jpg", ["a.jpg", "x/a.jpg", "x/x/a.jpg", "y/a.jpg"]),
        ("**", ["a.jpg", "b.jpg", "c.png", "x/a.jpg", "x/b.png", "x/x/a.jpg", "y/a.jpg"]),
        ("x/**/a.jpg", ["x/a.jpg", "x/x/a.jpg"]),
        ("*.txt", []),
        ("z*/*", []),
        ("*.JPG", []),
        ("[.jpg", []),
    ],
)
def test_a_glob_lists_exactly_its_matches(place: Folder, glob: str, expected: list[str]) -> None:
    for name in ("a.jpg", "b.jpg", "c.png", "n.txt", "x/a.jpg", "x/b.png", "x/x/a.jpg", "y/a.jpg"):
        place.put(name, b"1")
    assert below(place, f"{place.uri}/{glob}") == expected


def test_a_glob_matches_the_whole_path(s3: Any) -> None:
    place = Folder(s3.stores(), f"s3://images/{uuid.uuid4().hex}")
    name = place.uri.rpartition("/")[2]
    place.put("a.jpg", b"1")
    place.put(f"deep/{name}/b.jpg", b"1")
    assert below(place, f"{place.uri}/*.jpg") == ["a.jpg"]


def test_candidate_rules_apply_within_a_glob(disk: Folder) -> None:
    for name in ("a.jpg", ".b.jpg", "c.txt"):
        disk.put(name, b"")
    assert below(disk, f"{disk.uri}/*") == ["a.jpg"]
    assert ignored(disk, f"{disk.uri}/*") == 2
    assert below(disk, f"{disk.uri}/*.txt", suffixes="*") == ["c.txt"]


def test_a_folder_or_object_whose_name_looks_like_a_glob_is_itself(place: Folder) -> None:
    for name in ("br [1]/a.jpg", "br 1/b.jpg", "st*r.jpg", "stuvr.jpg"):
        place.put(name, b"1")
    assert below(place, f"{place.uri}/br [1]") == ["br [1]/a.jpg"]
    assert below(place, f"{place.uri}/st*r.jpg") == ["st*r.jpg"]


@pytest.mark.parametrize("uri", ["a/**.jpg", "[z-a].jpg"])
def test_an_invalid_glob_is_an_input_error(disk: Folder, uri: str) -> None:
    with pytest.raises(InputError, match="not a valid glob"):
        recognise(disk.stores, [f"{disk.uri}/{uri}"], SourceConfig())


def test_a_glob_in_a_bucket_name_is_an_input_error() -> None:
    with pytest.raises(InputError, match="bucket"):
        recognise(Stores(StorageConfig(retries=0), {}), ["memory://*/a.jpg"], SourceConfig())


# Single objects and other stores


@pytest.mark.parametrize("name", ["a.jpg", ".hidden.jpg", "notes.xyz", "none", "br[1].jpg", "a b#%20.jpg"])
def test_a_single_object_may_have_any_name(place: Folder, name: str) -> None:
    place.put(name, b"123")
    (row,) = rows(place, place.at(name))
    _, meta = place.stores.read(place.at(name))
    assert row == {
        "uri": place.at(name),
        "size": 3,
        "etag": meta.etag,
        "last_modified": meta.last_modified,
        "container": None,
    }
    assert kind(place, place.at(name)) == "object"


def test_an_image_has_the_same_uri_in_every_kind_of_input(place: Folder) -> None:
    place.put("x/a b.jpg", b"1")
    place.put("x/list.csv", b"uri\na b.jpg\n./a b.jpg\n../x/a b.jpg\n" + place.at("x/a b.jpg").encode() + b"\n")
    inputs = [place.uri, f"{place.uri}/", f"{place.uri}/*/*.jpg", place.at("x/a b.jpg"), place.at("x/list.csv")]
    assert set(uris(place, *inputs)) == {place.at("x/a b.jpg")}
    assert len(uris(place, *inputs)) == 8


def test_local_inputs_may_be_relative_or_have_a_scheme(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.put("p/a.jpg", b"1")
    monkeypatch.chdir(disk.uri)
    for uri in ("p", "./p", "p/", f"file://{disk.uri}/p", "p/../p", "p/*.jpg", "p/a.jpg"):
        assert uris(disk, uri) == [f"{disk.uri}/p/a.jpg"]


def test_fsspec_stores_keep_the_spelling_of_uris() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    place = Folder(Stores(StorageConfig(), {}), root)
    for name in ("a.jpg", "b/c.png", "n.txt"):
        place.put(name, b"1")
    assert below(place, root) == ["a.jpg", "b/c.png"]
    assert below(place, f"{root}/*.jpg") == ["a.jpg"]
    assert below(place, f"{root}/b/c.png") == ["b/c.png"]
    assert [place.stores.read(uri)[0] for uri in uris(place, root)] == [b"1", b"1"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(disk: Folder) -> Iterator[str]:
    """Serve the folder over HTTP."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=disk.uri))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_images_on_a_web_server_are_read_from_objects_and_manifests(disk: Folder, web: str) -> None:
    disk = Folder(Stores(StorageConfig(retries=0, allow_private_hosts=True), {}), disk.uri)
    disk.put("a.jpg", b"123")
    disk.put("b.jpg", b"1")
    disk.put("list.csv", f"uri\na.jpg\n{web}/b.jpg\n".encode())
    assert uris(disk, f"{web}/a.jpg") == [f"{web}/a.jpg"]
    for absent in (f"{web}/no.jpg", f"{web}/*.jpg"):  # no site is crawled for a URL that is mistyped
        with pytest.raises(InputError, match="not folders"):
            uris(disk, absent)
    assert uris(disk, f"{web}/list.csv") == [f"{web}/a.jpg", f"{web}/b.jpg"]
    assert disk.stores.read(f"{web}/a.jpg")[0] == b"123"
    with pytest.raises(NotFound):
        disk.stores.read(f"{web}/no.jpg")


def test_several_inputs_are_listed_in_their_order(disk: Folder) -> None:
    for name in ("b/1.jpg", "a/2.jpg"):
        disk.put(name, b"")
    assert below(disk, disk.at("b"), disk.at("a")) == ["a/2.jpg", "b/1.jpg"]
    assert uris(disk, disk.at("b"), disk.at("a")) == [disk.at("b/1.jpg"), disk.at("a/2.jpg")]


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "there is no input"),
        ([""], "empty"),
        (["  "], "empty"),
        (["simplecache::s3://b/x"], "chained"),
        (["s3://"], "names no bucket"),
        (["foo://b/x"], "foo"),
    ],
)
def test_invalid_inputs_are_usage_errors(disk: Folder, inputs: list[str], message: str) -> None:
    with pytest.raises(ImgbatchError, match=message) as caught:
        recognise(disk.stores, inputs, SourceConfig())
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["x.zip", "x.TAR.BZ2", "x.tar.zst"])
def test_an_unsupported_archive_is_refused(disk: Folder, name: str) -> None:
    disk.put(name, b"1")
    with pytest.raises(InputError, match="of archives only"):
        recognise(disk.stores, [disk.at(name)], SourceConfig())


# Manifests

Write = Callable[[list[dict[str, Any]]], bytes]


def as_csv(table: list[dict[str, Any]]) -> bytes:
    def cell(value: Any) -> str:
        return "" if value is None else '"' + str(value).replace('"', '""') + '"'

    lines = [",".join(table[0]), *(",".join(map(cell, row.values())) for row in table)]
    return "\n".join(lines).encode() + b"\n"


def as_jsonl(table: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in table)


def as_parquet(table: list[dict[str, Any]] | pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), sink)
    return sink.getvalue().to_pybytes()


KINDS: dict[str, Write] = {"csv": as_csv, "jsonl": as_jsonl, "ndjson": as_jsonl, "parquet": as_parquet, "CSV": as_csv}


@pytest.mark.parametrize("suffix", KINDS)
def test_a_manifest_lists_its_uris_in_order_with_size_and_etag(place: Folder, suffix: str) -> None:
    names = [
        "a.jpg",
        "a b%20#.jpg",
        "ü/日本.png",
        'quo"te,.jpg',
        "new\nline.jpg",
        "sub/../b.jpg",
        "/abs.jpg",
        "s3://o/c",
    ]
    table = [{"uri": name, "size": number, "etag": f'"e{number}"', "split": f"s{number}", "n": number}
             for number, name in enumerate(names)]  # fmt: skip
    place.put(f"lists/m.{suffix}", KINDS[suffix](table))
    result = rows(place, place.at(f"lists/m.{suffix}"), schemes="s3,file")
    base = place.at("lists")
    assert [row["uri"] for row in result] == [
        *(f"{base}/{name}" for name in names[:5]), f"{base}/b.jpg", "/abs.jpg", "s3://o/c",
    ]  # fmt: skip
    assert [row["size"] for row in result] == list(range(8))
    assert [row["etag"] for row in result] == [f"e{number}" for number in range(8)]
    assert [row["input_split"] for row in result] == [f"s{number}" for number in range(8)]
    assert [row["input_n"] for row in result] == [n if suffix == "parquet" else str(n) for n in range(8)]
    assert {row["last_modified"] for row in result} == {None}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_rows_without_a_uri_are_ignored_and_counted(disk: Folder, suffix: str) -> None:
    table = [{"uri": uri, "x": "1"} for uri in ("a.jpg", None, "", "b.jpg")]
    disk.put(f"m.{suffix}", KINDS[suffix](table))
    assert below(disk, disk.at(f"m.{suffix}")) == ["a.jpg", "b.jpg"]
    assert ignored(disk, disk.at(f"m.{suffix}")) == 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_missing_values_of_a_manifest_are_null(disk: Folder, suffix: str) -> None:
    table = [{"uri": "a.jpg", "size": 1, "etag": "x"}, {"uri": "b.jpg", "size": None, "etag": None},
             {"uri": "c.jpg", "size": -1, "etag": ""}]  # fmt: skip
    disk.put(f"m.{suffix}", KINDS[suffix](table))
    result = [(row["size"], row["etag"]) for row in rows(disk, disk.at(f"m.{suffix}"))]
    assert result == [(1, "x"), (None, None), (None, None)]
    disk.put(f"n.{suffix}", KINDS[suffix]([{"uri": "a.jpg"}]))
    assert [(row["size"], row["etag"]) for row in rows(disk, disk.at(f"n.{suffix}"))] == [(None, None)]


def test_sizes_may_be_floats(disk: Folder) -> None:
    sizes = pa.array([1.0, float("nan"), None, 3_000_000_000.0])
    disk.put("m.parquet", as_parquet(pa.table({"uri": ["a", "b", "c", "d"], "size": sizes})))
    disk.put("m.csv", b"uri,size\na,1.0\nb,nan\nc,\nd, 3000000000\n")
    disk.put(
        "m.jsonl", b'{"uri":"a","size":1.0}\n{"uri":"b"}\n{"uri":"c","size":null}\n{"uri":"d","size":3000000000}\n'
    )
    for name in ("m.parquet", "m.csv", "m.jsonl"):
        assert [row["size"] for row in rows(disk, disk.at(name))] == [1, None, None, 3_000_000_000]


@pytest.mark.parametrize("size", ["many", "1.5", "99999999999999999999", "ten"])
def test_an_invalid_size_is_an_input_error(disk: Folder, size: str) -> None:
    disk.put("m.csv", f"uri,size\na,{size}\n".encode())
    with pytest.raises(InputError, match=r"m\.csv: a value in column 'size'"):
        rows(disk, disk.at("m.csv"))


def test_large_numbers_are_carried_as_they_are_written(disk: Folder) -> None:
    huge = 123456789012345678901234567890
    disk.put("m.csv", f"uri,id\na,{huge}\nb,007\nc,1e3\n".encode())
    disk.put("m.jsonl", f'{{"uri":"a","id":{huge}}}\n{{"uri":"b","id":"007"}}\n{{"uri":"c","id":[1]}}\n'.encode())
    assert [row["input_id"] for row in rows(disk, disk.at("m.csv"))] == [str(huge), "007", "1e3"]
    assert [row["input_id"] for row in rows(disk, disk.at("m.jsonl"))] == [str(huge), "007", "[1]"]


def test_csv_text_stays_text(disk: Folder) -> None:
    disk.put("m.csv", b'uri,x\na,NA\nb,null\nc,""\nd,true\ne,2026-01-01\nf," x "\n')
    assert [row["input_x"] for row in rows(disk, disk.at("m.csv"))] == ["NA", "null", "", "true", "2026-01-01", " x "]
    disk.put("n.csv", b"uri\nNA\nnull\nnan\n123\n")
    assert below(disk, disk.at("n.csv")) == ["123", "NA", "nan", "null"]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_with_other_line_ends_and_encodings_is_read(disk: Folder, ending: bytes, mark: bytes) -> None:
    disk.put("m.csv", mark + ending.join([b'"uri",split', b'"a ""b"".jpg",x', b"", b"c.jpg,y"]))
    assert below(disk, disk.at("m.csv")) == ['a "b".jpg', "c.jpg"]
    disk.put("m.jsonl", mark + ending.join([b'{"uri": "a.jpg"}', b"", b'{"uri": "b.jpg"}']))
    assert below(disk, disk.at("m.jsonl")) == ["a.jpg", "b.jpg"]


def test_quoted_newlines_are_part_of_a_value_also_across_blocks(disk: Folder) -> None:
    filler = "x" * 200 + "\n" + "y" * 200
    lines = "".join(f'"i\n{number}.jpg","{filler}"\n' for number in range(8_000))
    disk.put("m.csv", f"uri,note\n{lines}".encode())
    result = rows(disk, disk.at("m.csv"))
    assert [row["uri"] for row in result] == [f"{disk.uri}/i\n{number}.jpg" for number in range(8_000)]
    assert {row["input_note"] for row in result} == {filler}


def test_a_manifest_larger_than_a_block_has_every_row_once(disk: Folder) -> None:
    table = [{"uri": f"{number:06d}.jpg", "x": str(number)} for number in range(25_001)]
    for suffix in ("csv", "jsonl", "parquet"):
        disk.put(f"m.{suffix}", KINDS[suffix](table))
        result = rows(disk, disk.at(f"m.{suffix}"))
        assert [row["uri"] for row in result] == [f"{disk.uri}/{row['uri']}" for row in table]
        assert [row["input_x"] for row in result] == [row["x"] for row in table]


def test_a_uri_that_is_named_twice_is_listed_twice(disk: Folder) -> None:
    disk.put("m.csv", b"uri\na.jpg\na.jpg\n./a.jpg\n")
    assert below(disk, disk.at("m.csv")) == ["a.jpg"] * 3


def test_columns_of_parquet_keep_their_types_without_pixels(disk: Folder) -> None:
    table = pa.table({
        "uri": pa.array(["a", "b"]).dictionary_encode(),
        "label": pa.array(["x", None]).dictionary_encode(),
        "n": pa.array([1, None], pa.int16()),
        "tags": pa.array([["p"], None], pa.list_(pa.string())),
        "image": pa.array([{"bytes": b"1", "path": "p"}, None]),
        "raw": pa.array([b"1", b"2"]),
        "nothing": pa.nulls(2),
    })  # fmt: skip
    disk.put("m.parquet", as_parquet(table))
    (source,) = recognise(disk.stores, [disk.at("m.parquet")], SourceConfig())
    assert carried_fields(next(source.list_images()).batch.schema) == pa.schema([
        ("input_label", pa.string()), ("input_n", pa.int16()), ("input_tags", pa.list_(pa.string())),
        ("input_raw", pa.binary()), ("input_nothing", pa.null()),
    ])  # fmt: skip
    assert rows(disk, disk.at("m.parquet"))[0]["input_tags"] == ["p"]


def test_columns_of_several_inputs_are_merged(disk: Folder) -> None:
    disk.put("p/z.jpg", b"1")
    disk.put("m.csv", b"uri,x\na,1\n")
    disk.put("n.parquet", as_parquet([{"uri": "b", "y": 2}]))
    result = rows(disk, disk.at("m.csv"), disk.at("n.parquet"), disk.at("p"))
    assert [(row["input_x"], row["input_y"]) for row in result] == [("1", None), (None, 2), (None, None)]


def test_incompatible_columns_are_an_input_error(disk: Folder) -> None:
    disk.put("m.csv", b"uri,x\na,1\n")
    disk.put("n.parquet", as_parquet([{"uri": "b", "x": [2]}]))
    with pytest.raises(InputError, match="column 'x' is string and list"):
        rows(disk, disk.at("m.csv"), disk.at("n.parquet"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.csv", b"url,size\na,1\n", "no column 'uri'; it has: url, size"),
        ("m.csv", b"id;size\na;1\n", "no column 'uri'; it has: id, size"),
        ("m.csv", b"uri,uri\na,b\n", "more than one column 'uri'"),
        ("m.csv", b"uri,x,x\na,b,c\n", "more than one column 'x'"),
        ("m.csv", b"uri,size\na\n", "cannot be read as CSV: line 2: 1 values, but the header has 2"),
        ("m.csv", b"uri\n\xff\xfe\n", "cannot be read as CSV: line 2 is not UTF-8"),
        ("m.csv", b'uri,x\na,"open\nb,x\nc,x\n', "a quote is not closed"),
        ("m.jsonl", b'{"url": 1}\n', "no column 'uri'; it has: url"),
        ("m.jsonl", b"{}\n", "no column 'uri'; it has: none"),
        ("m.jsonl", b"not json\n", "cannot be read as JSON Lines: line 1"),
        ("m.jsonl", b"[1]\n", "line 1 is not an object"),
        ("m.jsonl", b'{"uri": "a"\n', "cannot be read as JSON Lines: line 1"),
        ("m.jsonl", b'{"uri": "\xff"}\n', "line 1: the value of 'uri' is not Unicode"),
        ("m.jsonl", b'{"uri": "a", "n": ' + b"9" * 5000 + b"}\n", "cannot be read as JSON Lines: line 1"),
        ("m.jsonl", b'{"uri": "\\ud800"}\n', "line 1: the value of 'uri' is not Unicode"),
        ("m.parquet", b"uri\na\n", "cannot be read as [Pp]arquet"),
        ("m.parquet", as_parquet([{"url": "a"}]), "no column 'uri'"),
        ("m.parquet", as_parquet([{"url": "a"}])[:-9], "cannot be read as [Pp]arquet"),
        ("m.parquet", as_parquet([{"uri": {"x": 1}}]), "m.parquet"),
        ("m.parquet", as_parquet(pa.table({"uri": [b"\xff"]})), "m.parquet"),
    ],
)
def test_a_damaged_manifest_is_an_input_error(disk: Folder, name: str, content: bytes, message: str) -> None:
    disk.put(name, content)
    with pytest.raises(InputError, match=message):
        rows(disk, disk.at(name))


@pytest.mark.parametrize(
    "name, content",
    [
        ("m.csv", b""),
        ("m.csv", b"uri\n"),
        ("m.jsonl", b""),
        ("m.jsonl", b"\n\n"),
        ("m.parquet", as_parquet(pa.table({"uri": pa.array([], pa.string())}))),
    ],
)
def test_an_empty_manifest_lists_nothing(disk: Folder, name: str, content: bytes) -> None:
    disk.put(name, content)
    assert rows(disk, disk.at(name)) == []


def test_a_manifest_of_another_name_is_read_with_source_format(disk: Folder) -> None:
    disk.put("list.txt", b'{"uri": "a.jpg"}\n')
    disk.put("list.csv", b"uri\nb.jpg\n")
    with pytest.raises(InputError, match=r"list\.txt has the suffix of neither.*lists are \.csv"):
        kind(disk, disk.at("list.txt"))
    assert kind(disk, disk.at("list.txt"), format="objects") == "object"
    assert below(disk, disk.at("list.txt"), format="manifest") == ["a.jpg"]
    assert kind(disk, disk.at("list.csv"), format="objects") == "object"
    with pytest.raises(InputError, match="does not exist"):
        recognise(disk.stores, [disk.at("none.csv")], SourceConfig(format="manifest"))


def test_one_empty_input_among_several_is_refused(disk: Folder) -> None:
    disk.put("2024/1.jpg", b"")
    disk.put("2052/notes.txt", b"")
    sources = recognise(disk.stores, [disk.at("2024"), disk.at("2052")], SourceConfig())
    with pytest.raises(InputError, match="2052"):
        list(list_all(sources, allow_empty=False))
    assert sum(len(batch.batch) for batch in list_all(sources, allow_empty=True)) == 1


def test_ranges_are_expanded(place: Folder) -> None:
    for number in (8, 9, 10, 11):
        place.put(f"s-{number:03d}.jpg", b"1")
    assert uris(place, place.at("s-{008..010}.jpg")) == [place.at(f"s-{number:03d}.jpg") for number in (8, 9, 10)]


def test_a_missing_name_of_a_range_is_reported(place: Folder) -> None:
    place.put("s-1.tar", b"1")
    with pytest.raises(InputError, match=r"s-2\.tar"):
        uris(place, place.at("s-{1..2}.tar"))


def refusal(place: Folder, *inputs: str, **config: Any) -> str:
    """Return the message for inputs without an image."""
    with pytest.raises(InputError) as refused:
        sources = recognise(place.stores, inputs, SourceConfig(**config))
        counts = Counts()
        with candidates(sources, allow_empty=False) as batches:
            for each in batches:
                counts.listed, counts.ignored = counts.listed + len(each.batch), counts.ignored + each.ignored
                counts.ignored_example = counts.ignored_example or each.example
        assert not counts.listed
        raise InputError(no_image(counts, sources))
    return str(refused.value)


@pytest.mark.parametrize("name", ["elsewhere", "list.csv", "a.tar", "elsewhere/deep/er"])
def test_a_missing_local_input_is_reported(disk: Folder, name: str) -> None:
    disk.put("photos/a.jpg", b"x")
    for format in ("auto", "objects", "manifest"):
        assert f"{disk.at(name)} does not exist" in refusal(disk, disk.at(name), format=format)
    assert f"{disk.at(name)} does not exist" in refusal(disk, disk.at("photos"), disk.at(name))
    assert uris(disk, disk.at(name), allow_empty=True) == [], "there may be none of a day"


def test_a_missing_path_is_reported_with_a_near_miss(disk: Folder) -> None:
    disk.put("photos/a.jpg", b"x")
    assert f"; did you mean {disk.at('photos')}?" in refusal(disk, disk.at("phtos"))
    assert f"of its path only {disk.at('photos')} exists" in refusal(disk, disk.at("photos/deep/er"))
    assert f"{disk.at('phtos')} does not exist" in refusal(disk, disk.at("phtos/*.jpg"))


def test_an_input_without_objects_and_one_without_images_have_different_messages(place: Folder) -> None:
    place.put("texts/notes.txt", b"x")
    if place.uri.startswith("s3:"):  # where nothing exists but objects
        message = refusal(place, place.at("phtos"))
        assert message == f"no image in {place.at('phtos')}: there is no object below it; check the name"
    assert "no object matches it" in refusal(place, place.at("texts/*.jpg"))
    message = refusal(place, place.at("texts"))
    assert f"1 other object ignored, such as {place.at('texts/notes.txt')}" in message


def test_a_missing_bucket_is_named(s3: Any) -> None:
    place = Folder(s3.stores(retries=0), "s3://images-that-nobody-has")
    assert "s3://images-that-nobody-has" in refusal(place, place.at("photos"))


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl", "list.json", "list.tsv", "images.parquet", "list.txt"])
def test_other_content_in_place_of_a_list_is_named(place: Folder, name: str) -> None:
    format = "manifest" if name.endswith(".txt") else "auto"
    for content, message in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
            "a Git LFS pointer, not the file itself",
        ),
        (b"<!DOCTYPE html><html>Please log in", "an HTML page"),
        (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
            "an XML error document, as stores return it (Acc",
        ),
    ):
        place.put(name, content)
        with pytest.raises(InputError) as refused:
            sources = recognise(place.stores, [place.at(name)], SourceConfig(format=format))
            list(list_all(sources))
        assert f"{place.at(name)} is not a " in str(refused.value) and message in str(refused.value)


def test_a_value_of_megabytes_is_read(disk: Folder) -> None:
    disk.put("list.csv", b"uri,text\n1.jpg," + b"x" * (3 << 20) + b"\n2.jpg,short\n")
    assert [len(row["input_text"]) for row in rows(disk, disk.at("list.csv"))] == [3 << 20, 5]

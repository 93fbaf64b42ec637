"""Images in tars: read as a stream, resumed where a run ended, one row for each."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import Config, FetchConfig, SourceConfig, StorageConfig
from imgbatch.config.worker import WorkerConfig
from imgbatch.engine import units
from imgbatch.errors import AuditError, Conflict, InputError, StoreError, Unreachable
from imgbatch.inference.messages import received
from imgbatch.inference.worker import LabelImages, Work
from imgbatch.ledger import audit
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Counts, Listing
from imgbatch.ledger.tar_cursor import TarCursor
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.pipeline.arrivals import Arrivals
from imgbatch.pipeline.committer import Committer
from imgbatch.pipeline.run_statistics import RunStatistics
from imgbatch.pipeline.store_health import StoreHealth
from imgbatch.rejects import Refusal
from imgbatch.sources.recognise import list_all, recognise
from imgbatch.sources.tar_reader import End, Member, TarReader, key_of
from imgbatch.storage.local import LocalStore
from imgbatch.storage.stores import Folder, Meta, Stores
from tests.unit.pictures import encode
from tests.unit.test_classify import MeanColour

COLOURS = ("red", "green", "blue")
Entry = tuple[str, bytes] | tarfile.TarInfo


def packed(*entries: Entry, **options: Any) -> bytes:
    """Return a tar of (name, content) pairs and of headers without content."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", **options) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return sink.getvalue()


def picture(number: int) -> bytes:
    """Return an image whose label is COLOURS[number % 3]."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[..., number % 3] = 255
    return encode(pixels, "PNG")


def pictures(first: int, count: int) -> list[Entry]:
    return [(f"{number:04d}.png", picture(number)) for number in range(first, first + count)]


def read(
    place: Path, data: bytes, *, name: str = "a.tar", resume_offset: int = 0, last_offset: int = -1, **more: Any
) -> list[Any]:
    """Return the members and the end of a tar with these bytes."""
    (place / name).write_bytes(data)
    tar = TarReader(
        Stores(StorageConfig(retries=0), {}), str(place / name), Meta(len(data)), "images", more.pop("most", 1 << 20)
    )
    return list(tar.members(resume_offset, last_offset))


def whole(read_members: list[Any]) -> tuple[list[Member], End]:
    members, (end,) = read_members[:-1], read_members[-1:]
    assert isinstance(end, End) and all(isinstance(member, Member) for member in members)
    return members, end


SHARD: list[Entry] = [
    ("000.cls", b"7\n"), ("000.jpg", b"zero"), ("000.json", b'{"a": 1}'), ("README.md", b"no image"),
    ("b/001.left.jpg", b"left"), ("b/001.right.jpg", b"right"), ("b/001.txt", "grün".encode()), ("002.png", b"two"),
    (".hidden.jpg", b"x"), ("nosuffix", b"bare"), ("x" * 200 + ".jpg", b"long"),
]  # fmt: skip


def test_members_have_their_sidecars(tmp_path: Path) -> None:
    members, end = whole(read(tmp_path, packed(*SHARD)))
    assert [(member.name, member.content, dict(member.sidecars)) for member in members] == [
        ("000.jpg", b"zero", {"input_cls": "7", "input_json": '{"a": 1}'}),
        ("b/001.left.jpg", b"left", {"input_txt": "grün"}),
        ("b/001.right.jpg", b"right", {"input_txt": "grün"}),
        ("002.png", b"two", {}),
        ("nosuffix", b"bare", {}),
        ("x" * 200 + ".jpg", b"long", {}),
    ]
    assert (end.ignored, end.damage) == (2, None)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_reading_resumes_after_any_member(tmp_path: Path, format: int, name: str) -> None:
    entries = SHARD if format != tarfile.USTAR_FORMAT else SHARD[:-1]
    data = packed(*entries, format=format)
    data = gzip.compress(data) if name.endswith("gz") else data
    members, end = whole(read(tmp_path, data, name=name))
    for at, member in enumerate(members):
        rest, again = whole(
            read(tmp_path, data, name=name, resume_offset=member.resume_offset, last_offset=member.offset)
        )
        assert rest == members[at + 1 :]
        assert (again.offset, again.damage) == (end.offset, None)


def test_members_that_are_not_files_are_not_read(tmp_path: Path) -> None:
    def header(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    data = packed(
        header("folder.jpg", tarfile.DIRTYPE), header("soft.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        header("hard.jpg", tarfile.LNKTYPE, "a.jpg"), header("pipe.jpg", tarfile.FIFOTYPE), ("large.jpg", b"x" * 100),
        ("../../up.jpg", b"up"), ("/etc/abs.jpg", b"abs"),
    )  # fmt: skip
    members, end = whole(read(tmp_path, data, most=50))
    assert [(member.name, member.content.reason if isinstance(member.content, Refusal) else member.content)
            for member in members] == [
        ("soft.jpg", "unsupported"), ("hard.jpg", "unsupported"), ("pipe.jpg", "unsupported"), ("large.jpg", "too_large"),
        ("../../up.jpg", b"up"), ("/etc/abs.jpg", b"abs"),
    ]  # fmt: skip
    assert end.damage is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]  # nothing is ever unpacked


def test_a_wrong_size_in_a_header_is_damage(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 1 << 50
    data = packed(("a.jpg", b"a"))[:1024] + info.tobuf(tarfile.GNU_FORMAT) + b"x" * 512
    members, end = whole(read(tmp_path, data))
    assert [member.name for member in members] == ["a.jpg", "huge.jpg"]
    assert isinstance(members[1].content, Refusal) and members[1].content.reason == "too_large"
    assert end.damage is not None


@pytest.mark.parametrize(
    "more",
    [
        {"GNU.sparse.map": "abc"},
        {"GNU.sparse.size": "abc"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    ],
    ids=repr,
)
def test_an_invalid_header_is_damage(tmp_path: Path, more: dict[str, str]) -> None:
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = more
    data = packed(("a.jpg", b"a"))[:1024] + info.tobuf(tarfile.PAX_FORMAT) + b"x" * 2048
    members, end = whole(read(tmp_path, data))
    assert members[0].name == "a.jpg" and end.damage is not None and end.damage.reason in ("corrupt", "truncated")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_truncated_tar_yields_the_members_before_the_damage(tmp_path: Path, name: str) -> None:
    entries = [(f"{number}.jpg", bytes([number]) * 700) for number in range(4)]
    data = packed(*entries)
    data = data if name == "a.tar" else gzip.compress(data)
    for cut in range(0, len(data) - 1, 97):
        members, end = whole(read(tmp_path, data[:cut], name=name))
        expected = [(name, content) for name, content in entries if isinstance(content, bytes)][: len(members)]
        assert [(member.name, member.content) for member in members] == expected
        is_damaged = (
            cut < 4 * 1536 + 512 if name == "a.tar" else True
        )  # behind the first block of zeros nothing is missed
        assert (end.damage is not None) == is_damaged, cut
        assert end.damage is None or end.damage.reason in ("truncated", "corrupt")
        assert name != "a.tar" or len(members) >= min(4, cut // 1536)


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    data = bytearray(packed(*((f"{number}.jpg", b"x") for number in range(4))))
    data[2048 : 2048 + 100] = b"\xff" * 100
    members, end = whole(read(tmp_path, bytes(data)))
    assert [member.name for member in members] == ["0.jpg", "1.jpg"]
    assert end.damage is not None and end.damage.reason == "corrupt"


@pytest.mark.parametrize("data", [b"", b"no tar", b"\x1f\x8b no gzip", np.random.default_rng(0).bytes(5000)])
@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_an_object_that_is_not_a_tar_is_one_reject(tmp_path: Path, data: bytes, name: str) -> None:
    members, end = whole(read(tmp_path, data, name=name))
    assert members == [] and end.damage is not None


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "A.TAR", "shard"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_bytes_decide_whether_a_tar_is_compressed(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    members, end = whole(read(tmp_path, pack(packed(*SHARD)), name=name))
    assert [member.name for member in members] == [
        "000.jpg", "b/001.left.jpg", "b/001.right.jpg", "002.png", "nosuffix", "x" * 200 + ".jpg"
    ]  # fmt: skip
    assert (end.ignored, end.damage) == (2, None)
    for at, member in enumerate(members):
        rest, again = whole(
            read(
                tmp_path, pack(packed(*SHARD)), name=name, resume_offset=member.resume_offset, last_offset=member.offset
            )
        )
        assert rest == members[at + 1 :] and (again.offset, again.damage) == (end.offset, None)


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (
            bz2.compress(packed(*SHARD)),
            "unsupported",
            "but bzip2 data; of archives only tars are read, plain or compressed",
        ),
        (lzma.compress(packed(*SHARD)), "unsupported", "but xz data"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "unsupported", "but zstd data"),
        (b"PK\x03\x04" + bytes(600), "unsupported", "but a zip archive"),
        (gzip.compress(gzip.compress(packed(*SHARD))), "unsupported", "but gzip data"),
        (gzip.compress(b"PK\x03\x04" + bytes(600)), "unsupported", "but a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "corrupt", "a Git LFS pointer, not the file"),
        (b"<!DOCTYPE html><html>Please log in", "corrupt", "but an HTML page"),
        (b"<Error><Code>AccessDenied</Code></Error>", "corrupt", "(AccessDenied)"),
    ],
)
@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_other_content_in_place_of_a_tar_is_named(
    tmp_path: Path, data: bytes, reason: str, message: str, name: str
) -> None:
    members, end = whole(read(tmp_path, data, name=name))
    assert members == [] and end.damage is not None
    assert end.damage.reason == reason and message in end.damage.message and "damaged" not in end.damage.message


def test_a_damaged_tar_is_not_taken_for_another_kind(tmp_path: Path) -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        _, end = whole(read(tmp_path, packed(("a.jpg", b"x" * 600), format=format)[:700]))
        assert end.damage is not None and "the tar is damaged" in end.damage.message


@pytest.mark.parametrize(("name", "pack"), [("a.tar", gzip.compress), ("a.tar.gz", bytes)])
def test_a_run_resumes_within_a_tar_with_a_misleading_suffix(
    run: Run, name: str, pack: Callable[[bytes], bytes]
) -> None:
    run.put(name, pack(packed(*pictures(0, 30))))
    run(limit=10)
    assert run.rows() == expected(name, 0, 10)
    assert run().labelled == 30
    assert run.rows() == expected(name, 0, 30) and run.rows("rejects") == {}


def test_names_that_are_not_utf8_stay_distinct(tmp_path: Path) -> None:
    data = packed(("a\udcff.jpg", b"1"), ("a\udcfe.jpg", b"2"), format=tarfile.GNU_FORMAT)
    members, _ = whole(read(tmp_path, data))
    assert len({member.name for member in members}) == 2
    assert pa.array([member.name for member in members]).to_pylist() == [member.name for member in members]


def test_members_of_another_encoding_keep_their_images(tmp_path: Path) -> None:
    for encoding, name in (("latin-1", "caf\xe9/x.jpg"), ("cp932", "猫/x.jpg"), ("utf-8", "new\nline/\x07\\x.jpg")):
        data = packed((name, b"1"), (name[:-3] + "cls", b"cat"), encoding=encoding, format=tarfile.GNU_FORMAT)
        ((member,), end) = whole(read(tmp_path, data))
        assert (member.content, dict(member.sidecars), end.unpaired) == (b"1", {"input_cls": "cat"}, 0)
        assert member.name == name.encode(encoding).decode("utf-8", "backslashreplace")


def test_junk_in_a_tar_is_ignored_and_separates_no_sidecars(tmp_path: Path) -> None:
    """macOS writes ._x.jpg before each x.jpg, and folders may be anywhere."""
    folder = tarfile.TarInfo("./")
    folder.type = tarfile.DIRTYPE
    data = packed(
        folder, ("./._x.jpg", b"\0"), ("./x.jpg", b"1"), ("./._x.cls", b"\0"), ("./x.cls", b"cat"), ("__MACOSX/._x.jpg", b"\0"),
        ("@eaDir/x.jpg", b"\0"), (".git/x.jpg", b"\0"), ("a/LICENSE", b"\0"), ("_SUCCESS", b""), ("./y", b"2"),
        ("_z.jpg", b"3"), ("a/.hidden.cls", b"dog"),
    )  # fmt: skip
    members, end = whole(read(tmp_path, data))
    assert [(member.name, dict(member.sidecars)) for member in members] == [
        ("./x.jpg", {"input_cls": "cat"}), ("./y", {}), ("_z.jpg", {})
    ]  # fmt: skip
    assert (end.ignored, end.unpaired) == (8, 0)


# Concatenated tars


def joined(name: str, *tars: bytes) -> bytes:
    return b"".join(map(gzip.compress, tars) if name.endswith("gz") else tars)


@pytest.mark.parametrize("zeros", [0, 1, 511, 512, 70_000])
@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_concatenated_tars_are_read_as_one(tmp_path: Path, name: str, zeros: int) -> None:
    first, second, third = packed(*SHARD[:5]), packed(*SHARD[5:8]), packed(("z.jpg", b"z"))
    data = joined(name, first + bytes(zeros), second, third) + bytes(zeros)
    members, end = whole(read(tmp_path, data, name=name))
    assert [member.content for member in members] == [b"zero", b"left", b"right", b"two", b"z"] and end.damage is None
    for at, member in enumerate(members):
        rest, again = whole(
            read(tmp_path, data, name=name, resume_offset=member.resume_offset, last_offset=member.offset)
        )
        assert rest == members[at + 1 :] and (again.offset, again.damage) == (end.offset, None)


def test_a_tar_with_many_gzip_members_is_read_to_its_end(tmp_path: Path) -> None:
    """bgzip, pigz -i and the tools of container images write such data."""
    data = packed(*SHARD)
    members, end = whole(read(tmp_path, data))
    cut = joined("gz", *(data[start : start + 700] for start in range(0, len(data), 700)))
    again, again_end = whole(read(tmp_path, cut, name="a.tar.gz"))
    assert (again, again_end) == (members, end) and len(members) == 6


@pytest.mark.parametrize(
    "tail", [b"x", b"not a tar " * 1000, np.random.default_rng(1).bytes(3000), b"\x1f\x8b no gzip"]
)
@pytest.mark.parametrize("zeros", [0, 77])
@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_other_data_after_a_tar_are_one_reject(tmp_path: Path, name: str, zeros: int, tail: bytes) -> None:
    data = joined(name, packed(("a.jpg", b"a"))) + bytes(zeros) + tail
    members, end = whole(read(tmp_path, data, name=name))
    assert [member.name for member in members] == ["a.jpg"]
    assert end.damage is not None and end.damage.reason == "corrupt"
    assert (f"{len(tail):,} bytes after" if name == "a.tar" else "bytes after it") in end.damage.message


def test_other_data_within_gzip_data_are_counted(tmp_path: Path) -> None:
    members, end = whole(read(tmp_path, gzip.compress(packed(("a.jpg", b"a")) + b"no tar " * 100_000), name="a.tgz"))
    assert len(members) == 1 and end.damage is not None and "700,000 bytes after" in end.damage.message


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_damage_in_the_second_tar_keeps_the_members_before_it(tmp_path: Path, name: str) -> None:
    first, second = packed(("a.jpg", b"a")), packed(*((f"{number}.jpg", bytes(900)) for number in range(3)))
    data = joined(name, first, second[: 512 + 1024 + 100] if name == "a.tar" else second)
    data = data if name == "a.tar" else data[:-60]
    members, end = whole(read(tmp_path, data, name=name))
    assert members[0].name == "a.jpg" and end.damage is not None and end.damage.reason == "truncated"


def test_a_wrong_gzip_checksum_is_damage(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(packed(("a.jpg", b"a"))))
    data[-8] ^= 1
    members, end = whole(read(tmp_path, bytes(data), name="a.tgz"))
    assert len(members) == 1 and end.damage is not None and end.damage.reason == "corrupt"


def test_truncated_gzip_data_are_damage(tmp_path: Path) -> None:
    members, end = whole(read(tmp_path, gzip.compress(packed(("a.jpg", b"a")))[:-3], name="a.tgz"))
    assert len(members) == 1 and end.damage is not None and end.damage.reason == "truncated"


# Sidecars

UNSORTED: list[Entry] = [
    ("b/1.jpg", b"1"), ("b/1.cls", b"cat"), ("b/2.jpg", b"2"), ("b/3.jpg", b"3"), ("./b/3.json", b'\xef\xbb\xbf{"a": 1}'),
    ("b/2.cls", b"dog"), ("./b/2.txt", b"a dog"), ("b/3.cls", b"cup"), ("README.txt", b"read me"), ("b/4.jpg", b"4"),
]  # fmt: skip


def test_unpaired_sidecars_are_counted(tmp_path: Path) -> None:
    members, end = whole(read(tmp_path, packed(*UNSORTED)))
    assert [dict(member.sidecars) for member in members] == [
        {"input_cls": "cat"}, {}, {"input_json": '{"a": 1}'}, {}
    ]  # fmt: skip
    assert (end.unpaired, end.unpaired_example, end.sidecars, end.ignored) == (3, "b/2.cls", {}, 1)


def collected(place: Path, data: bytes) -> list[Any]:
    (place / "a.tar").write_bytes(data)
    stores = Stores(StorageConfig(retries=0), {})
    return list(TarReader(stores, str(place / "a.tar"), Meta(len(data)), "images", 1 << 20, collect=True).members())


def test_unpaired_sidecars_are_collected_on_request(tmp_path: Path) -> None:
    members, end = whole(collected(tmp_path, packed(*UNSORTED)))
    assert end.sidecars == {"b/2": {"input_cls": "dog", "input_txt": "a dog"}, "b/3": {"input_cls": "cup"}}
    assert [{**end.sidecars.get(key_of(member.name) or "", {}), **member.sidecars} for member in members] == [
        {"input_cls": "cat"}, {"input_cls": "dog", "input_txt": "a dog"}, {"input_cls": "cup", "input_json": '{"a": 1}'}, {}
    ]  # fmt: skip


def test_two_different_sidecars_of_a_key_are_refused(tmp_path: Path) -> None:
    twice = [("1.cls", b"cat"), ("x.jpg", b"x"), ("./1.cls", b"cat")]
    assert whole(collected(tmp_path, packed(*twice)))[1].sidecars == {"1": {"input_cls": "cat"}}
    with pytest.raises(InputError, match=r"a\.tar has two members 1\.cls that differ: 'cat' and 'dog'"):
        collected(tmp_path, packed(*twice, ("y.jpg", b"y"), ("1.cls", b"dog")))


def test_collected_sidecars_have_a_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.sources.tar_reader.MAX_COLLECTED_BYTES", 1 << 20)
    entries = [(f"{number}.txt", b"x" * 100_000) for number in range(20)]
    with pytest.raises(InputError, match=r"a\.tar: more than 10 images .*tar --sort=name"):
        collected(tmp_path, packed(*entries))


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbfcat\r\n", b"cat", " cat\n".encode("utf-16"), b"\xfe\xff" + "cat".encode("utf-16-be")]
)
def test_a_byte_order_mark_is_removed_from_a_class(tmp_path: Path, data: bytes) -> None:
    ((member,), _) = whole(read(tmp_path, packed(("1.jpg", b"1"), ("1.CLS", data))))
    assert dict(member.sidecars) == {"input_cls": "cat"}


# Through listing, worker, committer and ledger


class Run:
    """Consecutive runs over the same tars in this process, without Ray."""

    def __init__(self, place: Path) -> None:
        self.stores = Stores(StorageConfig(retries=0), {})
        self.input, self.output = place / "in", Folder(self.stores, str(place / "out"))
        self.input.mkdir(parents=True)
        self.number = 0
        self.decoded = 0
        self.counts = Counts()
        self.unpaired = 0, ""

    def put(self, name: str, data: bytes) -> None:
        (self.input / name).write_bytes(data)

    def __call__(
        self,
        tamper: Callable[[Iterator[pa.Table]], Iterable[pa.Table]] = lambda blocks: blocks,
        *,
        limit: int | None = None,
        rounds: int = 1,
        prune: bool = False,
        retry: str = "transient",
        reject_lost: bool = False,
    ) -> audit.AuditResult:
        """Run to the end, committing each block; `tamper` stands between worker and driver."""
        self.number += 1
        ledger = Ledger(self.output, {}, retry=retry).open()
        sources = recognise(self.stores, [str(self.input)], SourceConfig())
        pages = self.output.folder(f"runs/{self.number}/listing")
        listing = Listing(ledger, pages, limit)
        listing.take(list_all(sources))
        work_plan, self.counts = listing.work_plan(), listing.counts
        preprocess = Preprocess(height=8, width=8, resize=(8,))
        model = Model(name="mean", digest="0" * 64, labels=COLOURS, preprocess=preprocess, network=list)
        work = Work(self.stores, pages, WorkerConfig.of(Config(fetch=FetchConfig(max_bytes=10_000))), model)
        room = None if limit is None else limit - self.counts.listed
        arrivals, statistics, health = Arrivals(work_plan, room), RunStatistics(), StoreHealth()
        clock = iter(range(10**6)).__next__
        with Committer(
            ledger, f"run{self.number}", "mean", arrivals, statistics, health, commit_s=0.0, clock=clock
        ) as taken:
            for _ in range(rounds):
                for unit in units.cut_units(work_plan, units.ROUNDS[0], 1):
                    for block in tamper(self._labelled(work, unit)):
                        taken.take(block)
                        if taken.due:
                            taken.commit()
                        if arrivals.close_at_limit():
                            break
            if reject_lost:
                taken.reject_lost(pages, 3)
        arrivals.warn_of_unpaired()
        self.unpaired = work_plan.found.unpaired, work_plan.found.unpaired_example
        if prune:
            ledger.prune(unread=self.counts.unread)
        ledger.fill_gaps(f"run{self.number}")
        ledger.seal(f"run{self.number}")
        self.counts = self.counts.with_streams(work_plan.found)
        totals = audit.audit(self.output, pages, limited=limit is not None)
        totals.require_reconciled()
        assert totals.listed == self.counts.listed
        return totals

    def _labelled(self, work: Work, unit: pa.Table) -> Iterator[pa.Table]:
        for block in LabelImages(work, lambda _: MeanColour())(unit):
            self.decoded += len(received(block).rows)
            yield block

    def rows(self, table: str = "labels") -> dict[str, Any]:
        """Return label, or reason, by name below the input; an image in two rows is an error."""
        log = Log(self.output.folder(table))
        log.scan()
        column = "label" if table == "labels" else "reason"
        pairs: list[tuple[str, Any]] = []
        for _, part, _ in log.read(["uri", column]):
            names = [uri.removeprefix(f"{self.input}/") for uri in part["uri"].to_pylist()]
            pairs += zip(names, part[column].to_pylist(), strict=True)
        assert len(dict(pairs)) == len(pairs), "an image is in two rows"
        return dict(pairs)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a run whose workers send 4 images at a time."""
    monkeypatch.setattr("imgbatch.inference.worker._AT_ONCE", 4)
    return Run(tmp_path)


def expected(tar: str, first: int, count: int) -> dict[str, str]:
    return {f"{tar}#{number:04d}.png": COLOURS[number % 3] for number in range(first, first + count)}


def test_each_member_has_its_row_and_a_second_run_opens_nothing(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 10), ("bad.jpg", b"no image")))
    run.put("b.tar.gz", gzip.compress(packed(*pictures(10, 5))))
    run.put("loose.png", picture(2))
    totals = run()
    assert (totals.listed, totals.labelled, totals.rejected, totals.kept) == (17, 16, 1, 0)
    assert run.rows() == expected("a.tar", 0, 10) | expected("b.tar.gz", 10, 5) | {"loose.png": "blue"}
    assert run.rows("rejects") == {"a.tar#bad.jpg": "not_an_image"}
    run.decoded = 0
    assert run().listed == 17
    assert (run.decoded, run.counts.already_done, run.counts.streams) == (0, 17, 0)


def test_sidecars_are_carried_to_the_tables(run: Run) -> None:
    run.put("a.tar", packed(("1.cls", b"cat"), ("1.png", picture(0)), ("2.png", picture(1)), ("2.json", b"{}")))
    run()
    log = Log(run.output.folder("labels"))
    log.scan()
    table = log.part(1)[0]
    assert table.select(["input_cls", "input_json", "input_txt"]).to_pylist() == [
        {"input_cls": "cat", "input_json": None, "input_txt": None},
        {"input_cls": None, "input_json": "{}", "input_txt": None},
    ]


def test_unpaired_sidecars_are_counted_over_all_tars(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    loose: list[Entry] = [("1.cls", b"cat"), ("2.png", picture(1)), ("1.png", picture(0)), ("2.json", b"{}")]
    run.put("a.tar", packed(*loose))
    run.put("b.tar", packed(("3.png", picture(0)), ("3.cls", b"cat")))
    run.put("c.tgz", gzip.compress(packed(*loose)))
    run()
    assert run.unpaired == (4, f"{run.input}/a.tar#1.cls")
    (message,) = [record.message for record in caplog.records if "--sort=name" in record.message]
    assert message.startswith(
        f"4 members .cls, .json and .txt of tars are not next to an image of their name, such as {run.input}/a.tar#1.cls"
    )


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
@pytest.mark.parametrize("blocks", range(6))
def test_concatenated_tars_are_resumed_after_a_kill(run: Run, blocks: int, name: str) -> None:
    run.put(name, joined(name, packed(*pictures(0, 7)), packed(*pictures(7, 7)), packed(*pictures(14, 7))))

    def killed(stream: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for number, block in enumerate(stream):
            if number == blocks:
                raise Killed
            yield block

    with pytest.raises(Killed):
        run(killed)
    run.decoded = 0
    run()
    assert run.decoded == 21 - 4 * blocks and run.rows() == expected(name, 0, 21)


def test_other_data_after_a_tar_are_rejected_once(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 5)) + b"no tar")
    for _ in range(2):
        totals = run()
        assert run.rows() == expected("a.tar", 0, 5) and run.rows("rejects") == {"a.tar": "corrupt"}
        assert (totals.listed, totals.labelled, totals.rejected) == (6, 5, 1)
    assert run.decoded == 6  # with the tar's own row


@pytest.mark.parametrize("prune", [False, True])
def test_rows_of_a_tar_whose_link_broke_are_kept(run: Run, tmp_path: Path, prune: bool) -> None:
    tars = {"a.tar": packed(*pictures(0, 5)), "b.tgz": gzip.compress(packed(*pictures(5, 2)))}
    (tmp_path / "store").mkdir()
    for name, data in {**tars, "c.png": picture(1), "d.png": picture(2)}.items():
        (tmp_path / "store" / name).write_bytes(data)
        (run.input / name).symlink_to(tmp_path / "store" / name)
    pq.write_table(pa.table({"image": [picture(0), picture(1)]}), tmp_path / "store/e.parquet")
    (run.input / "e.parquet").symlink_to(tmp_path / "store/e.parquet")
    run()
    labels = run.rows()
    assert len(labels) == 11
    for path in (tmp_path / "store").iterdir():
        path.unlink()
    (run.input / "new.png").symlink_to("gone")
    (run.input / "new.tar").symlink_to("gone")
    run.decoded = 0
    run(prune=prune, rounds=2)
    assert run.rows() == labels
    assert run.rows("rejects") == dict.fromkeys(("new.png", "new.tar", "e.parquet"), "vanished")


class Killed(BaseException):
    """The driver was killed."""


@pytest.mark.parametrize("blocks", range(7))
def test_a_killed_run_is_resumed_where_it_stopped(run: Run, blocks: int) -> None:
    run.put("a.tar", packed(*pictures(0, 20), ("bad.jpg", b"no image")))

    def killed(stream: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for number, block in enumerate(stream):
            if number == blocks:
                raise Killed
            yield block

    try:
        run(killed)
    except Killed:
        run.decoded = 0
        run()
        assert run.decoded == 21 - 4 * blocks
    assert run.rows() == expected("a.tar", 0, 20)
    assert run.rows("rejects") == {"a.tar#bad.jpg": "not_an_image"}


@pytest.mark.parametrize("at", range(9))
def test_a_kill_at_any_write_loses_and_repeats_no_row(run: Run, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bad: list[Entry] = [(f"{number:04d}.png", picture(number) if number % 3 else b"no image") for number in range(12)]
    run.put("a.tar", packed(*bad, bad[1]))
    create, count = LocalStore.create, iter(range(10**6))

    def dies(self: LocalStore, path: str, data: bytes) -> None:
        number = next(count)
        if number // 2 == at and number % 2 == 0:
            raise Killed
        create(self, path, data)
        if number // 2 == at:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "create", dies)
        for _ in range(2):  # once before a write and once after it
            with pytest.raises(Killed):
                run()
                raise Killed
    run()
    assert run.rows() == {name: label for name, label in expected("a.tar", 0, 12).items() if label != "red"}
    reasons = run.rows("rejects")
    assert {name: reason for name, reason in reasons.items() if "@" not in name} == {
        name: "not_an_image" for name, label in expected("a.tar", 0, 12).items() if label == "red"
    }
    assert [reason for name, reason in reasons.items() if "@" in name] == ["duplicate"]


def test_repeated_and_lost_blocks_change_nothing(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 40)))
    random = np.random.default_rng(0)

    def unsound(stream: Iterator[pa.Table]) -> Iterator[pa.Table]:
        before: list[pa.Table] = []
        for block in stream:
            before.append(block)
            if random.random() < 0.3:
                yield before[random.integers(len(before))]
            if random.random() < 0.9:
                yield block

    run(unsound, rounds=30)
    assert run.rows() == expected("a.tar", 0, 40)


def test_a_second_member_of_one_name_is_a_reject_of_its_own(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 6), ("0001.png", picture(0)), ("0001.png", picture(2)), *pictures(6, 1)))
    assert run().listed == 9
    assert run.rows() == expected("a.tar", 0, 7)
    rejects = run.rows("rejects")
    assert len(rejects) == 2 and set(rejects.values()) == {"duplicate"}
    assert all(name.startswith("a.tar#0001.png@") for name in rejects)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("commit", range(1, 5))
def test_second_members_survive_a_kill_between_the_two_logs(
    run: Run, commit: int, prune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = ("0.png", picture(0)), ("1.png", picture(1))
    bad = [(f"bad{number}.jpg", b"no image") for number in range(5)]
    run.put(
        "a.tar",
        packed(first, first, bad[0], other, bad[1], first, bad[2], ("2.png", picture(2)), other, bad[3], first, bad[4]),
    )
    append, seen = Log.append, []

    def killed(log: Log, table: pa.Table, *rest: Any) -> int:
        if log.folder.uri.endswith("labels"):
            seen.append(1)
            if len(seen) == commit:
                raise Killed
        return append(log, table, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "append", killed)
        with suppress(Killed):
            run()
    totals = run(prune=prune)
    assert (totals.listed, totals.labelled, totals.rejected) == (12, 3, 9)
    assert run.rows() == {"a.tar#0.png": "red", "a.tar#1.png": "green", "a.tar#2.png": "blue"}
    reasons = sorted(run.rows("rejects").values())
    assert reasons == ["duplicate"] * 4 + ["not_an_image"] * 5


def test_a_damaged_tar_is_rejected_and_read_again_only_after_it_changed(run: Run) -> None:
    data = packed(*pictures(0, 10))
    run.put("a.tar", data[:4600])
    totals = run()
    assert (totals.labelled, totals.rejected) == (4, 1)
    assert run.rows("rejects") == {"a.tar": "truncated"}
    run.decoded = 0
    run()
    assert run.decoded == 0
    run.put("a.tar", data)
    totals = run()
    assert run.rows() == expected("a.tar", 0, 10) and run.rows("rejects") == {}
    assert (totals.listed, totals.kept) == (10, 0)


def test_an_unreachable_store_in_the_middle_of_a_tar_is_a_transient_reject(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.put("a.tar", packed(*pictures(0, 30)))

    def away(self: LocalStore, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        yield Path(path).read_bytes()[start : start + 8000]
        raise ConnectionResetError

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "stream", away)
        totals = run()
    assert totals.rejected == 1 and 0 < totals.labelled < 30
    assert run.rows("rejects") == {"a.tar": "unreachable"}
    run.decoded = 0
    assert run().listed == 30
    assert run.decoded == 30 - totals.labelled
    assert run.rows() == expected("a.tar", 0, 30) and run.rows("rejects") == {}


def test_reading_resumes_after_a_cut_connection(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stores = Stores(StorageConfig(retries=2), {})
    run.put("a.tar", packed(*pictures(0, 30)))
    monkeypatch.setattr("imgbatch.storage.file_objects.backoff", lambda attempt: 0.0)

    def short(self: LocalStore, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        yield Path(path).read_bytes()[start : start + 3000]

    monkeypatch.setattr(LocalStore, "stream", short)
    run()
    assert run.rows() == expected("a.tar", 0, 30) and run.rows("rejects") == {}


def test_a_replaced_tar_is_read_again_and_rows_of_lost_members_are_kept(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 9)))
    run()
    changed = [(f"{number:04d}.png", picture(number + 1)) for number in range(3, 12)]
    run.put("a.tar", packed(*changed))
    totals = run()
    assert (totals.listed, totals.kept) == (9, 3)
    assert run.rows() == expected("a.tar", 0, 3) | {f"a.tar#{n:04d}.png": COLOURS[(n + 1) % 3] for n in range(3, 12)}
    totals = run()
    assert (totals.listed, totals.kept) == (9, 3)
    assert run(prune=True).kept == 0
    assert len(run.rows()) == 9


def test_rows_of_a_deleted_tar_are_kept_until_they_are_pruned(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 9)))
    run.put("b.tar", packed(*pictures(9, 3), ("bad.jpg", b"no image")))
    run()
    (run.input / "b.tar").unlink()
    assert run().kept == 4
    assert run(prune=True).kept == 0
    assert run.rows() == expected("a.tar", 0, 9) and run.rows("rejects") == {}


def test_a_limit_takes_the_first_members(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 6)))
    run.put("b.tar", packed(*pictures(6, 6)))
    assert run(limit=8).listed == 8
    assert run.rows() == expected("a.tar", 0, 6) | expected("b.tar", 6, 2)
    assert run().listed == 12
    assert run.rows() == expected("a.tar", 0, 6) | expected("b.tar", 6, 6)


def test_a_limit_below_the_finished_rows_leaves_other_tars_unread(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 6)))
    run.put("b.tar", packed(*pictures(6, 6)))
    run(limit=8)
    for limit in (7, 2):
        assert run(limit=limit, reject_lost=True).labelled == 8
    assert run().labelled == 12
    assert run.rows() == expected("a.tar", 0, 6) | expected("b.tar", 6, 6) and run.rows("rejects") == {}


def test_a_reached_limit_counts_the_reject_of_an_unread_tar(run: Run) -> None:
    from imgbatch.concurrency.signals import StopRequest
    from imgbatch.pipeline import run as job_run
    from imgbatch.pipeline.active_run import ActiveRun
    from imgbatch.pipeline.run_summary import Tally

    cursor = TarCursor("a.tar", "v", cast(Any, None), was_rejected=True)
    work_plan = WorkPlan(np.ones(1, bool), np.zeros((0, 2), np.int64), {0: cursor})
    job = SimpleNamespace(
        config=replace(Config(), limit=3), ledger=None, model=SimpleNamespace(reference="m"), sources=[]
    )
    record, nothing = SimpleNamespace(id="r", facts={}), cast(Any, None)
    active = ActiveRun(cast(Any, job), nothing, cast(Any, record), nothing, Tally())
    counts = job_run.label(active, Counts(listed=4), work_plan, StopRequest())
    assert counts.listed == 5 and record.facts["counts"]["listed"] == 5 and not work_plan.pending.any()


def test_pruning_keeps_the_rows_of_a_resumed_tar(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 6), ("bad.jpg", b"no image"), *pictures(6, 6)))
    run.put("gone.tar", packed(*pictures(0, 1)))
    run(limit=9)
    (run.input / "gone.tar").unlink()
    totals = run(prune=True)
    assert (totals.listed, totals.kept) == (13, 0)
    assert run.rows() == expected("a.tar", 0, 12) and run.rows("rejects") == {"a.tar#bad.jpg": "not_an_image"}
    changed = [(f"{number:04d}.png", picture(number + 1)) for number in range(3, 15)]
    run.put("a.tar", packed(*changed))
    run(limit=5)
    assert run(prune=True).kept == 0
    assert run.rows() == {f"a.tar#{n:04d}.png": COLOURS[(n + 1) % 3] for n in range(3, 15)}
    assert run.rows("rejects") == {}


def test_a_lost_tar_is_a_reject_and_read_by_the_next_run(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 9)))
    run.put("b.tar", packed(*pictures(9, 9)))
    totals = run(lambda stream: [], reject_lost=True)
    assert (totals.listed, totals.rejected) == (2, 2)
    assert run.rows("rejects") == {"a.tar": "crashed", "b.tar": "crashed"}
    assert run().labelled == 18
    assert run.rows() == expected("a.tar", 0, 9) | expected("b.tar", 9, 9) and run.rows("rejects") == {}


@pytest.mark.parametrize("order", [lambda blocks: blocks[::-1], lambda blocks: blocks[1::2] + blocks[::2] + blocks[:3]])
def test_blocks_out_of_order_are_accepted_in_one_pass(run: Run, order: Callable[[Any], Any]) -> None:
    run.put("a.tar", packed(*pictures(0, 30)))
    run(lambda stream: order(list(stream)))
    assert run.rows() == expected("a.tar", 0, 30) and run.decoded == 30
    run()
    assert run.decoded == 30


def test_the_end_of_a_damaged_tar_out_of_order_is_read_again(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 30))[:20_000])
    totals = run(lambda stream: list(stream)[::-1], rounds=2)
    assert run.rows("rejects") == {"a.tar": "truncated"} and totals.labelled == len(run.rows()) > 10
    decoded = run.decoded
    run()
    assert run.decoded == decoded


def test_the_audit_finds_a_missing_row(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 9)))
    run()
    log = Log(run.output.folder("labels"))
    log.scan()
    log.rewrite(2, lambda table: table.slice(1))
    totals = audit.audit(run.output, run.output.folder("runs/1/listing"))
    with pytest.raises(AuditError, match=r"a.tar#… \(8 rows of 9 members\)"):
        totals.require_reconciled()


def test_the_audit_finds_a_tar_that_was_not_read_to_its_end(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 9)))
    with pytest.raises(AuditError, match=r"a.tar#… \(4 rows of \? members\)"):
        run(lambda stream: [next(stream)])


def test_a_tar_that_changes_after_the_listing_is_a_conflict(s3: Any) -> None:
    place = Folder(s3.stores(retries=0), "s3://images/versions")
    place.put("a.tar", packed(*pictures(0, 3)))
    _, meta = place.stores.read(place.at("a.tar"))
    tar = TarReader(place.stores, place.at("a.tar"), meta, "images", 1 << 20)
    assert len(list(tar.members())) == 4
    place.put("a.tar", packed(*pictures(3, 3)))
    with pytest.raises(Conflict):
        list(TarReader(place.stores, place.at("a.tar"), meta, "images", 1 << 20).members())
    place.delete("a.tar")
    with pytest.raises(StoreError):
        list(TarReader(place.stores, place.at("a.tar"), meta, "images", 1 << 20).members())


def test_a_stream_that_ends_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    stores = Stores(StorageConfig(retries=0), {})
    with stores.stream(str(tmp_path / "x"), Meta(size=9)) as file, pytest.raises(Unreachable, match="5 of 9 bytes"):
        list(iter(file.read, b""))
    with stores.stream(str(tmp_path / "x"), Meta(size=5), 2) as file:
        assert (file.read(2), file.read(), file.read(1)) == (b"34", b"5", b"")


def test_a_footer_has_the_progress_of_each_tar(run: Run) -> None:
    run.put("a.tar", packed(*pictures(0, 6)))
    run()
    log = Log(run.output.folder("labels"))
    log.scan()
    first, last = (log.footer(number).streams[f"{run.input}/a.tar"] for number in (1, 2))
    assert "images" not in first and last["images"] == 6 and first["through"] < last["through"]
    assert json.loads(json.dumps(last)) == last

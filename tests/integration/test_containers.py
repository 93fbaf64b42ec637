"""Tars and Parquet files of images on a real S3 server: labelled, killed in the middle, resumed."""

from __future__ import annotations

import io
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Job, S3Server
from tests.integration import tables
from tests.integration.tables import by_hand
from tests.unit.pictures import encode, scene


def tar_of(images: dict[str, bytes]) -> bytes:
    """Return a tar with a `.cls` next to each image."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, content in images.items():
            for member, data in ((name, content), (f"{name.partition('.')[0]}.cls", name.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def parquet_of(images: dict[str, bytes], group: int) -> bytes:
    """Return a Parquet file as Hugging Face writes it."""
    rows = [{"bytes": content, "path": name} for name, content in images.items()]
    column = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": column, "label": list(images)}), sink, row_group_size=group)
    return sink.getvalue()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 different images."""
    folder = tmp_path_factory.mktemp("kinds")
    for number in range(24):
        (folder / f"{number:02d}.jpg").write_bytes(encode(scene(seed=number), "JPEG"))
    return folder


def test_a_prefix_of_tars_tables_and_objects(
    warm: Job, s3: S3Server, kinds: Path, tiny_model: Path, tmp_path: Path
) -> None:
    images = {path.name: path.read_bytes() for path in sorted(kinds.iterdir())}
    names = list(images)
    bucket = s3.bucket("images")
    bucket.put("mixed/shard-000.tar", tar_of({name: images[name] for name in names[:9]} | {"bad.jpg": b"no image"}))
    bucket.put("mixed/deep/shard-001.tar", tar_of({name: images[name] for name in names[9:14]}))
    bucket.put("mixed/train.parquet", parquet_of({name: images[name] for name in names[14:22]}, group=3))
    bucket.put("mixed/statistics.parquet", parquet_of({}, 1)[:-30])
    for name in names[22:]:
        bucket.put(f"mixed/{name}", images[name])
    command = ("classify", "--input", "s3://images/mixed", "--output", "s3://out/mixed", "--model", tiny_model)

    ended = warm(*command, env=s3.environment)

    assert ended.code == 0, ended.err
    assert (
        ended.out.strip()
        .splitlines()[-1]
        .startswith("26 images listed, 24 labelled, 2 rejected (0 already done, 0 kept")
    )
    output = tables.download(s3.bucket("out"), "mixed", tmp_path / "out")
    expected = by_hand(tiny_model, sorted(kinds.iterdir()))
    result = {row["uri"]: row for row in tables.rows(output)}
    ids = [f"s3://images/mixed/shard-000.tar#{name}" for name in names[:9]]
    ids += [f"s3://images/mixed/deep/shard-001.tar#{name}" for name in names[9:14]]
    ids += [f"s3://images/mixed/train.parquet#{row}" for row in range(8)]
    ids += [f"s3://images/mixed/{name}" for name in names[22:]]
    assert sorted(result) == sorted(ids)
    for uri, name in zip(ids, names, strict=True):
        label, score, lead = expected[name]
        assert lead < 0.01 or (result[uri]["label"], result[uri]["score"]) == (label, pytest.approx(score, abs=0.05)), (
            uri
        )
        assert result[uri]["size"] == len(images[name])
    assert result[ids[0]]["input_cls"] == "00.jpg" and result[ids[14]]["input_label"] == "14.jpg"
    assert {row["uri"].rpartition("/")[2]: row["reason"] for row in tables.rows(output, "rejects")} == {
        "shard-000.tar#bad.jpg": "not_an_image", "statistics.parquet": "not_an_image",
    }  # fmt: skip

    before = s3.requests()
    again = warm(*command, env=s3.environment)
    assert again.code == 0 and "(26 already done" in again.out, again.err
    assert (s3.requests() - before)["GET"] < 40  # parts and footers; no image
    assert warm("verify", "s3://out/mixed", env=s3.environment).code == 0


def test_a_table_of_ids_and_images_in_other_types(
    warm: Job, s3: S3Server, kinds: Path, tiny_model: Path, tmp_path: Path
) -> None:
    images = {path.name: path.read_bytes() for path in sorted(kinds.iterdir())[:6]}
    names, bucket = list(images), s3.bucket("images")
    for name, content in images.items():
        bucket.put(f"contest/train/{name}", content)
    rows = "".join(f'{name.partition(".")[0]},"{number}",pixels\n' for number, name in enumerate(names))
    bucket.put("contest/train.csv", f"sep=,\r\nid_code, diagnosis ,\r\n{rows}".encode())
    column = pa.array([[images[name]] for name in names], pa.large_list(pa.large_binary()))
    boxes = [{"w": number, "tags": ["a", "b"]} for number in range(6)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"pages": column, "box ": boxes, "md5": pa.array([b"\x00\xff"] * 6)}), sink)
    bucket.put("contest/pages.parquet", sink.getvalue())
    command = ("classify", "--model", tiny_model, "--set", "source.uri_template=train/{id_code}.jpg")

    ended = warm(*command, "--input", "s3://images/contest/train.csv", "--output", "s3://out/ids", env=s3.environment)
    assert ended.code == 0, ended.err
    result = tables.rows(tables.download(s3.bucket("out"), "ids", tmp_path / "ids"))
    assert [row["uri"] for row in result] == [f"s3://images/contest/train/{name}" for name in names]
    assert [row["input_diagnosis"] for row in result] == list("012345")
    assert [row["input_id_code"] for row in result] == [name.partition(".")[0] for name in names]

    pages = ("--input", "s3://images/contest/pages.parquet", "--set", "source.image_column=pages")
    ended = warm(*command[:3], *pages, "--output", "s3://out/pages", env=s3.environment)
    assert ended.code == 0, ended.err
    rows_of_pages = tables.rows(tables.download(s3.bucket("out"), "pages", tmp_path / "pages"))
    assert [(row["label"], row["input_box"], row["input_md5"]) for row in rows_of_pages] == [
        (row["label"], box, b"\x00\xff") for row, box in zip(result, boxes, strict=True)
    ]
    assert "input_pages" not in rows_of_pages[0]

    wrong = warm(
        *command[:3], "--input", "s3://images/contest/train.csv", "--output", "s3://out/no", env=s3.environment
    )
    assert wrong.code == 2 and "has no column 'uri'; it has: id_code, diagnosis" in wrong.err, wrong.err
    assert "source.uri_template" in wrong.err


@pytest.mark.long
def test_killed_in_the_middle_of_tars_and_tables(
    job: Job, started: Callable[..., subprocess.Popen[str]], s3: S3Server, kinds: Path, tiny_model: Path, tmp_path: Path
) -> None:
    images = [path.read_bytes() for path in sorted(kinds.iterdir())]
    many = {f"{number:05d}.jpg": images[number % 24] for number in range(6000)}
    bucket = s3.bucket("images")
    names = list(many)
    for shard in range(2):
        bucket.put(
            f"killed/{shard}.tar", tar_of({name: many[name] for name in names[2000 * shard : 2000 * (shard + 1)]})
        )
    bucket.put("killed/2.parquet", parquet_of({name: many[name] for name in names[4000:]}, group=100))
    command = ("classify", "--input", "s3://images/killed", "--output", "s3://out/killed", "--model", tiny_model,
               "--set", "run.commit_interval_s=0.5")  # fmt: skip
    seen = []
    for kill in range(4):
        process = started(*command, env=s3.environment)
        until = len(parts(s3)) + kill  # the first before the first commit, the others ever later
        while process.poll() is None and len(parts(s3)) < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        seen.append(rows_without_doubles(s3, tmp_path / str(kill)))
    ended = job(*command, env=s3.environment)
    assert ended.code == 0, ended.err
    assert rows_without_doubles(s3, tmp_path / "end") == 6000 and seen == sorted(seen) and 0 < seen[-1] < 6000, seen
    assert job("verify", "s3://out/killed", env=s3.environment).code == 0


def parts(s3: S3Server) -> list[str]:
    """Return the parts in the store."""
    return [entry["path"] for batch in s3.bucket("out").list("killed/labels") for entry in batch]


def rows_without_doubles(s3: S3Server, place: Path) -> int:
    """Return the number of rows in the tables. An image in two rows is an error."""
    output = tables.download(s3.bucket("out"), "killed", place)
    if not any(output.glob("labels/*.parquet")):
        return 0
    rows, images = duckdb.sql(f"select count(*), count(distinct uri) from '{output}/labels/*.parquet'").fetchall()[0]
    assert rows == images
    return int(rows)

"""Images that cannot be labelled: each is a row with a reason, other images are labelled, and the budget is applied."""

from __future__ import annotations

import shutil
from pathlib import Path

import obstore
import pytest

from tests.conftest import Job, S3Server
from tests.integration import faults, tables
from tests.integration.test_refusals import require_refusal
from tests.unit.pictures import dicom, encode, png_chunk, scene

EXACT = ("--set", "classify.dtype=float32")


def giant_png(side: int = 50_000) -> bytes:
    """Return a PNG of a few bytes whose header has 2.5 thousand million pixels."""
    header = png_chunk(b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"x" * 20) + png_chunk(b"IEND", b"")


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Return files that are not complete images, with the reason of their reject."""
    photo = encode(scene(640, 480), "JPEG", quality=95)
    return {
        "00-empty.jpg": (b"", "empty"),
        "01-truncated.jpg": (photo[: len(photo) // 2], "truncated"),
        "02-text.jpg": (b"this is a letter to my mother", "not_an_image"),
        "03-document.png": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "not_an_image"),
        "05-giant.png": (giant_png(), "too_large"),
        "06-drawing.jpg": (b"8BPS\0\1" + bytes(20), "unsupported"),
        "08-page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        "zz-half.png": (encode(scene(640, 480), "PNG")[:5000], "truncated"),
    }


def test_bad_files_are_rows_and_their_neighbours_are_labelled(
    warm: Job, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    good = {path.name for path in folder.iterdir()}
    expected = tables.by_hand(tiny_model, sorted(folder.iterdir()))
    bad = bad_files()
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    (folder / "07-folder.jpg").mkdir()
    (folder / "09-nowhere.jpg").symlink_to("nothing")
    (folder / "misnamed.png").write_bytes(encode(scene(seed=0), "JPEG"))
    rare = {
        "phone.heic": encode(scene(seed=0), "HEIF"),
        "web.avif": encode(scene(seed=0), "AVIF"),
        "map.jp2": encode(scene(seed=0), "JPEG2000"),
        "slice.dcm": dicom(scene(seed=0)),
    }
    for name, content in rare.items():
        (folder / name).write_bytes(content)
    output = tmp_path / "out"
    command = ("classify", "--input", folder, "--output", output, "--model", tiny_model, *EXACT)

    ended = warm(*command)

    assert ended.code == 0, ended.err
    nowhere = {"09-nowhere.jpg": "vanished"}
    assert tables.reasons(output) == {name: reason for name, (_, reason) in bad.items()} | nowhere
    passing = {row["passing"] for row in tables.rows(output, "rejects") if row["reason"] != "vanished"}
    assert passing == {False}
    result = tables.labels(output)
    assert result.keys() == good | {"misnamed.png"} | rare.keys()
    assert result["misnamed.png"] == result["00.jpg"]
    clear = [name for name, (_, _, lead) in expected.items() if lead > 0.05]
    assert len(clear) >= 9 and all(result[name] == expected[name][0] for name in clear)

    for name in bad:
        shutil.copy(folder / "00.jpg", folder / name)
    tables_before = tables.parts(output)
    (folder / "02-text.jpg").write_bytes(bad["02-text.jpg"][0])
    assert warm(*command, "--set", "rejects.retry=all").code == 0, "mended files are changed files"
    assert tables.reasons(output) == {"02-text.jpg": "not_an_image"} | nowhere
    assert set(tables.labels(output)) == result.keys() | bad.keys() - {"02-text.jpg"}
    assert tables.parts(output) != tables_before


def test_vanished_images_are_retried_by_the_next_run(warm: Job, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    names = [*(f"images/{number:02d}.jpg" for number in range(12)), "images/late.jpg", "images/never.jpg", "images"]
    manifest.write_text("\n".join(["uri", *names]))
    output = tmp_path / "out"
    command = ("classify", "--input", manifest, "--output", output, "--model", tiny_model)

    assert warm(*command).code == 0
    assert tables.reasons(output) == {"late.jpg": "vanished", "never.jpg": "vanished", "images": "unsupported"}
    vanished = [row for row in tables.rows(output, "rejects") if row["reason"] == "vanished"]
    assert {(row["stage"], row["passing"]) for row in vanished} == {("fetch", True)}

    shutil.copy(folder / "03.jpg", folder / "late.jpg")
    ended = warm(*command)
    assert ended.code == 0 and "(13 already done" in ended.out
    tables.require_single(output, [Path(name).name for name in names])
    assert tables.reasons(output) == {"never.jpg": "vanished", "images": "unsupported"}
    assert tables.labels(output)["late.jpg"] == tables.labels(output)["03.jpg"]


def test_a_flaky_store(warm: Job, s3: S3Server, tiny_model: Path, tmp_path: Path) -> None:
    """One object is forbidden, one is deleted after the listing, one never responds, and two are read at the third attempt."""
    for number in range(12):
        obstore.put(s3.bucket("images"), f"moods/{number:02d}.jpg", encode(scene(seed=number), "JPEG"))

    def plan(method: str, path: str, before: int) -> int | None:
        if method != "GET":
            return None
        answers = {
            "02.jpg": [403] * 9,
            "04.jpg": [404] * 9,
            "06.jpg": [500] * 9,
            "08.jpg": [503, 0],
            "09.jpg": [0, 500],
        }
        planned = answers.get(path.rpartition("/")[2], [])
        return planned[before] if before < len(planned) else None

    command = ("classify", "--input", "s3://images/moods", "--output", tmp_path / "out", "--model", tiny_model)
    with faults.proxy(s3.endpoint, plan) as endpoint:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": endpoint}
        ended = warm(*command, "--set", "storage.retries=2", env=environment)

    assert ended.code == 0, ended.err
    assert tables.reasons(tmp_path / "out") == {"02.jpg": "forbidden", "04.jpg": "vanished", "06.jpg": "unreachable"}
    rejected = {Path(row["uri"]).name: row for row in tables.rows(tmp_path / "out", "rejects")}
    assert all(row["passing"] and row["stage"] == "fetch" for row in rejected.values())
    assert rejected["06.jpg"]["attempts"] == 3 and rejected["02.jpg"]["attempts"] == 1
    assert len(tables.labels(tmp_path / "out")) == 9

    assert warm(*command, env=s3.environment).code == 0
    assert len(tables.labels(tmp_path / "out")) == 12 and not tables.reasons(tmp_path / "out")


@pytest.mark.parametrize("status", [500, 403])
def test_a_store_that_becomes_unreachable(
    warm: Job, s3: S3Server, tiny_model: Path, tmp_path: Path, status: int
) -> None:
    """The store becomes unreachable after ten images, whose rows are kept."""
    prefix = f"away-{status}"
    for number in range(35):
        obstore.put(s3.bucket("images"), f"{prefix}/{number:02d}.jpg", encode(scene(seed=number), "JPEG"))
    gone = False

    def plan(method: str, path: str, before: int) -> int | None:
        nonlocal gone
        image = method == "GET" and path.endswith(".jpg")
        gone = gone or (image and int(path[-6:-4]) >= 10)
        return status if gone and (status == 403 or image) and (not image or int(path[-6:-4]) >= 10) else None

    command = ("classify", "--input", f"s3://images/{prefix}", "--output", tmp_path / "out", "--model", tiny_model)
    with faults.proxy(s3.endpoint, plan) as endpoint:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": endpoint}
        ended = warm(*command, "--set", "storage.retries=0", "--set", "fetch.concurrency=4", env=environment)

    message = require_refusal(ended, 3)
    assert "the store is unreachable" in message and f"s3://images/{prefix}/" in message
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    (record,) = tables.runs(tmp_path / "out")
    assert (record["status"], record["exit_code"]) == ("failed", 3) and "the store is unreachable" in record["error"]
    assert len(tables.labels(tmp_path / "out")) == 10, "what was had is kept"

    ended = warm(*command, env=s3.environment)
    assert ended.code == 0, ended.err
    tables.require_single(tmp_path / "out", [f"{number:02d}.jpg" for number in range(35)])
    assert not tables.reasons(tmp_path / "out")


def test_the_budget(warm: Job, job: Job, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    for number in range(25):
        (folder / f"bad-{number:02d}.jpg").write_text("no image")
    output = tmp_path / "out"
    command = ("classify", "--input", folder, "--output", output, "--model", tiny_model)

    message = require_refusal(warm(*command), 4)

    assert "25 of 37 images rejected (67.6%)" in message and "rejects.max_share" in message
    assert len(tables.labels(output)) == 12 and len(tables.reasons(output)) == 25, "the rows are there all the same"
    assert not (output / "_SUCCESS").exists()
    # From here on nothing is left to be done: the verdict alone is new.
    allowed = ("--set", "rejects.max_share=0.7")
    assert "rejects.max_count allows 24" in require_refusal(job(*command, *allowed, "--set", "rejects.max_count=24"), 4)
    assert job(*command, *allowed, "--set", "rejects.max_count=25").code == 0
    assert tables.success(output)["counts"]["rejected"] == 25
    assert job(*command).code == 4
    assert job("verify", output).code == 0, "the tables are what they were when that run succeeded"


def test_no_labelled_image(warm: Job, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_text("no image")
    command = ("classify", "--input", tmp_path / "images", "--output", tmp_path / "out", "--model", tiny_model)
    ended = warm(*command, "--set", "rejects.max_share=1")
    assert "none of 3 images" in require_refusal(ended, 4)


def test_weights_that_do_not_fit(warm: Job, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    output = tmp_path / "out"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = require_refusal(warm("classify", "--input", folder, "--output", output, "--model", broken), 2)
    assert "it is truncated" in message and str(broken) in message
    assert not tables.parts(output)

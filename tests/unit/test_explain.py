"""`explain`: what is found of one image, how little is read for it, and what is said of an image that is nowhere."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.commands.explain import main as explain_command
from imgbatch.config.sections import Config
from imgbatch.errors import InputError, OutputError, UsageError
from imgbatch.labelling.explain import explain
from imgbatch.labelling.explanation import Explanation, Listed
from imgbatch.labelling.image_search import ImageSearch
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.part_file import Footer, encode
from imgbatch.schema import LABELS
from imgbatch.storage.stores import Folder
from tests.conftest import S3Server
from tests.unit.outputs import FINGERPRINT, MODEL, RUN, STORES, THEN, label, reject, write, write_run

OLD = "20260101T030405Z-000000"


def found(output: Folder, uri: str) -> Explanation:
    return explain(output.uri, uri, Config())


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    """Three parts with labels, the first with all names in order, and a reject; two runs, of which one lists more."""
    first = [label(f"s3://photos/a/{n:03d}.jpg") for n in range(100)]
    second = [label(f"s3://photos/b/{n:03d}.jpg", 0.7, 0.2, name="dog", input_split="val") for n in range(100)]
    write(tmp_path / "out", first, success=False)
    folder = write(tmp_path / "out", second, carried=[pa.field("input_split", pa.string())], success=False)
    folder = write(folder, [reject("s3://photos/c/bad.jpg", "unreachable", passing=True, attempts=11)])
    names = [str(row["uri"]) for row in [*first, *second]]
    write_run(folder, names, OLD)
    write_run(folder, [*names, "s3://photos/c/bad.jpg", "s3://photos/c/new.jpg"], device="cpu", runtime="openvino 1")
    return folder


def test_a_label_with_its_part_run_and_listings(output: Folder) -> None:
    image = found(output, "s3://photos/b/042.jpg")
    assert (image.status, image.part_row, image.part_rows) == ("labelled", 42, 100)
    assert image.part is not None and image.part.endswith("labels/part-00000003.parquet"), "the second is a seal"
    assert [entry.run_id for entry in image.listings] == [RUN, OLD]
    text = str(image)
    for shown in ("dog 0.700, class 1", "cat 0.200", "row 43 of 100", f"{RUN}: succeeded, cpu, openvino 1", MODEL,
                  f"by {OLD} (succeeded) in this version", "input_split  val"):  # fmt: skip
        assert shown in text, text
    values = json.loads(json.dumps(image.public()))
    assert values["row"]["top_k"][1]["label"] == "cat" and values["part"]["row"] == 42
    assert values["fingerprint"]["weights"] == FINGERPRINT["weights"] and values["runs"][RUN]["device"] == "cpu"
    assert values["row"]["last_modified"].startswith("2026-01-02T03:04:05")


def test_a_reject_with_its_reason(output: Folder) -> None:
    text = str(found(output, "s3://photos/c/bad.jpg"))
    assert "unreachable in decode, 11 attempts (transient: the next run tries it again)" in text and "cut off" in text


def test_an_image_that_is_listed_and_has_no_row(output: Folder) -> None:
    image = found(output, "s3://photos/c/new.jpg")
    assert image.status == "listed" and "run the same classify command again" in str(image)
    assert image.public()["listings"][0]["run_id"] == RUN


def test_another_version_in_a_newer_listing_is_said(output: Folder) -> None:
    content = found(output, "s3://photos/a/001.jpg")
    assert "in this version" in str(content)
    changed = Explanation(
        uri="u", output="o", status="labelled", row={**content.row, "etag": "old"}, runs=content.runs,
        listings=content.listings,
    )  # fmt: skip
    assert "with another etag" in str(changed) and "the next run labels it again" in str(changed)


def test_without_an_etag_the_time_is_the_version(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("/photos/1.jpg", etag=None)])
    row = found(output, "/photos/1.jpg").row
    for seconds, expected in ((0, "in this version"), (1, "with another last_modified, 2026-01-02 03:04:06+00:00")):
        newer = {"uri": "/photos/1.jpg", "size": 5, "last_modified": THEN + timedelta(seconds=seconds)}
        shown = Explanation(uri="u", output="o", status="labelled", row=row, listings=[Listed(RUN, newer)])
        assert expected in "".join(text for name, text in shown._lines() if name == "listed")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://photos/a/0042.jpg", "did you mean 's3://photos/a/04"),
        ("s3://photos/x/042.jpg", "did you mean 's3://photos/b/042.jpg'"),
        ("s3://photos/a/notes.txt", "it is ignored, since its name is not that of an image"),
        ("s3://elsewhere/a.jpg", r"the inputs of run \S+ are s3://photos"),
    ],
)
def test_an_image_that_is_nowhere(
    output: Folder, uri: str, message: str, monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        found(output, uri)


def test_a_local_file_may_be_relative_and_percent_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write(tmp_path / "out", [label(f"{tmp_path}/a b.jpg")])
    monkeypatch.chdir(tmp_path)
    for spelling in ("a b.jpg", f"file://{tmp_path}/a b.jpg", "a%20b.jpg"):
        assert found(output, spelling).uri == f"{tmp_path}/a b.jpg"
    write_run(output, [f"{tmp_path}/a b.jpg"], config={"input": [str(tmp_path)]})
    with pytest.raises(InputError, match=r"no object of that name exists"):
        found(output, "none.jpg")


def test_a_member_of_a_tar_is_searched_by_its_tar(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://photos/x.tar#a/1.jpg")], success=False)
    write_run(output, ["s3://photos/x.tar"])
    image = found(output, "s3://photos/x.tar#a/1.jpg")
    assert image.status == "labelled" and image.listings[0].row["uri"] == "s3://photos/x.tar"
    assert found(output, "s3://photos/x.tar#a/2.jpg").status == "listed", "it may be read later"
    output.put("_SUCCESS", b"{}")
    with pytest.raises(InputError, match=r"x.tar is listed, and has no image of that name; did you mean .*1\.jpg"):
        found(output, "s3://photos/x.tar#a/2.jpg")


def test_a_name_with_a_hash_is_not_taken_for_a_member_of_an_image(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://photos/a.jpg")], success=False)
    write_run(output, ["s3://photos/a.jpg"])
    with pytest.raises(InputError, match="is in no table"):
        found(output, "s3://photos/a.jpg#1.jpg")
    write(output, [label("s3://photos/b#/x.tar#1.jpg")], success=False)
    write_run(output, ["s3://photos/b#/x.tar"])
    assert found(output, "s3://photos/b#/x.tar#1.jpg").listings[0].row["uri"] == "s3://photos/b#/x.tar"


def test_json_is_valid_whatever_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "s3://photos/<script>'\"\x85\x1b[2J, عربي.jpg"
    output = write(tmp_path / "out", [label(uri, input_note="a\tb")], carried=[pa.field("input_note", pa.string())])
    assert explain_command([output.uri, uri, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["uri"] == uri and values["row"]["input_note"] == "a\tb"
    assert explain_command([output.uri, uri]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_foreign_table_among_the_parts_is_an_error(output: Folder) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": ["a"]}), sink)
    output.put("labels/part-00000000.parquet", sink.getvalue())
    with pytest.raises(OutputError, match=r"part-00000000\.parquet has no column uri"):
        found(output, "s3://photos/b/001.jpg")


def test_names_cannot_add_lines(tmp_path: Path) -> None:
    output = write(tmp_path / "out", [label("s3://photos/a\n  label        fake.jpg")])
    assert len(str(found(output, "s3://photos/a\n  label        fake.jpg")).splitlines()) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image": "x.png"}, "need --again"), ({"model": "net"}, "need --again")],
)
def test_options_without_again_are_refused(output: Folder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explain(output.uri, "s3://photos/a/001.jpg", Config(), **options)


def test_a_place_without_runs_and_a_damaged_part_are_errors(tmp_path: Path, output: Folder) -> None:
    with pytest.raises(InputError, match="it is not the --output of a classification"):
        found(Folder(STORES, str(tmp_path / "nothing")), "s3://photos/a.jpg")
    part = tmp_path / "out" / "labels" / "part-00000001.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(OutputError, match=r"part-00000001.parquet is not a complete Parquet file"):
        found(output, "s3://photos/b/001.jpg")


def large(folder: Folder, uris: Sequence[Sequence[str]]) -> None:
    """Write parts that are too large to be fetched as a whole."""
    ledger = Ledger(folder, FINGERPRINT).open()
    for number, names in enumerate(uris, 1):
        columns = {field.name: pa.nulls(len(names), field.type) for field in LABELS}
        filling = [random.randbytes(80).hex() for _ in names]
        columns |= {"uri": pa.array(names), "etag": pa.array(filling), "run_id": pa.repeat(RUN, len(names))}
        columns["model"] = pa.repeat(MODEL, len(names))
        data = encode(pa.table(columns, schema=LABELS), Footer(RUN, FINGERPRINT).metadata())
        assert len(data) > 300_000
        ledger.labels.folder.create(f"part-{number:08d}.parquet", data)


@pytest.mark.parametrize("in_order", [True, False])
def test_row_groups_are_skipped_by_their_statistics(tmp_path: Path, s3: S3Server, in_order: bool) -> None:
    folder = Folder(s3.stores(), f"s3://out/explain/{tmp_path.name}")
    names = [f"s3://photos/{n:06d}.jpg" for n in range(20_000)]
    parts = (
        [names[at : at + 5_000] for at in range(0, 20_000, 5_000)] if in_order else [names[at::4] for at in range(4)]
    )
    large(folder, parts)
    before = s3.requests()
    hit = ImageSearch(folder.folder("labels"), [names[12_345]]).find()
    assert hit is not None and hit.row["uri"] == names[12_345] and hit.rows == 5_000
    gets = (s3.requests() - before)["GET"]
    # One request for the listing, one for each footer; the column `uri` of one part or of all; the row.
    assert gets <= 1 + 4 + 2 + 1 if in_order else gets >= 1 + 4 + 3


@pytest.mark.parametrize("at", [0, 333, 1_234, 2_999])
def test_of_many_parts_in_order_few_are_read(tmp_path: Path, s3: S3Server, at: int) -> None:
    folder = Folder(s3.stores(), f"s3://out/many/{tmp_path.name}")
    names = [f"s3://photos/{n:06d}.jpg" for n in range(3_000)]
    write(folder, *([label(uri) for uri in names[first : first + 10]] for first in range(0, 3_000, 10)))
    before = s3.requests()
    hit = ImageSearch(folder.folder("labels"), [names[at]]).find()
    assert hit is not None and hit.row["uri"] == names[at]
    # Of 301 parts, 18 evenly spaced ones, the 16 between two of them, and those that other threads have already begun.
    assert (s3.requests() - before)["GET"] < 120


def test_the_row_is_found_in_any_part_and_row_group(tmp_path: Path) -> None:
    names = [f"s3://photos/{n:06d}.jpg" for n in range(1_000)]
    output = write(tmp_path / "out", *([label(uri) for uri in names[at::7]] for at in range(7)))
    for at in (0, 1, 499, 998, 999):
        hit = ImageSearch(output.folder("labels"), [names[at]]).find()
        assert hit is not None and hit.row["uri"] == names[at]
    for missing in ("", "s3://photos/000500.jp", "z"):
        assert ImageSearch(output.folder("labels"), [missing]).find() is None

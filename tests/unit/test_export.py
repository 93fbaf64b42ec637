"""`export`: which images are written, and in which form."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import Config, SourceConfig
from imgbatch.errors import InputError, UsageError
from imgbatch.labelling.export import ExportSummary, Selection, export
from imgbatch.labelling.selection import Smallest, diverse, pool_size, random_keys
from imgbatch.sources.recognise import recognise
from imgbatch.storage.stores import Folder
from tests.conftest import S3Server
from tests.unit.outputs import STORES, label, reject, write
from tests.unit.test_labelled_inputs import labels, make

SPLIT = pa.field("input_split", pa.string())


def run(output: Folder | Path, to: Path | str, **selection: Any) -> ExportSummary:
    uri = output.uri if isinstance(output, Folder) else str(output)
    return export(uri, str(to), Config(), Selection(**selection))


def recognised(path: Path) -> list[dict[str, Any]]:
    """Return the rows that a manifest lists."""
    (source,) = recognise(STORES, [str(path)], SourceConfig(schemes="file"))
    return [row for listing in source.list_images() for row in listing.batch.to_pylist()]


def uris(path: Path) -> list[str]:
    """Return the column `uri` of a manifest."""
    if path.suffix == ".parquet":
        return list(pq.read_table(path)["uri"].to_pylist())
    if path.suffix == ".jsonl":
        return [json.loads(line)["uri"] for line in path.read_text().splitlines()]
    with path.open(newline="", encoding="utf-8") as file:
        return [row["uri"] for row in csv.DictReader(file)]


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    """Labels with the margins 0.05 to 0.45 in two parts, of which one has a carried column, and two rejects."""
    first = [label(f"s3://p/{n}.jpg", 0.5, 0.5 - n / 20) for n in (9, 3, 5)]
    second = [label(f"s3://p/{n}.jpg", 0.5, 0.5 - n / 20, name="dog", input_split="val") for n in (1, 7, 2)]
    write(tmp_path / "out", first, success=False)
    folder = write(tmp_path / "out", second, carried=[SPLIT], success=False)
    return write(folder, [reject("s3://p/r1.jpg"), reject("s3://p/r2.jpg", "empty")])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_smallest_margins_come_first(tmp_path: Path, output: Folder, suffix: str) -> None:
    file = tmp_path / f"list{suffix}"
    summary = run(output, file, uncertain=3)
    assert uris(file) == ["s3://p/1.jpg", "s3://p/2.jpg", "s3://p/3.jpg"]
    assert str(summary) == f"3 images of 6 exported, the smallest margins: {file}"


def test_a_manifest_has_an_empty_label_what_the_model_says_and_the_columns_of_the_input(
    tmp_path: Path, output: Folder
) -> None:
    run(output, tmp_path / "list.parquet", where="label == 'dog' and margin < 0.2")
    rows = pq.read_table(tmp_path / "list.parquet").to_pylist()
    assert [(row["uri"], row["label"], row["predicted"], row["second"], row["split"]) for row in rows] == [
        ("s3://p/1.jpg", None, "dog", "cat", "val"), ("s3://p/2.jpg", None, "dog", "cat", "val")
    ]  # fmt: skip
    assert rows[0]["margin"] == pytest.approx(0.05) and rows[0]["run_id"] and len(rows[0]["fingerprint"]) == 12
    run(output, tmp_path / "all.parquet", where="score > 0")
    assert pq.read_table(tmp_path / "all.parquet")["split"].to_pylist() == [None] * 3 + ["val"] * 3


def test_rejects_are_exported_with_their_reasons(tmp_path: Path, output: Folder) -> None:
    run(output, tmp_path / "list.csv", rejects=True, where="reason != 'empty'")
    with (tmp_path / "list.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["uri"], row["reason"], row["stage"], row["label"]) == ("s3://p/r1.jpg", "truncated", "decode", "")


def test_a_list_that_a_person_filled_in_is_a_labelled_list(tmp_path: Path) -> None:
    make(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    rows = [label(f"{tmp_path}/{n}.jpg", input_split="val") for n in (1, 2, 3)]
    output = write(tmp_path / "out", rows, carried=[SPLIT])
    run(output, tmp_path / "list.csv", sample=3, seed=1)
    with (tmp_path / "list.csv").open(newline="") as file:
        filled = [{**row, "label": "dog" if "2.jpg" in row["uri"] else ""} for row in csv.DictReader(file)]
    with (tmp_path / "filled.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(filled[0]))
        writer.writeheader()
        writer.writerows(filled)
    assert labels(tmp_path / "filled.csv", split="val", schemes="file") == {
        "1.jpg": None,
        "2.jpg": "dog",
        "3.jpg": None,
    }


def test_a_sample_is_that_of_its_seed_and_draws_evenly(tmp_path: Path) -> None:
    names = [f"s3://p/{n}.jpg" for n in range(400)]
    output = write(tmp_path / "out", *([label(uri) for uri in names[at : at + 100]] for at in range(0, 400, 100)))
    backwards = write(tmp_path / "backwards", [label(uri) for uri in reversed(names)])
    first = run(output, tmp_path / "1.jsonl", sample=50)
    assert first.seed is not None and first.count == 50 and first.candidates == 400
    run(backwards, tmp_path / "2.jsonl", sample=50, seed=first.seed)
    drawn = uris(tmp_path / "1.jsonl")
    assert uris(tmp_path / "2.jsonl") == drawn and len(set(drawn)) == 50
    counts = np.zeros(400)
    table = pa.table({"uri": names})
    for seed in range(400):
        counts[np.argsort(random_keys(table, seed))[:50]] += 1
    assert abs(counts - 50).max() < 5 * np.sqrt(50 * 7 / 8), "each image is drawn as often as any other"


def test_more_than_there_are_gives_all_and_none_gives_an_empty_file(tmp_path: Path, output: Folder) -> None:
    assert run(output, tmp_path / "1.csv", sample=100).count == 6
    for suffix in (".csv", ".jsonl", ".parquet"):
        assert run(output, tmp_path / f"none{suffix}", where="score > 2", uncertain=3).count == 0
        assert uris(tmp_path / f"none{suffix}") == []


def test_only_as_many_rows_as_are_needed_are_kept() -> None:
    smallest, random = Smallest(10), np.random.default_rng(0)
    keys = random.random((50, 20))
    for part in keys:
        chosen = smallest.candidates(part)
        smallest.add(part[chosen], pa.table({"key": part[chosen]}))
        assert smallest._rows is not None and len(smallest._rows) <= 30
    rows = smallest.rows()
    assert rows is not None and rows["key"].to_pylist() == sorted(keys.ravel())[:10] and smallest.seen == 1_000


def test_uncertain_images_are_diverse_by_embedding(tmp_path: Path) -> None:
    random, groups = np.random.default_rng(0), np.eye(5)
    rows = []
    for n in range(40):  # 36 of one kind with the smallest margins, and one of each other kind
        kind = 0 if n < 36 else n - 35
        embedding = groups[kind] + random.normal(0, 0.01, 5)
        rows.append(label(f"s3://p/{kind}-{n}.jpg", 0.5, 0.5 - n / 100, embedding=embedding))
    output = write(tmp_path / "out", rows[20:], rows[:20], features=5)
    summary = run(output, tmp_path / "list.csv", uncertain=5)
    found = uris(tmp_path / "list.csv")
    assert {uri.split("/")[-1][0] for uri in found} == set("01234"), "one of each kind, not five of one kind"
    assert found[0] == "s3://p/0-0.jpg", "the most uncertain one is always among them"
    assert "diverse by embedding" in str(summary) and pool_size(5) == 50


def test_equal_embeddings_do_not_choose_a_row_twice() -> None:
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(20, np.float16)), 2)
    rows = pa.table({"uri": [str(n) for n in range(10)], "embedding": numbers})
    assert len(set(diverse(rows, 4)["uri"].to_pylist())) == 4


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_odd_names_and_labels_survive(tmp_path: Path, suffix: str) -> None:
    names = [
        "a,b.jpg",
        'say "x".jpg',
        "line\nend.jpg",
        "cr\rlf\r\n.jpg",
        "50%25 #1?.jpg",
        "عربي ü.jpg",
        "<b>'.jpg",
        "=1+1.jpg",
    ]
    make(tmp_path / "in", *names)
    rows = [label(f"{tmp_path}/in/{name}", input_note=f'{name}; "x",\n') for name in names]
    output = write(tmp_path / "out", rows, carried=[pa.field("input_note", pa.string())])
    run(output, tmp_path / f"list{suffix}", where="score > 0")
    found = recognised(tmp_path / f"list{suffix}")
    assert [(row["uri"], row["input_note"]) for row in found] == [(row["uri"], row["input_note"]) for row in rows]
    assert {row["input_label"] for row in found} <= {None, ""}


def test_values_that_json_lacks_are_null_or_text(tmp_path: Path) -> None:
    fields = [
        pa.field("input_n", pa.float64()),
        pa.field("input_b", pa.binary()),
        pa.field("input_l", pa.list_(pa.float64())),
    ]
    row = label("s3://p/1.jpg", input_n=float("nan"), input_b=b"\xff\x00", input_l=[1, float("inf")])
    output = write(tmp_path / "out", [row], carried=fields)
    run(output, tmp_path / "list.jsonl", where="score > 0")

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    (line,) = (tmp_path / "list.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=refuse)
    assert (values["n"], values["b"], values["l"]) == (None, "/wA=", [1, None])


@pytest.mark.parametrize(
    ("selection", "to", "message"),
    [
        ({}, "x.csv", "which images"),
        ({"uncertain": 3, "rejects": True}, "x.csv", "--uncertain and --rejects exclude each other"),
        ({"uncertain": 0}, "x.csv", "at least 1"),
        ({"rejects": True, "seed": 3}, "x.csv", "--seed needs --sample"),
        ({"sample": 3, "seed": -1}, "x.csv", "--seed -1"),
        ({"rejects": True}, "x.xlsx", "ends with .csv, .jsonl or .parquet"),
        ({"rejects": True, "where": "score < 1"}, "x.csv", "no column 'score'"),
        ({"uncertain": 3}, "there.csv", "exists, and is not overwritten"),
    ],
)
def test_wrong_options_are_refused_and_leave_no_file(
    tmp_path: Path, output: Folder, selection: dict[str, Any], to: str, message: str
) -> None:
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(UsageError, match=message):
        run(output, tmp_path / to, **selection)
    assert (tmp_path / "there.csv").read_text() == "mine" and not (tmp_path / "x.csv").exists()


def test_a_place_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is .* the --output of a classification"):
        run(tmp_path / "nothing", tmp_path / "x.csv", rejects=True)


def test_from_and_to_a_bucket(tmp_path: Path, s3: S3Server) -> None:
    folder = Folder(s3.stores(), f"s3://out/export/{tmp_path.name}")
    write(folder, [label(f"s3://p/{n}.jpg", 0.5, 0.5 - n / 20) for n in range(9)])
    config = Config()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        selection = Selection(uncertain=2)
        export(folder.uri, folder.at("lists/1.parquet"), config, selection)
        with pytest.raises(UsageError, match="exists"):
            export(folder.uri, folder.at("lists/1.parquet"), config, selection)
    rows = pq.read_table(pa.BufferReader(folder.read("lists/1.parquet")))
    assert rows["uri"].to_pylist() == ["s3://p/0.jpg", "s3://p/1.jpg"]


def test_columns_whose_types_differ_between_parts_become_text(tmp_path: Path) -> None:
    def part(values: Sequence[Any], type_: pa.DataType, name: str) -> None:
        rows = [label(f"s3://p/{name}{n}.jpg", input_n=value) for n, value in enumerate(values)]
        write(tmp_path / "out", rows, carried=[pa.field("input_n", type_)], success=False)

    part([1, 2], pa.int64(), "a")
    part(["x"], pa.string(), "b")
    run(tmp_path / "out", tmp_path / "list.parquet", where="score > 0")
    assert pq.read_table(tmp_path / "list.parquet")["n"].to_pylist() == ["1", "2", "x"]

"""Labels and splits of ordinary, messy inputs: the dry run of training shows them, or refuses with the option that decides.

Each case is a set as people have it. The right answer is in `LABELS`: rows of the printed table.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.commands import train
from tests.unit.pictures import encode, scene


def picture(seed: int = 0) -> bytes:
    return encode(scene(32, 32, seed=seed), "JPEG")


def folders(**counts: int) -> Callable[[Path], Path]:
    """Return a function that creates folders of images; `__` in a name means `/`."""

    def make(place: Path) -> Path:
        seed = 0
        for name, count in counts.items():
            folder = place / name.replace("__", "/")
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (folder / f"{number}.jpg").write_bytes(picture(seed := seed + 1))
        return place

    return make


def table(header: str, *lines: str, name: str = "list.csv") -> Callable[[Path], Path]:
    """Return a function that creates a table of the images p/0.jpg … p/7.jpg in one folder."""

    def make(place: Path) -> Path:
        folders(p=8)(place)
        (place / name).write_text("\n".join([header, *lines]) + "\n")
        return place / name

    return make


def tar(members: Mapping[str, bytes], name: str = "a.tar", mode: str = "w") -> Callable[[Path], Path]:
    """Return a function that creates a tar; empty members become images."""

    def make(place: Path) -> Path:
        place.mkdir(exist_ok=True)
        with tarfile.open(place / name, mode) as archive:
            for number, (member, content) in enumerate(members.items()):
                data = content or picture(number)
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return place / name

    return make


def with_json(record: str, folder: str = "day{n}") -> Callable[[Path], Path]:
    """Return a function that creates a tar of two images with a `.json` each, in which N becomes the number of the image."""
    members: dict[str, bytes] = {}
    for n in range(2):
        place = folder.format(n=n)
        members |= {f"{place}/{n}.jpg": b"", f"{place}/{n}.json": record.replace("N", str(n)).encode()}
    return tar(members)


@pytest.fixture
def dry_run(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run training with --dry-run; return the exit code, and the output or the last line of stderr."""

    def run(*inputs: Path, **settings: str) -> tuple[int, str]:
        argv = [part for place in inputs for part in ("--input", str(place))]
        argv += [part for key, value in settings.items() for part in ("--set", f"source.{key}={value}")]
        code = train.main([*argv, "--output", str(tmp_path / "model"), "--base", str(tiny_model), "--dry-run"])
        shown = capsys.readouterr()
        assert not (tmp_path / "model").exists()
        return code, shown.out if code == 0 else shown.err.strip().splitlines()[-1]

    return run


def counts(shown: str) -> dict[str, dict[str, int]]:
    """Return the printed table: images by class and split."""
    lines = shown.splitlines()
    splits = lines[0].split()[1:]
    result = {}
    for line in lines[1:]:
        match = re.fullmatch(rf"(.+?)((?: +[\d,]+){{{len(splits)}}})", line)
        if match is None:
            break
        result[match[1].strip()] = {s: int(n) for s, n in zip(splits, match[2].split(), strict=True) if n != "0"}
    return result


HALVES = [f"p/{n}.jpg,{'cat' if n % 2 else 'cup'}" for n in range(8)]
BOTH = {"cat": {"train": 4}, "cup": {"train": 4}}
TESTED = {"cat": {"train": 3, "test": 1}, "cup": {"train": 3, "test": 1}}
PAIR = {"cat": {"train": 2}, "cup": {"train": 2}}
SET = [f"set/{split}/{name}/{n}.jpg" for split in ("train", "val") for name in ("cat", "cup") for n in range(2)]
FAR = {f"d/{n}.jpg": b"" for n in range(4)} | {f"d/{n}.cls": (b"cat", b"cup")[n % 2] for n in range(4)}
DOT = {"./0.jpg": b"", "./0.cls": b"cat", "./1.jpg": b"", "./1.cls": b"cup", "./2.jpg": b""}
TWO = {"c0": {"train": 1}, "c1": {"train": 1}}

UNDERSTOOD = {
    "class folders": (folders(cat=2, cup=2), {}, PAIR),
    "flat test": (folders(train__cat=2, train__cup=2, test=3), {}, PAIR | {"without a label": {"test": 3}}),
    "flat val": (folders(train__cat=2, train__cup=2, val=3), {}, PAIR | {"without a label": {"val": 3}}),
    "one level deeper": (
        folders(set__train__cat=2, set__train__cup=2, set__valid__cat=1), {}, PAIR | {"cat": {"train": 2, "val": 1}},
    ),
    "patients, by depth": (
        folders(benign__P001=2, malignant__P002=3), {"label_depth": "1"},
        {"benign": {"train": 2}, "malignant": {"train": 3}},
    ),
    "kaggle": (
        table("id,breed", *[f"{n},{'cat' if n % 2 else 'cup'}" for n in range(8)]),
        {"uri_template": "p/{id}.jpg", "label_column": "breed"}, BOTH,
    ),
    "spaces in the header": (table("uri, label", *[row.replace(",", ", ") for row in HALVES]), {}, BOTH),
    "a byte order mark": (table("\ufeffuri,label", *HALVES), {}, BOTH),
    "other columns": (table("uri,label,Label", *[f"{row},x" for row in HALVES]), {}, BOTH),
    "a split column": (
        table("uri,label,split", *[f"{row},{'test' if n > 5 else ''}" for n, row in enumerate(HALVES)]), {}, TESTED,
    ),
    "is_test": (
        table("uri,label,is_test", *[f"{row},{n // 6}" for n, row in enumerate(HALVES)]),
        {"split_column": "is_test"}, TESTED,
    ),
    "joined tables": (table("uri,label", *HALVES[:4], "uri,label", *HALVES[4:]), {}, BOTH),
    "tab-separated": (table("uri\tlabel", *[row.replace(",", "\t") for row in HALVES], name="list.tsv"), {}, BOTH),
    "an archive as downloaded": (
        tar(dict.fromkeys(SET, b""), "set.tgz", "w:gz"), {},
        {"cat": {"train": 2, "val": 2}, "cup": {"train": 2, "val": 2}},
    ),
    "an archive named test": (
        tar(dict.fromkeys(SET, b""), "test.tgz", "w:gz"), {},
        {"cat": {"train": 2, "val": 2}, "cup": {"train": 2, "val": 2}},
    ),
    "sidecars far from their images": (tar(FAR), {}, PAIR),
    "a tar of the working folder": (
        tar(DOT), {}, {"cat": {"train": 1}, "cup": {"train": 1}, "without a label": {"train": 1}},
    ),
    "json with a byte order mark": (with_json('\ufeff{"label": "cN"}'), {}, TWO),
    "json with another key": (with_json('{"class": "cN"}'), {"label_column": "class"}, TWO),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_ordinary_inputs_are_recognised(tmp_path: Path, dry_run: Callable[..., tuple[int, str]], case: str) -> None:
    make, settings, right = UNDERSTOOD[case]
    code, shown = dry_run(make(tmp_path / "data"), **settings)
    assert code == 0, shown
    result = counts(shown)
    result.pop("all")
    assert result == right, shown


def with_column(name: str, value: str) -> Callable[[Path], Path]:
    return table(f"uri,label,{name}", *[f"{row},{value}" for row in HALVES])


LIST = 'p/0.jpg,"[""cat"", ""cup""]"'
CHOICES = "p/0.jpg,\"{'choices': ['cat', 'cup']}\""

REFUSED = {
    "copies beside the classes": (folders(cat=2, cup=2, train__cat=1, val__cat=1), {}, "source.splits=none"),
    "a class called train": (folders(car=2, plane=2, train=2), {}, "source.splits=none"),
    "images and folders of images": (folders(cats=2, cats__kaggle=1, dogs=2), {}, "source.label_depth=1"),
    "only flat splits": (folders(train=3, valid=2, test=2), {}, "holds 0 classes; 7 images without a label"),
    "yolo": (folders(images__train=3, images__val=2), {}, "holds 0 classes; 5 images without a label"),
    "parts of a set": (folders(ham_part_1=2, ham_part_2=2), {}, "look like numbered parts"),
    "one class in two places": (folders(a__cat=1, b__cat=1, b__dog=1), {}, "'cat' is in two places"),
    "only a test split": (folders(train=0, test__cat=2, test__dog=2), {}, "there is none to train on"),
    "another case": (table("uri,Label", *HALVES), {}, "Did you mean 'Label'? Set source.label_column=Label"),
    "another name": (table("uri,class", *HALVES), {}, "source.label_column=class"),
    "no label at all": (
        table("uri,width", *[f"p/{n}.jpg,3" for n in range(8)]), {}, "has no column 'label'; its other columns are: width",
    ),
    "one-hot": (table("uri,cat,cup", *[f"p/{n}.jpg,{n % 2},{1 - n % 2}" for n in range(8)]), {}, "no column 'label'"),
    "a split of another name": (with_column("subset", "train"), {}, "source.split_column=subset"),
    "a split in another case": (with_column("Split", "train"), {}, "source.split_column=Split"),
    "flags": (with_column("is_test", "0"), {}, "source.split_column=is_test"),
    "a word that is no split": (with_column("split", "trian"), {}, "'trian'"),
    "several classes an image": (table("uri,label", LIST, *HALVES[1:]), {}, "an image has only one label"),
    "choices": (table("uri,label", CHOICES, *HALVES[1:]), {}, "an image has only one label"),
    "two labels": (table("uri,label", *HALVES, "p/0.jpg,cat"), {}, "two values of 'label'"),
    "invisible": (
        table("uri,label", *[f"{row}{chr(0x200B) * (n < 2)}" for n, row in enumerate(HALVES)]), {}, "'cat\\u200b'",
    ),
    "open quotes": (
        table("uri,label,caption", *[f"{row},{chr(34) * (n in (1, 5))}text" for n, row in enumerate(HALVES)]), {}, "list.csv",
    ),
    "json as a list": (with_json('[{"label": "a"}]'), {}, "has a list"),
    "json with another key": (with_json('{"class": "a"}'), {}, "did you mean source.label_column=class?"),
    "json that is none": (with_json("label: a"), {}, "cannot be read"),
    "json with a split of another name": (with_json('{"label": "cN", "subset": "test"}'), {}, "source.split_column=subset"),
    "cls and json differ": (
        tar({"a/0.jpg": b"", "a/0.cls": b"cat", "a/0.json": b'{"label": "cup"}'}), {}, "have 'cat' and 'cup'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_input_is_refused(tmp_path: Path, dry_run: Callable[..., tuple[int, str]], case: str) -> None:
    make, settings, message = REFUSED[case]
    code, shown = dry_run(make(tmp_path / "data"), **settings)
    assert code == 2 and message in shown, shown


def test_class_folders_and_a_table_of_corrections_in_both_orders(
    tmp_path: Path, dry_run: Callable[..., tuple[int, str]]
) -> None:
    place = folders(cat=3, cup=3)(tmp_path / "data")
    (tmp_path / "fix.csv").write_text("uri,label\ndata/cat/0.jpg,cup\ndata/cup/1.jpg,cup\n")
    for inputs in ((place, tmp_path / "fix.csv"), (tmp_path / "fix.csv", place)):
        code, shown = dry_run(*inputs)
        assert code == 0 and counts(shown)["cup"] == {"train": 4} and counts(shown)["cat"] == {"train": 2}, shown
        assert "1 image with another label than the folder" in shown


def test_hugging_face_metadata_files(tmp_path: Path, dry_run: Callable[..., tuple[int, str]]) -> None:
    place = folders(train=4, test=2)(tmp_path / "data")
    for split, count in (("train", 4), ("test", 2)):
        lines = [f"{n}.jpg,{('cat', 'cup')[n % 2]}" for n in range(count)]
        (place / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]) + "\n")
    code, shown = dry_run(place)
    assert code == 0 and counts(shown)["cat"] == {"train": 2, "test": 1}, shown
    assert "labels from column 'label', splits from folders" in shown


def test_tables_named_after_splits(tmp_path: Path, dry_run: Callable[..., tuple[int, str]]) -> None:
    place = tmp_path / "data"
    place.mkdir()
    for name, count in (("train-00000-of-00001", 4), ("test-00000-of-00001", 2)):
        rows = {"image": [picture(n) for n in range(count)], "label": [("cat", "cup")[n % 2] for n in range(count)]}
        pq.write_table(pa.table(rows), place / f"{name}.parquet")
    code, shown = dry_run(place)
    assert code == 0 and counts(shown)["cup"] == {"train": 2, "test": 1}, shown


def test_a_late_key_of_json_lines_is_a_column(tmp_path: Path, dry_run: Callable[..., tuple[int, str]]) -> None:
    folders(monday=3, tuesday=3)(tmp_path)
    rows = [{"uri": "monday/0.jpg"}] * 10_001
    rows += [
        {"uri": f"{day}/{n}.jpg", "label": ("cat", "cup")[n % 2]} for n in range(1, 3) for day in ("monday", "tuesday")
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown = dry_run(tmp_path / "list.jsonl")
    assert code == 0, shown
    assert counts(shown) == {
        "cat": {"train": 2}, "cup": {"train": 2}, "without a label": {"train": 1}, "all": {"train": 5},
    }  # fmt: skip


def test_junk_and_files_without_a_suffix_are_not_classes(
    tmp_path: Path, dry_run: Callable[..., tuple[int, str]]
) -> None:
    place = folders(cat=2, cup=2)(tmp_path / "data")
    for junk in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash-1000/files"):
        folders(**{junk.replace("/", "__"): 1})(place / "cat" if junk.startswith(".i") else place)
    (place / "LICENSE").write_text("free")
    (place / "_SUCCESS").write_bytes(b"")
    (place / "NOTES").write_text("no image, and on no list of names")
    code, shown = dry_run(place)
    assert code == 0, shown
    assert counts(shown) == {"cat": {"train": 2}, "cup": {"train": 2}, "all": {"train": 4}}
    assert "1 object without a suffix ignored" in shown


def test_broken_links_are_rejects(tmp_path: Path, dry_run: Callable[..., tuple[int, str]]) -> None:
    place = folders(cat=2, cup=2)(tmp_path / "data")
    os.symlink(tmp_path / "gone.jpg", place / "cat" / "linked.jpg")
    code, shown = dry_run(place)
    assert code == 0 and counts(shown)["cat"] == {"train": 3}, shown

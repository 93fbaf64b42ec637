"""Labelled inputs as evaluation lists them: each image once, with the label and the split that the inputs declare."""

from __future__ import annotations

import io
import tarfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config.sections import SourceConfig, StorageConfig
from imgbatch.errors import InputError
from imgbatch.evaluation.classes import Classes
from imgbatch.evaluation.ground_truth import GroundTruth
from imgbatch.evaluation.inputs import is_of_split
from imgbatch.evaluation.labelled_inputs import Resolver, relisted
from imgbatch.evaluation.tar_members import TarMembers
from imgbatch.ledger.part_file import Footer, encode
from imgbatch.models import imagenet
from imgbatch.schema import LABELS, LISTING, REJECTS
from imgbatch.sources.labelled import TRUTH
from imgbatch.sources.recognise import recognise
from imgbatch.sources.tars import read_members, read_sidecars
from imgbatch.storage.stores import Folder, Stores
from tests.unit.pictures import encode as encode_picture
from tests.unit.pictures import scene

FRUIT = ("Gala", "Fuji", "Lime", "Plum", "Kiwi")
STORES = Stores(StorageConfig(), {})


def listed(*places: Path, split: str | None = None, **config: Any) -> tuple[pa.Table, list[str]]:
    """Return what is listed of a split, and the lines of the table that is shown."""
    source_config = SourceConfig(**config)
    sources = recognise(STORES, [str(place) for place in places], source_config)
    with relisted(STORES, sources, source_config, partial(is_of_split, split), splits=split is not None) as inputs:
        tables = [pa.Table.from_batches([listing.batch]) for listing in inputs.source.list_images()]
        return pa.concat_tables(tables, promote_options="permissive"), inputs.resolver.lines()


def labels(*places: Path, **more: Any) -> dict[str, str | None]:
    """Return the label of each image, by its name."""
    table, _ = listed(*places, **more)
    return {row["uri"].rpartition("/")[2]: row[TRUTH] for row in table.to_pylist()}


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def tar_of(place: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(place, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return place


def test_the_label_is_the_folder_or_a_column(tmp_path: Path) -> None:
    make(tmp_path / "in", "Gala/1.jpg", "more/Fuji/2.jpg")
    assert labels(tmp_path / "in") == {"1.jpg": "Gala", "2.jpg": "Fuji"}
    (tmp_path / "t.csv").write_text("uri,label,split\nin/Gala/1.jpg,Fuji,val\n")
    assert labels(tmp_path / "t.csv") == {"1.jpg": "Fuji"}
    table, _ = listed(tmp_path / "t.csv")
    assert not [name for name in table.column_names if "@" in name]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("uri,label\n1.jpg,Gala\n2.jpg,gala\n3.jpg,gala\n", r"2 images with labels .* 'gala', did you mean 'Gala'\?"),
        ("uri,label\n1.jpg,Durian\n", r"1 image with .* 'Durian'\. It has 5, such as 'Gala'"),
        ("uri,label\n1.jpg,Gala\n2.jpg,\n", r"1 image without a label, such as .*2\.jpg"),
        ("uri\nx/1.jpg\n", r"has no column 'label'"),
    ],
)
def test_labels_that_are_no_class_of_the_model_are_named(tmp_path: Path, manifest: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(manifest)
    classes = Classes(FRUIT, "fruit")
    with pytest.raises(InputError, match=message):
        for batch in listed(tmp_path / "t.csv")[0].to_batches():
            classes.truths(batch)
        classes.require_known()


IMAGENET = imagenet.imagenet_labels()


@pytest.mark.parametrize(
    ("label_is", "names", "expected"),
    [
        ("name", ["n02123045", "tabby", "n01440764", "tench", "n15075141"], [281, 281, 0, 0, 999]),
        ("name", ["n02012849", "n03126707", "n03710637", "n03710721"], [134, 517, 638, 639]),
        (
            "name",
            ["crane"],
            r"'crane', which may be 'crane \(bird\)' \(n02012849\) or 'crane \(machine\)' \(n03126707\)",
        ),
        ("name", ["n99999999"], r"1 image with labels that are unknown to it: 'n99999999'\. It has"),
        (
            "name",
            ["281"],
            r"'281', the number of 'tabby'\?\. With --set source\.label_is=index, numbers are class numbers",
        ),
        ("index", ["281", "0", "0999"], [281, 0, 999]),
        ("index", ["1", "1000"], r"no class numbers of it: '1000'\. .* are 0 to 999, .* ILSVRC's from 1 on"),
        (
            "index",
            ["tabby", "-1", "1.5"],
            r"3 images with labels that are no class numbers of it: 'tabby', '-1', '1\.5'",
        ),
    ],
)
def test_classes_of_imagenet_may_be_wordnet_ids_or_with_an_option_numbers(
    label_is: str, names: list[str], expected: list[int] | str
) -> None:
    classes = Classes(IMAGENET, "it", label_is=label_is)
    numbers = classes.truths(pa.table({"uri": names, TRUTH: names})).tolist()
    if isinstance(expected, list):
        classes.require_known()
        assert numbers == expected
    else:
        with pytest.raises(InputError, match=expected):
            classes.require_known()


def test_wordnet_ids_are_only_names_of_classes_of_imagenet() -> None:
    classes = Classes(IMAGENET[:10], "it")
    classes.truths(pa.table({"uri": ["1.jpg"], TRUTH: ["n01440764"]}))
    with pytest.raises(InputError, match=r"'n01440764', the WordNet id of 'tench'\?"):
        classes.require_known()
    for number, path in ((11821, "imagenet12k"), (21843, "imagenet21k_goog")):  # those of timm's larger heads
        synsets = imagenet.package_file("timm", f"data/_info/{path}_synsets.txt").read_text().split()
        assert imagenet.wordnet_ids(imagenet.labels_of(number, None)) == tuple(synsets)


def test_a_name_of_two_classes_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    schema = pa.schema([*LISTING, (TRUTH, pa.string())])
    rows = [{"uri": f"{number}.jpg", TRUTH: name} for number, name in enumerate(["maillot", "tench"])]
    GroundTruth([pa.RecordBatch.from_pylist(rows[1:], schema=schema)], IMAGENET)
    assert not caplog.messages
    GroundTruth([pa.RecordBatch.from_pylist(rows, schema=schema)], IMAGENET)
    (message,) = caplog.messages
    assert "'maillot': it means n03710637 here, not n03710721 ('maillot, tank suit')" in message


def test_only_the_images_of_a_split_are_listed(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("uri,label,split\n1.jpg,Gala,train\n2.jpg,Lime,Test\n3.jpg,,\n4.jpg,Plum,val\n")
    place = make(tmp_path / "in", "test/Fuji/5.jpg", "train/Kiwi/6.jpg")
    assert labels(tmp_path / "list.csv", place, split="test") == {"2.jpg": "Lime", "5.jpg": "Fuji"}
    make(place, "0.tar", "test/1.tar", "train/2.tar")  # which may hold images of any split
    assert {"0.tar", "1.tar", "2.tar"} < labels(tmp_path / "list.csv", place, split="test").keys()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("2.jpg,Plum,\n1.jpg,Lime,\n", "1.jpg is listed more than once, with two values of 'label'"),
        ("1.jpg,Gala,test\n", "1.jpg is listed more than once, with two values of 'split'"),
        ("2.jpg,Plum,test\n", None),  # a row with a value counts before one without
        ("1.jpg,Gala,Training\n1.jpg, Gala ,\n", None),
    ],
)
def test_two_labels_or_two_splits_of_an_image_are_refused(tmp_path: Path, second: str, message: str | None) -> None:
    (tmp_path / "list.csv").write_text(f"uri,label,split\n1.jpg,Gala,train\n2.jpg,Plum,\n{second}")
    with pytest.raises(InputError, match=message) if message else nullcontext():
        listed(tmp_path / "list.csv", split="test")


@pytest.mark.parametrize("order", [1, -1])
def test_a_table_corrects_class_folders_in_any_order(tmp_path: Path, order: int) -> None:
    place = make(tmp_path / "in", "Gala/1.jpg", "Gala/2.jpg", "Fuji/3.jpg")
    (tmp_path / "fix.csv").write_text("uri,label\nin/Gala/2.jpg,Lime\nin/Fuji/3.jpg,\n")
    inputs = [place, tmp_path / "fix.csv"][::order]
    assert labels(*inputs) == {"1.jpg": "Gala", "2.jpg": "Lime", "3.jpg": "Fuji"}
    _, lines = listed(*inputs)
    assert "1 image with another label than the folder that holds them" in lines


def test_a_column_of_lists_is_no_label(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["1.jpg"], "label": [["Gala", "Fuji"]]}), tmp_path / "list.parquet")
    with pytest.raises(InputError, match="the column 'label' has"):
        listed(tmp_path / "list.parquet")


def test_row_groups_stay_whole_when_they_are_listed_again(tmp_path: Path) -> None:
    rows = {"image": [b"x"] * 30, "label": ["Gala", "Fuji"] * 15}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=10)
    sources = recognise(STORES, [str(tmp_path / "a.parquet")], SourceConfig())
    with relisted(STORES, sources, SourceConfig(), partial(is_of_split, None)) as inputs:
        batches = [listing for listing in inputs.source.list_images() if len(listing.batch)]
    assert [(len(listing.batch), listing.whole) for listing in batches] == [(10, True)] * 3


def test_objects_that_are_no_images_are_not_listed(tmp_path: Path) -> None:
    place = make(tmp_path / "in", "Fuji/1.jpg", "NOTES")
    (place / "Gala").mkdir()
    (place / "Gala" / "a1b2c3").write_bytes(encode_picture(scene(8, 8), "PNG"))
    assert labels(place) == {"1.jpg": "Fuji", "a1b2c3": "Gala"}
    assert "1 object without a suffix ignored: no images, by their bytes" in listed(place)[1]


FAR = {"day1/1.jpg": b"a", "day1/2.jpg": b"b", "day2/3.jpg": b"c"}
SAYS = {"day1/1.cls": b"Gala\n", "day1/2.json": b'{"label": "Fuji"}', "day2/3.cls": b"Lime"}


@pytest.mark.parametrize(
    "members", [FAR | SAYS, SAYS | FAR, {f"./{name}": data for name, data in (FAR | SAYS).items()}]
)
def test_sidecars_may_be_anywhere_in_the_tar(tmp_path: Path, members: dict[str, bytes]) -> None:
    tar = str(tar_of(tmp_path / "a.tar", members))
    prefix = "./" if "./day1/1.jpg" in members else ""
    rows, complete = read_members(STORES, tar, "images", max_images=10)
    assert complete and not read_members(STORES, tar, "images", max_images=2)[1]
    assert rows["cls"].to_pylist() == ["Gala", None, "Lime"] and rows["json"].to_pylist()[1] == '{"label": "Fuji"}'
    assert sorted(read_sidecars(STORES, tar, "images")) == ["day1/1", "day1/2", "day2/3"]

    output = Folder(STORES, str(tmp_path / "out"))
    uris = [f"{tar}#{prefix}{name}" for name in FAR]
    table = pa.Table.from_pylist([{"uri": uri, "run_id": "r", "model": "m"} for uri in uris], schema=LABELS)
    output.put("labels/part-00000001.parquet", encode(table, Footer("r", {}).metadata()))
    output.put("rejects/part-00000001.parquet", encode(REJECTS.empty_table(), Footer("r", {}).metadata()))
    config = SourceConfig()
    with relisted(STORES, recognise(STORES, [tar], config), config, partial(is_of_split, None)) as inputs:
        resolver: Resolver = inputs.resolver
    (labelled,) = TarMembers(output, resolver).labelled(None)
    assert labelled[TRUTH].to_pylist() == ["Gala", "Fuji", "Lime"]
    assert resolver.lines()[-1] == f"{tar}: labels from sidecars, splits from none"
    assert np.array(list(resolver.understood.counts.values())).sum() == 3


def test_folders_in_a_tar_are_classes_if_no_sidecar_has_a_label(tmp_path: Path) -> None:
    tar = str(tar_of(tmp_path / "a.tar", {"Gala/1.jpg": b"a", "Gala/1.txt": b"sweet", "Fuji/2.jpg": b"b"}))
    output = Folder(STORES, str(tmp_path / "out"))
    table = pa.Table.from_pylist(
        [{"uri": f"{tar}#{name}", "run_id": "r", "model": "m"} for name in ("Gala/1.jpg", "Fuji/2.jpg")], schema=LABELS
    )
    output.put("labels/part-00000001.parquet", encode(table, Footer("r", {}).metadata()))
    config = SourceConfig()
    with relisted(STORES, recognise(STORES, [tar], config), config, partial(is_of_split, None)) as inputs:
        (labelled,) = TarMembers(output, inputs.resolver).labelled(None)
    assert labelled[TRUTH].to_pylist() == ["Gala", "Fuji"]


@pytest.mark.parametrize(
    "members",
    [
        {"a/0.jpg": b"a", "labels/0.cls": b"Gala", "b/1.jpg": b"b"},
        {"a/img.001.jpg": b"a", "a/img.001.cls": b"Gala", "b/img.002.jpg": b"b", "b/img.002.cls": b"Fuji"},
    ],
)
def test_labels_in_a_tar_without_an_image_are_refused_as_ambiguous(tmp_path: Path, members: dict[str, bytes]) -> None:
    tar = str(tar_of(tmp_path / "a.tar", members))
    images = [name for name in members if name.endswith("jpg")]
    output = Folder(STORES, str(tmp_path / "out"))
    table = pa.Table.from_pylist(
        [{"uri": f"{tar}#{name}", "run_id": "r", "model": "m"} for name in images], schema=LABELS
    )
    output.put("labels/part-00000001.parquet", encode(table, Footer("r", {}).metadata()))
    for config in (SourceConfig(), SourceConfig(labels="folders")):
        with relisted(STORES, recognise(STORES, [tar], config), config, partial(is_of_split, None)) as inputs:
            members_of = TarMembers(output, inputs.resolver).labelled(None)
        if config.labels == "folders":
            assert [row for table in members_of for row in table[TRUTH].to_pylist()] == ["a", "b"]
        else:
            with pytest.raises(InputError, match=r"\.cls may hold a label, but no image has its key"):
                list(members_of)


def test_files_next_to_images_that_may_hold_labels_are_refused_as_ambiguous(tmp_path: Path) -> None:
    place = make(tmp_path / "in", "s0/0.jpg", "s0/0.cls", "s1/1.jpg")
    with pytest.raises(InputError, match=r"s0/0\.cls may hold labels"):
        listed(place)
    assert labels(place, labels="folders") == {"0.jpg": "s0", "1.jpg": "s1"}
    other = make(tmp_path / "other", "b1/0.jpg", "b2/1.jpg")
    (other / "metadata.csv").write_text("filename,label\nb1/0.jpg,Gala\nb2/1.jpg,Fuji\n")
    with pytest.raises(InputError, match=r"metadata\.csv may hold labels"):
        listed(other)
    assert labels(other, uri_column="filename") == {"0.jpg": "Gala", "1.jpg": "Fuji"}


def test_the_name_of_a_table_is_the_split_of_its_images(tmp_path: Path) -> None:
    place = make(tmp_path / "photos", "1.jpg", "2.jpg")
    (tmp_path / "train.csv").write_text("uri,label\nphotos/1.jpg,Gala\n")
    (tmp_path / "test.csv").write_text("uri,label\nphotos/2.jpg,Fuji\n")
    inputs = (place, tmp_path / "train.csv", tmp_path / "test.csv")
    assert labels(*inputs, split="test") == {"2.jpg": "Fuji"}
    (tmp_path / "test.csv").write_text("uri,label\nphotos/2.jpg,Fuji\nphotos/1.jpg,Gala\n")
    with pytest.raises(InputError, match="two values of 'split'"):
        listed(*inputs, split="test")


@pytest.mark.parametrize("column", ["Usage", "data_split", "phase"])
def test_a_column_whose_values_are_splits_is_refused_as_ambiguous(tmp_path: Path, column: str) -> None:
    (tmp_path / "t.csv").write_text(f"uri,label,{column}\n1.jpg,Gala,train\n2.jpg,Fuji,test\n")
    with pytest.raises(InputError, match=f"source.split_column={column}"):
        listed(tmp_path / "t.csv", split="test")
    assert len(listed(tmp_path / "t.csv")[0]) == 2, "where no split is asked for it does not matter"


@pytest.mark.parametrize("value", ["['Gala' 'Fuji']", "[None]", "{'a': None}", '["Gala"]', "[" * 2_000 + "]"])
def test_labels_that_are_lists_are_refused_in_any_notation(tmp_path: Path, value: str) -> None:
    pq.write_table(pa.table({"uri": ["1.jpg"], "label": [value]}), tmp_path / "list.parquet")
    with pytest.raises(InputError, match="an image has only one label"):
        listed(tmp_path / "list.parquet")


def test_brackets_alone_make_no_list_and_nan_is_no_label(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["1.jpg", "2.jpg"], "label": ["[unknown]", "Gala"]}), tmp_path / "a.parquet")
    assert labels(tmp_path / "a.parquet") == {"1.jpg": "[unknown]", "2.jpg": "Gala"}
    pq.write_table(pa.table({"uri": ["1.jpg", "2.jpg"], "label": [float("nan"), 1.5]}), tmp_path / "b.parquet")
    assert labels(tmp_path / "b.parquet") == {"1.jpg": None, "2.jpg": "1.5"}


def test_numbered_names_are_one_input(tmp_path: Path) -> None:
    for number in range(2):
        tar_of(
            tmp_path / f"x-{number}.tar", {f"imgs/{number}.jpg": b"a"} | ({"imgs/0.cls": b"Gala"} if not number else {})
        )
    sources = recognise(STORES, [str(tmp_path / "x-{0..1}.tar")], SourceConfig())
    assert [source.group for source in sources] == [0, 0]

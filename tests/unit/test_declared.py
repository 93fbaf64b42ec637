"""Where labels and splits come from: one origin for each input, and a refusal if several are possible."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from imgbatch.config.sections import SourceConfig
from imgbatch.errors import InputError
from imgbatch.schema import PARQUET, TAR
from imgbatch.sources.declared import Declaration, decide
from imgbatch.sources.label_summary import LabelSummary
from imgbatch.sources.labelled import OBJECT_OF, SPLIT, TABLE_OF, TRUTH, Columns
from imgbatch.sources.places import Places, Root
from imgbatch.sources.split_words import TEST, TRAIN, VAL

FOLDER = (Root("/in", "folder"),)


def rows(
    *paths: str, label: Any = None, split: Any = None, number: int = 0, table: bool = False, root: str = "/in"
) -> pa.Table:
    """Return rows of a listing: `a/b.jpg` is an object, `a/b.parquet#1` a row, `a/b.tar#m` a member, `a/b.tar` a tar."""
    count = len(paths)
    kinds = [PARQUET if ".parquet#" in p else TAR if ".tar" in p else None for p in paths]
    tars = [
        f"{root}/{p.partition('#')[0]}" if kind == TAR and "#" in p else None
        for p, kind in zip(paths, kinds, strict=True)
    ]
    own, none = pa.array([number] * count, pa.int32()), pa.nulls(count, pa.int32())
    values = [value if isinstance(value, list) else [value] * count for value in (label, split)]
    return pa.table(
        {
            "uri": [f"{root}/{p}" for p in paths], "container": pa.array(kinds, pa.string()),
            "tar": pa.array(tars, pa.string()),
            TRUTH: pa.array(values[0], pa.string()), SPLIT: pa.array(values[1], pa.string()),
            OBJECT_OF: none if table else own, TABLE_OF: own if table else none,
        }
    )  # fmt: skip


def decided(
    *tables: pa.Table, roots: tuple[Root, ...] = FOLDER, columns: tuple[Columns, ...] | None = None,
    images: Any = lambda uris: [True] * len(uris), **config: Any,
) -> Declaration:  # fmt: skip
    places = Places(roots)
    for table in tables:
        places.add(table)
    return decide(places, columns or tuple(Columns() for _ in roots), SourceConfig(**config), images)


def labels_and_splits(*tables: pa.Table, **more: Any) -> list[tuple[str | None, str]]:
    """Return the label and the split of each image."""
    declared, result = decided(*tables, **more), []
    for table in tables:
        labels, splits = declared.apply(table)
        result += [(a, ("train", "val", "test")[b]) for a, b in zip(labels.to_pylist(), splits.tolist(), strict=True)]
    return result


def refused(*tables: pa.Table, **more: Any) -> str:
    with pytest.raises(InputError) as error:
        labels_and_splits(*tables, **more)
    return str(error.value)


def test_class_folders_are_the_labels_and_split_folders_the_splits() -> None:
    assert labels_and_splits(rows("cat/1.jpg", "dog/2.jpg")) == [("cat", "train"), ("dog", "train")]
    splits = labels_and_splits(rows("train/cat/1.jpg", "Valid/cat/2.jpg", "test_set/dog/3.jpg", "train2017/dog/4.jpg"))
    assert splits == [("cat", "train"), ("cat", "val"), ("dog", "test"), ("dog", "train")]
    deeper = labels_and_splits(rows("set/train/cat/1.jpg", "set/val/dog/2.jpg"))
    assert deeper == [("cat", "train"), ("dog", "val")]


@pytest.mark.parametrize(
    "paths",
    [
        ("train/cat/1.jpg", "train/cup/2.jpg", "test/3.jpg"),
        ("set/train/cat/1.jpg", "set/train/cup/2.jpg", "set/testing/3.jpg"),
        ("train/cat/1.jpg", "train/cup/2.jpg", "test2017/3.jpg"),
    ],
)
def test_images_directly_in_a_split_folder_have_no_label(paths: tuple[str, ...]) -> None:
    assert labels_and_splits(rows(*paths)) == [("cat", "train"), ("cup", "train"), (None, "test")]


@pytest.mark.parametrize("kind", ["", "images/"])
def test_split_folders_are_not_classes(kind: str) -> None:
    flat = rows(f"{kind}train/1.jpg", f"{kind}val/2.jpg")
    assert labels_and_splits(flat) == [(None, "train"), (None, "val")]
    by_class = rows("cat/train/1.jpg", "dog/test/2.jpg")
    assert labels_and_splits(by_class) == [(None, "train"), (None, "test")], (
        "whether cat is a class is for the user to say"
    )
    assert labels_and_splits(by_class, label_depth=1) == [("cat", "train"), ("dog", "test")]


@pytest.mark.parametrize(
    "paths",
    [
        ("cat/1.jpg", "train/cat/1.jpg", "test/cat/2.jpg"),  # copies of the class folders
        ("airplane/1.jpg", "car/2.jpg", "train/3.jpg"),  # a class that is called like a split
        ("vehicles/train/1.jpg", "vehicles/car/2.jpg"),
    ],
)
def test_images_next_to_split_folders_are_refused(paths: tuple[str, ...]) -> None:
    message = refused(rows(*paths))
    assert "has split folders" in message and "source.splits=none" in message
    if not paths[0].startswith("cat"):  # a user may say that train is a class, though not that cat is two
        assert [label for label, _ in labels_and_splits(rows(*paths), splits="none")] == [
            path.split("/")[-2] for path in paths
        ]


def test_a_split_word_is_a_class_only_with_source_labels() -> None:
    paths = rows("train/test/1.jpg", "train/cat/2.jpg")
    assert "source.labels=folders" in refused(paths)
    assert [label for label, _ in labels_and_splits(paths, labels="folders")] == ["test", "cat"]


@pytest.mark.parametrize(
    ("paths", "depth"),
    [
        (("cats/1.jpg", "cats/from-kaggle/2.jpg", "dogs/3.jpg"), 1),
        (("a/cats/1.jpg", "a/cats/x/y/2.jpg", "a/dogs/3.jpg"), 2),
        (("train/cats/1.jpg", "train/cats/more/2.jpg", "train/dogs/3.jpg"), 1),
    ],
)
def test_a_folder_with_images_and_folders_is_refused(paths: tuple[str, ...], depth: int) -> None:
    assert f"source.label_depth={depth}" in refused(rows(*paths))
    assert [label for label, _ in labels_and_splits(rows(*paths), label_depth=depth)] == ["cats", "cats", "dogs"]


def test_the_innermost_folder_is_the_class_by_default() -> None:
    paths = rows("benign/P001/1.jpg", "malignant/P002/2.jpg")
    assert [label for label, _ in labels_and_splits(paths)] == ["P001", "P002"]
    assert [label for label, _ in labels_and_splits(paths, label_depth=1)] == ["benign", "malignant"]
    assert [label for label, _ in labels_and_splits(paths, label_depth=3)] == [None, None]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("a/cat/1.jpg", "b/cat/2.jpg"), "'cat' is in two places"),
        (("cat/1.jpg", "3.jpg"), "images are directly in /in"),
        (("images_part_1/1.jpg", "images_part_2/2.jpg"), "look like numbered parts"),
        (("batch1/1.jpg", "batch2/2.jpg"), "look like numbered parts"),
        (("2024-01-05/1.jpg", "2024-01-06/2.jpg"), "look like dates"),
    ],
)
def test_folders_that_may_not_be_classes_are_refused(paths: tuple[str, ...], message: str) -> None:
    assert message in refused(rows(*paths))


def test_numbers_are_classes() -> None:
    assert [label for label, _ in labels_and_splits(rows("1/a.jpg", "2/b.jpg"))] == ["1", "2"]
    assert [label for label, _ in labels_and_splits(rows("part_1/a.jpg", "part_2/b.jpg"), labels="folders")] == [
        "part_1",
        "part_2",
    ]


def test_one_name_in_two_unicode_forms_is_one_class() -> None:
    assert [
        label for label, _ in labels_and_splits(rows("Caf\u00e9/1.jpg", "Cafe\u0301/2.jpg", "L\u00f6we/3.jpg"))
    ] == [
        "Café",
        "Café",
        "Löwe",
    ]
    across = labels_and_splits(rows("train/Caf\u00e9/1.jpg", "val/Cafe\u0301/2.jpg"))
    assert across == [("Café", "train"), ("Café", "val")]


def test_a_hash_in_a_folder_is_part_of_its_name() -> None:
    assert [label for label, _ in labels_and_splits(rows("C#/1.jpg", "#1/2.jpg", "v1.2/a#b.jpg"))] == [
        "C#",
        "#1",
        "v1.2",
    ]


def test_inputs_may_be_class_folders_or_split_folders() -> None:
    def two(first: str, second: str) -> tuple[Root, Root]:
        return Root(f"/in/{first}", "folder"), Root(f"/in/{second}", "folder", group=1)

    classes = labels_and_splits(rows("cat/1.jpg"), rows("dog/2.jpg", number=1), roots=two("cat", "dog"))
    assert classes == [("cat", "train"), ("dog", "train")]
    splits = labels_and_splits(rows("train/cat/1.jpg"), rows("test/cat/2.jpg", number=1), roots=two("train", "test"))
    assert splits == [("cat", "train"), ("cat", "test")]
    alone = labels_and_splits(rows("test/cat/1.jpg", "test/dog/2.jpg"), roots=(Root("/in/test", "folder"),))
    assert [split for _, split in alone] == ["train", "train"], "a single input is what is meant"


def test_a_glob_and_an_object_have_the_class_of_their_folder() -> None:
    assert labels_and_splits(rows("cat/1.jpg"), roots=(Root("/in/cat", "glob"),)) == [("cat", "train")]
    assert labels_and_splits(rows("dog/1.jpg"), roots=(Root("/in", "object"),)) == [("dog", "train")]


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (("data/train-00000-of-00002.parquet#0", "data/test-00000-of-00001.parquet#0"), ["train", "test"]),
        (("training_0.tar#1.jpg", "test_0.tar#2.jpg"), ["train", "test"]),
        (("split=train/0.parquet#0", "split=val/0.parquet#0"), ["train", "val"]),
        (("latest.parquet#0", "contest.parquet#0"), ["train", "train"]),
        (("test/0.tar#1.jpg", "0.tar#2.jpg"), ["test", "train"]),
        (("set.tar#set/train/cat/1.jpg", "set.tar#set/val/cat/2.jpg"), ["train", "val"]),
        (("test.tar#set/train/cat/1.jpg", "test.tar#set/test/cat/2.jpg"), ["train", "test"]),
        (("a.tar#./train/cat/1.jpg", "a.tar#./dev/cat/2.jpg"), ["train", "val"]),
    ],
)
def test_split_words_in_tables_and_archives(paths: tuple[str, ...], splits: list[str]) -> None:
    labelled = rows(*paths, label=["a", "b"])
    assert [split for _, split in labels_and_splits(labelled)] == splits
    assert [split for _, split in labels_and_splits(labelled, splits="none")] == ["train", "train"]


def test_a_split_word_in_the_name_of_an_image_is_ignored() -> None:
    assert [split for _, split in labels_and_splits(rows("cat/test_1.jpg", "dog/val.jpg"))] == ["train", "train"]


def test_a_folder_and_a_file_with_different_splits_are_refused() -> None:
    message = refused(rows("test/train-0.tar#1.jpg", label="a"))
    assert "source.splits=folders or source.splits=names" in message
    assert [split for _, split in labels_and_splits(rows("test/train-0.tar#1.jpg", label="a"), splits="names")] == [
        "train"
    ]


def test_splits_in_names_of_tables_and_folders_of_their_images() -> None:
    roots = (Root("/in", "manifest", "train.csv"), Root("/in", "manifest", "test.csv", group=1))
    columns = (Columns({"label"}, tables=True), Columns({"label"}, tables=True))
    tables = rows("p/1.jpg", label="a", table=True), rows("p/2.jpg", label="a", table=True, number=1)
    assert [split for _, split in labels_and_splits(*tables, roots=roots, columns=columns)] == ["train", "test"]
    listed = rows("p/train/1.jpg", "p/test/2.jpg", label="a", table=True)
    roots, columns = (Root("/in", "manifest", "list.csv"),), (Columns({"label"}, tables=True),)
    assert [split for _, split in labels_and_splits(listed, roots=roots, columns=columns)] == ["train", "test"]


def test_columns_take_precedence_over_folders() -> None:
    columns = (Columns({"label", "split"}, tables=True),)
    listed = rows("test/cat/1.jpg", "camera1/2.jpg", label=["cup", None], split=["", "Validation "])
    assert labels_and_splits(listed, columns=columns) == [("cup", "train"), (None, "val")]


def test_unknown_values_of_a_split_column_are_refused() -> None:
    columns = (Columns({"split"}, tables=True),)
    assert "'trian'" in refused(rows("a/1.jpg", "b/2.jpg", split=["train", "trian"]), columns=columns)
    flag = (Columns({"is_test"}, tables=True),)
    listed = rows("a/1.jpg", "b/2.jpg", split=["0", "1"])
    assert [split for _, split in labels_and_splits(listed, columns=flag, split_column="is_test")] == ["train", "test"]


def test_in_a_tar_sidecars_or_folders_but_not_both() -> None:
    folders = labels_and_splits(rows("a.tar#cat/1.jpg", "a.tar#dog/2.jpg", "a.tar#3.jpg"))
    assert [label for label, _ in folders] == ["cat", "dog", None]
    sidecars = labels_and_splits(rows("a.tar#day1/1.jpg", "a.tar#day1/2.jpg", label=["cat", None]))
    assert [label for label, _ in sidecars] == ["cat", None]
    across = labels_and_splits(rows("a.tar#day1/1.jpg", "b.tar#day1/2.jpg", label=["cat", None]))
    assert [label for label, _ in across] == ["cat", None], "decided for the whole input"
    dots = labels_and_splits(rows("a.tar#./1.jpg", "a.tar#./cat/2.jpg"))
    assert [label for label, _ in dots] == [None, "cat"], "a dot is no class"


def test_a_label_of_another_input_takes_precedence_over_the_folder() -> None:
    roots = (*FOLDER, Root("/in", "manifest", "labels.csv", group=1))
    columns = (Columns(), Columns({"label"}, tables=True))
    listed = rows("cat/1.jpg", "cat/2.jpg", "dog/3.jpg", label=["dog", None, "dog"])
    declared = decided(listed, roots=roots, columns=columns)
    labels, _ = declared.apply(listed)
    assert labels.to_pylist() == ["dog", "cat", "dog"] and declared.overridden == 1


def test_labels_from_one_origin() -> None:
    listed = rows("cat/1.jpg", "dog/2.jpg", label=["x", None])
    assert [label for label, _ in labels_and_splits(listed, labels="folders")] == ["cat", "dog"]
    assert [label for label, _ in labels_and_splits(listed, labels="column")] == ["x", None]


def test_objects_without_a_suffix_are_checked_before_a_refusal() -> None:
    asked: list[str] = []

    def none_are(uris: list[str]) -> list[bool]:
        asked.extend(uris)
        return [False] * len(uris)

    listed = rows("cat/1.jpg", "dog/2.jpg", "NOTES", "cat/index")
    declared = decided(listed, images=none_are)
    labels, _ = declared.apply(listed)
    assert labels.to_pylist() == ["cat", "dog", None, None]
    assert sorted(asked) == ["/in/NOTES", "/in/cat/index"] and declared.ignored == set(asked)
    hashes = rows("cat/0a1b", "dog/2c3d")
    assert [label for label, _ in labels_and_splits(hashes, images=none_are)] == ["cat", "dog"]
    assert len(asked) == 2, "where no image has a suffix, none of them decides anything"


def test_an_unread_tar_is_a_place_without_images() -> None:
    listed = rows("test_0.tar", "training_0.tar")
    declared = decided(listed)
    assert declared.apply(listed)[1].tolist() == [TEST, TRAIN]


def test_the_summary_is_a_table() -> None:
    listed = rows(*(f"train/c{n:02d}/1.jpg" for n in range(22)), "val/c00/2.jpg", "test/3.jpg")
    declared, understood = decided(listed), LabelSummary()
    labels, splits = declared.apply(listed)
    understood.add(labels, splits, listed["uri"])
    lines = understood.lines(declared.origins)
    assert lines[0].split() == ["class", "train", "val", "test"]
    assert lines[1].split() == ["c00", "1", "1", "0"]
    assert lines[21].split() == ["2", "more", "classes", "2", "0", "0"]
    assert lines[22].split() == ["without", "a", "label", "0", "0", "1"] and lines[23].split() == [
        "all",
        "22",
        "1",
        "1",
    ]
    assert lines[24] == "/in: labels from folders, splits from folders"
    assert lines[25] == "1 image without a label, such as /in/test/3.jpg"
    assert understood.public(declared.origins)["classes_by_split"]["c00"] == {"train": 1, "val": 1}
    assert VAL in splits


FLAT = (Root("/in/photos", "folder"), Root("/in", "manifest", "labels.csv", group=1))


def test_a_folder_of_images_labelled_by_a_table_is_not_a_class() -> None:
    columns = (Columns(), Columns({"label"}, tables=True))
    listed = rows("photos/1.jpg", "photos/2.jpg", "photos/3.jpg", label=["cat", "dog", None])
    declared = decided(listed, roots=FLAT, columns=columns)
    assert declared.apply(listed)[0].to_pylist() == ["cat", "dog", None] and declared.overridden == 0


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("train", "test", "glob"),
        ("a/train", "a/test", "tar"),
        ("default/train", "default/test", "parquet"),
        ("train/images", "test/images", "folder"),
        ("test", "", "folder"),
    ],
)
def test_different_split_words_in_input_paths_are_splits(first: str, second: str, kind: str) -> None:
    roots = (Root(f"/in/{first}", kind), Root(f"/in/{second}".rstrip("/"), kind, group=1))
    member = {"tar": ".tar#1.jpg", "parquet": ".parquet#1"}.get(kind, "/cat/1.jpg")
    tables = rows(f"{first}/0{member}", label="a"), rows(f"{second}/1{member}".lstrip("/"), label="a", number=1)
    expected = ["test", "train"] if first == "test" else ["train", "test"]
    assert [split for _, split in labels_and_splits(*tables, roots=roots)] == expected
    assert [split for _, split in labels_and_splits(*tables, roots=roots, splits="none")] == ["train", "train"]


@pytest.mark.parametrize(
    "paths",
    [
        ("ILSVRC_img_train/cat/1.jpg", "ILSVRC_img_train/dog/2.jpg", "ILSVRC_img_val/3.jpg"),
        ("dogs-train/1.jpg", "dogs-test/2.jpg"),
        ("a.tar#my-train/cat/1.jpg", "a.tar#my-test/dog/2.jpg"),
    ],
)
def test_folders_that_may_be_splits_are_refused(paths: tuple[str, ...]) -> None:
    message = refused(rows(*paths))
    assert "source.splits=folders if they are, or source.splits=none" in message
    assert {split for _, split in labels_and_splits(rows(*paths), splits="folders")} == {
        "train",
        "val" if "val/3" in paths[-1] else "test",
    }
    assert {split for _, split in labels_and_splits(rows(*paths), splits="none")} == {"train"}


def test_one_class_with_a_split_word_in_its_name_is_a_class() -> None:
    assert [label for label, _ in labels_and_splits(rows("test_tube/1.jpg", "beaker/2.jpg"))] == ["test_tube", "beaker"]


@pytest.mark.parametrize(
    "paths",
    [
        ("a/b/train/cat/1.jpg", "a/b/test/cat/2.jpg"),
        ("x.tar#ILSVRC/Data/CLS/train/n01/1.jpg", "x.tar#ILSVRC/Data/CLS/val/n01/2.jpg"),
        ("a/b/train/0.parquet#1", "a/b/test/0.parquet#1"),
    ],
)
def test_deep_split_folders_are_refused(paths: tuple[str, ...]) -> None:
    assert "source.splits=folders (at any depth)" in refused(rows(*paths))
    assert len({split for _, split in labels_and_splits(rows(*paths), splits="folders")}) == 2


def test_images_of_a_table_have_the_split_of_any_folder_above_them() -> None:
    roots, columns = (Root("/in", "manifest", "list.csv"),), (Columns({"label"}, tables=True),)
    listed = rows("ds/images/train/x/1.jpg", "ds/images/test/x/2.jpg", "stray.jpg", label="a", table=True)
    assert [split for _, split in labels_and_splits(listed, roots=roots, columns=columns)] == ["train", "test", "train"]
    alone = rows("test/1.jpg", "test/2.jpg", label="a", table=True)
    assert [split for _, split in labels_and_splits(alone, roots=roots, columns=columns)] == ["train", "train"]


def test_one_class_in_two_places_of_an_archive_is_refused() -> None:
    assert "'cat' is in two places" in refused(rows("s.tar#images/cat/1.jpg", "s.tar#masks/cat/1.png"))
    assert [label for label, _ in labels_and_splits(rows("a.tar#a/cat/1.jpg", "b.tar#b/cat/2.jpg"))] == ["cat", "cat"]


def test_an_expanded_range_is_one_input() -> None:
    roots = (Root("/in", "tar"), Root("/in", "tar"))
    tables = rows("x-0.tar#imgs/1.jpg", label="cat"), rows("x-1.tar#imgs/2.jpg", number=1)
    assert [label for label, _ in labels_and_splits(*tables, roots=roots)] == ["cat", None]


def test_files_that_may_hold_labels_are_refused() -> None:
    columns = (Columns(sidecar="/in/s0/0.cls"),)
    message = refused(rows("s0/0.jpg", "s1/1.jpg"), columns=columns)
    assert "/in/s0/0.cls may hold labels" in message
    assert [
        label for label, _ in labels_and_splits(rows("s0/0.jpg", "s1/1.jpg"), columns=columns, labels="folders")
    ] == ["s0", "s1"]

"""Which class an image has, and which images are held out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.errors import InputError
from imgbatch.sources.labelled import SPLIT, TEST, TRAIN, VAL, splits_of
from imgbatch.train import labelled, splits
from imgbatch.train.labelled import GROUP, LABEL, NO_CLASS
from imgbatch.train.splits import ALWAYS, NEVER


def table(*paths: str, **columns: list) -> pa.Table:
    return pa.table({"uri": [f"/data/{path}" for path in paths], **{name: pa.array(v) for name, v in columns.items()}})


def test_a_column_says_the_class_and_an_empty_one_says_none() -> None:
    found = labelled.read(table("1", "2", "3", "4", **{LABEL: ["b", "a", "", None]}), ["/data/list.csv"])
    assert found.labels == ("a", "b")
    assert found.classes.tolist() == [1, 0, NO_CLASS, NO_CLASS]


def test_where_a_table_says_nothing_the_folders_below_an_input_do() -> None:
    paths = ["cat/1.jpg", "list/2.jpg", "cat/no#3.jpg", "elsewhere/4.jpg"]
    found = labelled.read(table(*paths, **{LABEL: [None, "dog", None, None]}), ["/data/cat", "/data/dogs"])
    assert [found.labels[c] if c >= 0 else None for c in found.classes] == ["cat", "dog", "cat", None]


def test_what_lies_in_a_tar_or_a_parquet_file_has_no_class_of_the_folder_around_it() -> None:
    paths = ["cat/1.jpg", "dog/2.jpg", "shards/0.parquet#3", "shards/0.tgz#4.jpg", "shards/torn.tar"]
    held = table(*paths, container=[None, None, "parquet", "tar", "tar"])
    assert labelled.read(held, ["/data"]).classes.tolist() == [0, 1, NO_CLASS, NO_CLASS, NO_CLASS]
    with pytest.raises(InputError, match="holds 0 classes"):
        labelled.read(held.slice(2), ["/data"])


def test_tars_and_parquet_files_have_the_split_of_the_folder_around_them() -> None:
    paths = ["test/0.tar", "0.tar", "Val/0.parquet#3", "train/test.tar#test/a.jpg", "test/x/0.tar#1.jpg", "test/1.jpg"]
    kinds = ["tar", "tar", "parquet", "tar", "tar", None]
    said = splits_of(table(*paths, container=kinds), ["/data"])
    assert said.tolist() == [TEST, TRAIN, VAL, TRAIN, TEST, TRAIN]
    nested = splits_of(
        table("test/val/cat/1.jpg", "more (+)/test/cat/1.jpg"), ["/data", "/data/test", "/data/more (+)"]
    )
    assert nested.tolist() == [VAL, TEST], "of inputs within each other the inner one says it"


def test_a_column_says_the_split_where_folders_say_the_class_and_without_it_a_folder_below_an_input_does() -> None:
    paths = ["test/cat/1.jpg", "val/dog/2.jpg", "cat/3.jpg", "dog/4.jpg"]
    found = labelled.read(table(*paths, **{SPLIT: ["train", None, "test", ""]}), ["/data"])
    assert found.splits.tolist() == [TRAIN, VAL, TEST, TRAIN]
    assert labelled.read(pa.table({"uri": ["/test/cat/1", "/test/dog/2"]}), []).splits.tolist() == [TRAIN, TRAIN]


def test_a_class_that_is_for_testing_alone_is_not_learned(caplog: pytest.LogCaptureFixture) -> None:
    labels = found([0, 1, 2, 2, -1], **{SPLIT: ["train", "val", "test", "test", "train"]})
    assert labels.labels == ("c0", "c1") and labels.classes.tolist() == [0, 1, NO_CLASS, NO_CLASS, NO_CLASS]
    assert "1 classes have images for testing alone and are not learned: c2" in caplog.text
    assert "1 images have no label" in caplog.text


def test_a_group_that_the_input_puts_into_two_splits_is_refused() -> None:
    split, group = ["train", "val", "train", "test"], ["a", "b", "c", "c"]
    with pytest.raises(InputError, match="group 'c' has images in the splits train and test"):
        found([0, 0, 1, 1], **{SPLIT: split, GROUP: group})
    assert found([0, 0, 1, 1], **{SPLIT: split, GROUP: ["a", "b", "", ""]}).splits.tolist() == [TRAIN, VAL, TRAIN, TEST]


def test_folders_say_it_else_and_the_first_may_say_the_split() -> None:
    paths = ["train/fruit/apple/1.jpg", "val/fruit/apple/2.jpg", "Test/fruit/lime/3.jpg", "train/fruit/lime/4.jpg"]
    found = labelled.read(table(*paths), ["/data"])
    assert found.labels == ("apple", "lime")
    assert found.splits.tolist() == [TRAIN, VAL, TEST, TRAIN]
    assert labelled.read(table("cat/1", "dog/2"), ["/data/cat", "/data"]).labels == (
        "cat",
        "dog",
    )  # given beside its parent


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["a/cat/1.jpg", "b/cat/2.jpg", "dog/3.jpg"], "'cat' stands in two places, /data/a/cat and /data/b/cat"),
        (["cat/1.jpg", "dog/2.jpg", "3.jpg"], "images lie in /data itself"),
        (["cat/1.jpg", "cat/2.jpg"], "holds 1 class (cat): at least two"),
        (["Cat/1.jpg", "cat/2.jpg", "cat/3.jpg"], "'Cat' (1 images) and 'cat' (2 images)"),
        (["big cat/1.jpg", "big  cat /2.jpg"], "differ in case or spaces alone"),
        (["big_cat/1.jpg", "big cat/2.jpg"], "give each class one spelling"),
    ],
)
def test_what_a_person_may_have_meant_otherwise_is_refused(paths: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        labelled.read(table(*paths), ["/data"])
    assert said in str(refused.value)


def test_a_split_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="'trian'"):
        labelled.read(table("1", "2", **{LABEL: ["a", "b"], SPLIT: ["train", "trian"]}), ["/data/list.csv"])


def found(classes: list[int], **more: list) -> labelled.Labelled:
    n = len(classes)
    columns = {LABEL: [None if c < 0 else f"c{c}" for c in classes], **{name: pa.array(v) for name, v in more.items()}}
    return labelled.read(table(*map(str, range(n)), **columns), ["/data/list.csv"])


def assigned(
    labels: labelled.Labelled, folds: int | None = None, seed: int = 0, unreadable: tuple[int, ...] = ()
) -> list:
    usable = np.ones(len(labels.classes), bool)
    usable[list(unreadable)] = False
    return splits.assign(labels, folds, seed, usable).tolist()


def test_a_named_val_split_is_the_one_fold_and_a_test_split_is_not_touched() -> None:
    labels = found([0, 0, 1, 1, 1], **{SPLIT: ["", "val", "train", "test", "VALID "]})
    assert assigned(labels) == [ALWAYS, 0, ALWAYS, NEVER, 0]


def test_a_class_that_can_only_be_chosen_on_is_refused() -> None:
    labels = found([0, 0, 1, 1], **{SPLIT: ["train", "val", "val", "val"]})
    with pytest.raises(InputError, match="1 classes have images in the val split and none to train on: c1"):
        assigned(labels)


def test_each_fold_has_its_share_of_each_class_as_runs_of_neighbours() -> None:
    classes = [0] * 50 + [1] * 20 + [2] * 3 + [3]
    fold = np.array(assigned(found(classes), folds=5))
    assert [np.bincount(fold[np.array(classes) == c], minlength=5).tolist() for c in (0, 1)] == [[10] * 5, [4] * 5]
    assert (np.diff(fold[:50]) != 0).sum() == 4  # neighbours stay together
    assert len(set(fold[70:73].tolist())) == 3 and fold[73] == ALWAYS  # of one image nothing can be held out
    assert assigned(found(classes), folds=5, seed=0) != assigned(found(classes), folds=5, seed=1)


def test_a_group_never_crosses_a_fold_and_a_class_in_one_group_is_trained_on() -> None:
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(40), 5))
    classes = (groups % 4).tolist()
    labels = found([*classes, 4, 4], **{GROUP: [f"g{g}" for g in groups] + ["only", "only"]})
    fold = np.array(assigned(labels, folds=5))
    for group in range(40):
        assert len(set(fold[:200][groups == group].tolist())) == 1
    assert fold[200:].tolist() == [ALWAYS, ALWAYS]
    for c in range(4):
        assert np.bincount(fold[:200][np.array(classes) == c], minlength=5).tolist() == [10] * 5


def test_groups_of_several_classes_never_hold_a_class_out_whole() -> None:
    # The two groups of class 0 are small beside what else is in them: where class 1 alone ruled, both went to one fold.
    groups = {"a": [0] * 30, "b": [0] + [1] * 20} | {f"c{i}": [1] * (100 if i == 0 else 80 - i // 5) for i in range(9)}
    classes = [c for members in groups.values() for c in members]
    names = [name for name, members in groups.items() for _ in members]
    for seed in range(20):
        fold = np.array(assigned(found(classes, **{GROUP: names}), folds=5, seed=seed))
        assert (fold >= 0).any()
        for number in range(5):
            assert set(np.array(classes)[fold != number].tolist()) == {0, 1}, (
                f"seed {seed}: fold {number} holds a class"
            )


def test_images_without_a_label_or_that_cannot_be_read_are_in_no_fold() -> None:
    fold = assigned(found([0, 0, -1, 1, 1, 1]), unreadable=(1, 3))
    assert fold[:4] == [ALWAYS, NEVER, NEVER, NEVER] and min(fold[4:]) >= 0

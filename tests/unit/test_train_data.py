"""The classes of images, and the images that are held out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.errors import InputError
from imgbatch.sources.split_words import TEST, TRAIN, VAL, split_codes
from imgbatch.training import splits
from imgbatch.training.labels import NO_CLASS, Labelled, number_classes
from imgbatch.training.splits import ALWAYS, NEVER


def read(names: list, split: list | None = None, group: list | None = None) -> Labelled:
    """Number the classes of images with these labels, splits and groups."""
    numbers = split_codes(pa.array(split if split is not None else [None] * len(names), pa.string()))
    together = pa.array(group if group is not None else [None] * len(names), pa.string())
    return number_classes(pa.array(names, pa.string()), np.maximum(numbers, TRAIN), together)


def test_classes_are_numbered_in_the_order_of_their_names() -> None:
    labelled = read(["b", "a", None])
    assert labelled.labels == ("a", "b")
    assert labelled.classes.tolist() == [1, 0, NO_CLASS]


def test_a_class_with_test_images_only_is_not_learned(caplog: pytest.LogCaptureFixture) -> None:
    labels = labelled([0, 1, 2, 2, -1], split=["train", "train", "test", "test", "train"])
    assert labels.labels == ("c0", "c1") and labels.classes.tolist() == [0, 1, NO_CLASS, NO_CLASS, NO_CLASS]
    assert "1 class with test images only, which are not learned: c2" in caplog.text


def test_a_group_with_images_in_two_splits_is_refused() -> None:
    split, group = ["train", "val", "train", "test"], ["a", "b", "c", "c"]
    with pytest.raises(InputError, match="group 'c' has images in the splits train and test"):
        labelled([0, 0, 1, 1], split=split, group=group)
    assert labelled([0, 0, 1, 1], split=split, group=["a", "b", "", ""]).splits.tolist() == [TRAIN, VAL, TRAIN, TEST]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["cat", "cat"], None, "holds 1 class (cat): at least two"),
        ([None, None], None, "holds 0 classes; 2 images without a label"),
        (["Cat", "cat", "cat"], None, "'Cat' (1 image) and 'cat' (2 images)"),
        (["big cat", "big  cat"], None, "differ only in case, spaces"),
        (["big_cat", "big cat"], None, "give each one spelling"),
        (["cup", "cup\u200b"], None, "'cup\\u200b'"),
        (["cat", "dog"], ["test", "test"], "of the split test: there is none to train on"),
        (["cat", "dog"], ["val", "test"], "of the split val and test: there is none to train on"),
    ],
)
def test_labels_and_splits_that_training_cannot_use_are_refused(names: list, split: list | None, message: str) -> None:
    with pytest.raises(InputError) as refused:
        read(names, split)
    assert message in str(refused.value)


def test_groups_that_differ_only_in_case_are_refused() -> None:
    with pytest.raises(InputError, match="groups that differ only in case"):
        read(["a", "b"], group=["P001", "p001"])


def labelled(classes: list[int], split: list | None = None, group: list | None = None) -> Labelled:
    return read([None if c < 0 else f"c{c}" for c in classes], split, group)


def assigned(labels: Labelled, folds: int | None = None, seed: int = 0, unreadable: tuple[int, ...] = ()) -> list:
    usable = np.ones(len(labels.classes), bool)
    usable[list(unreadable)] = False
    return splits.assign(labels, folds, seed, usable).tolist()


def test_a_val_split_is_the_only_fold_and_a_test_split_is_not_used() -> None:
    labels = labelled([0, 0, 1, 1, 1], split=["", "val", "train", "test", "VALID "])
    assert assigned(labels) == [ALWAYS, 0, ALWAYS, NEVER, 0]


def test_a_class_without_training_images_is_refused() -> None:
    refused = "1 class with images in the val split and none to train on: c1"
    with pytest.raises(InputError, match=refused):
        labelled([0, 0, 1, 1], split=["train", "val", "val", "val"])
    with pytest.raises(InputError, match=refused):
        assigned(labelled([0, 0, 1, 1], split=["train", "val", "train", "val"]), unreadable=(2,))


def test_names_that_differ_in_case_between_training_and_testing_are_refused() -> None:
    with pytest.raises(InputError, match=r"'Cat' .* and 'cat'"):
        read(["cat", "dog", "Cat"], split=["train", "train", "test"])


def test_each_fold_has_equal_runs_of_neighbours_of_each_class() -> None:
    classes = [0] * 50 + [1] * 20 + [2] * 3 + [3]
    fold = np.array(assigned(labelled(classes), folds=5))
    assert [np.bincount(fold[np.array(classes) == c], minlength=5).tolist() for c in (0, 1)] == [[10] * 5, [4] * 5]
    assert (np.diff(fold[:50]) != 0).sum() == 4  # neighbours stay together
    assert len(set(fold[70:73].tolist())) == 3 and fold[73] == ALWAYS  # of one image nothing can be held out
    assert assigned(labelled(classes), folds=5, seed=0) != assigned(labelled(classes), folds=5, seed=1)


def test_a_group_is_in_one_fold_and_a_class_in_one_group_is_trained_on() -> None:
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(40), 5))
    classes = (groups % 4).tolist()
    labels = labelled([*classes, 4, 4], group=[f"g{g}" for g in groups] + ["only", "only"])
    fold = np.array(assigned(labels, folds=5))
    for group in range(40):
        assert len(set(fold[:200][groups == group].tolist())) == 1
    assert fold[200:].tolist() == [ALWAYS, ALWAYS]
    for c in range(4):
        assert np.bincount(fold[:200][np.array(classes) == c], minlength=5).tolist() == [10] * 5


def test_groups_of_several_classes_never_hold_out_all_images_of_a_class() -> None:
    # The two groups of class 0 are small beside what else is in them: where class 1 alone ruled, both went to one fold.
    groups = {"a": [0] * 30, "b": [0] + [1] * 20} | {f"c{i}": [1] * (100 if i == 0 else 80 - i // 5) for i in range(9)}
    classes = [c for members in groups.values() for c in members]
    names = [name for name, members in groups.items() for _ in members]
    for seed in range(20):
        fold = np.array(assigned(labelled(classes, group=names), folds=5, seed=seed))
        assert (fold >= 0).any()
        for number in range(5):
            assert set(np.array(classes)[fold != number].tolist()) == {0, 1}, (
                f"seed {seed}: fold {number} holds a class"
            )


def test_unlabelled_and_unreadable_images_are_in_no_fold() -> None:
    fold = assigned(labelled([0, 0, -1, 1, 1, 1]), unreadable=(1, 3))
    assert fold[:4] == [ALWAYS, NEVER, NEVER, NEVER] and min(fold[4:]) >= 0

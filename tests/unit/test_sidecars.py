"""The labels in `.cls` and `.json` members of a tar."""

from __future__ import annotations

import pytest

from imgbatch.config.sections import SourceConfig
from imgbatch.sources.sidecars import NO_SPLIT, REFUSED, read


@pytest.mark.parametrize(
    ("record", "label", "problem"),
    [
        ('{"label": "cat"}', "cat", None),
        ('\ufeff{"label": " cat "}', "cat", None),
        ('{"label": 7}', "7", None),
        ('{"label": null}', None, None),
        ('{"label": ""}', None, None),
        ('{"width": 3}', None, None),
        ('{"Label": "cat"}', None, "source.label_column=Label"),
        ('{"label": ["a", "b"]}', None, REFUSED),
        ("[1]", None, "has a list"),
        ("{", None, "cannot be read"),
        ("[" * 100_000, None, "cannot be read"),
        ('{"label": "cat\\ud83d"}', None, "cannot be read"),
        ('{"label": "cat", "subset": "test"}', "cat", NO_SPLIT),
    ],
)
def test_a_json_has_a_label_or_a_problem(record: str, label: str | None, problem: str | None) -> None:
    sidecars = read([None], [record], SourceConfig())
    assert sidecars.labels.to_pylist() == [label]
    (message,) = sidecars.problems.to_pylist()
    assert message is None if problem is None else problem in message


def test_a_cls_and_a_json_with_different_labels_are_refused() -> None:
    sidecars = read(["cat", "cat"], ['{"label": "dog"}', '{"label": "cat"}'], SourceConfig())
    assert sidecars.labels.to_pylist() == [None, "cat"]
    assert sidecars.problems[0].as_py().startswith(REFUSED) and sidecars.problems[1].as_py() is None


def test_split_and_group_are_read() -> None:
    sidecars = read([None], ['{"label": "a", "split": "val", "group": 3}'], SourceConfig())
    assert (sidecars.splits.to_pylist(), sidecars.groups.to_pylist()) == (["val"], ["3"])
    other = read([None], ['{"kind": "a", "fold": "val"}'], SourceConfig(label_column="kind", split_column="fold"))
    assert (other.labels.to_pylist(), other.splits.to_pylist()) == (["a"], ["val"])

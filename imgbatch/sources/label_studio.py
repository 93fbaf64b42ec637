"""Values: tasks of Label Studio's JSON export as rows of a labelled list.

A task has `data`, which is what was imported, and `annotations`, which is what people said. A row has the keys of `data`, and
a column for each control of the labelling config that chooses classes, under the name of the control. Predictions are never
taken as labels.

- Cancelled annotations (skipped tasks) and empty ones are ignored.
- If an annotation is marked as ground truth, only those that are count.
- Annotations that then disagree are refused.
- A key of `data` with the name of the column of labels is omitted: in a task without an annotation it would pass for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from imgbatch.sources import spelling


def is_task(value: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is a task of Label Studio.

    >>> is_task({"data": {"uri": "1.jpg"}, "annotations": []}), is_task({"uri": "1.jpg", "label": "cat"})
    (True, False)
    """
    said = (value.get("annotations"), value.get("predictions"))
    return isinstance(value.get("data"), dict) and any(isinstance(entries, list) for entries in said)


def row_of(task: Mapping[str, Any], label: str = "label") -> dict[str, Any]:
    """Return a task as a row; without an annotation it has no column of a control.

    Args:
        task: of the export.
        label: the column of the labels.

    Raises:
        ValueError: the annotations disagree, or one of them has several classes.

    >>> said = {"from_name": "label", "type": "choices", "value": {"choices": ["cat"]}}
    >>> row_of({"data": {"uri": "1.jpg"}, "annotations": [{"result": [said]}]})
    {'uri': '1.jpg', 'label': 'cat'}
    """
    labels = [_labels(annotation) for annotation in _valid(task.get("annotations"))]
    controls = dict.fromkeys(control for annotation in labels for control in annotation)
    row = {key: value for key, value in task["data"].items() if spelling.normalise(key) != label}
    return row | {control: _agreed(control, labels) for control in controls}


def _valid(annotations: Any) -> list[Mapping[str, Any]]:
    """Return the annotations that count."""
    entries = [entry for entry in _objects(annotations) if not entry.get("was_cancelled")]
    return [entry for entry in entries if entry.get("ground_truth")] or entries


def _labels(annotation: Mapping[str, Any]) -> dict[str, str]:
    """Return the class of each control in an annotation."""
    labels: dict[str, str] = {}
    for result in _objects(annotation.get("result")):
        kind, value = result.get("type"), result.get("value")
        if kind not in ("choices", "taxonomy") or not isinstance(value, dict):
            continue
        control, chosen = str(result.get("from_name")), value.get(kind)
        choices = [] if chosen is None else chosen if isinstance(chosen, list) else [chosen]
        names = [_name(choice) for choice in choices]
        if control in labels or len(names) > 1:
            given = [*([labels[control]] if control in labels else []), *names]
            raise ValueError(
                f"an annotation has {len(given)} classes for {control!r}, such as {given[0]!r} and {given[1]!r}: an image has "
                'one label. Use choice="single", or maxUsages="1" for a taxonomy'
            )
        if names:
            labels[control] = names[0]
    return labels


def _objects(values: Any) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _name(choice: Any) -> str:
    """Return the class of a choice: text, or in a taxonomy the last node of the path to it.

    Raises:
        ValueError: the choice has another form.
    """
    name = choice[-1] if isinstance(choice, list) and choice else choice
    if not isinstance(name, str):
        raise ValueError(
            f"an annotation has the choice {json.dumps(choice)[:100]}, which is neither text nor a path of texts"
        )
    return name


def _agreed(control: str, annotations: Sequence[Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(annotation[control] for annotation in annotations if control in annotation))
    if len(names) > 1:
        raise ValueError(
            f"two annotations disagree on {control!r}: {names[0]!r} and {names[1]!r}. Delete one of them in Label Studio, or "
            "mark the right one as ground truth, and export again"
        )
    return names[0]

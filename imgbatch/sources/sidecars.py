"""Values: the label, split and group in the `.cls` and `.json` members of a tar.

A `.cls` contains the class. A `.json` contains an object, whose key `label` (or `source.label_column`) is the class. Its keys
`split` and `group` are read like the columns of a table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from imgbatch.config.sections import SourceConfig
from imgbatch.config.worker import ReadOptions
from imgbatch.sources.spelling import near_miss, normalise, quoted

LABEL_SYNONYMS = ("class", "category", "target", "cls", "classname", "class_name", "label_name", "class_label")
"""Other names for a column of labels. A table or a `.json` with one of them and no `label` is refused with a hint."""

SPLIT_SYNONYMS = ("subset", "set", "is_test", "is_train", "is_val", "fold", "partition", "is_training_img")


@dataclass(frozen=True, slots=True)
class SidecarLabels:
    """The contents of the sidecars of n members."""

    labels: pa.Array
    """Null if the sidecars have no label."""
    splits: pa.Array
    groups: pa.Array
    problems: pa.Array
    """Why a label or a split could not be read although there may be one; else null. A problem that begins with REFUSED is
    always an error."""


REFUSED = "refused: "
NO_SPLIT = "split: "
"""Prefix of a problem that matters only if columns and keys may declare the split."""


def read(cls: Sequence[str | None], records: Sequence[str | None], config: SourceConfig | ReadOptions) -> SidecarLabels:
    """Return the label, split and group of members, from the text of their `.cls` and `.json`.

    >>> sidecars = read(["cat", None], [None, '{"class": "dog"}'], SourceConfig())
    >>> sidecars.labels.to_pylist(), sidecars.problems[1].as_py()
    (['cat', None], "the .json has no key 'label' but 'class': did you mean source.label_column=class?")
    """
    rows = [_read(text, record, config) for text, record in zip(cls, records, strict=True)]
    columns = list(zip(*rows, strict=True)) if rows else [()] * 4
    return SidecarLabels(*(pa.array(column, pa.string()) for column in columns))


def _read(text: str | None, record: str | None, config: SourceConfig | ReadOptions) -> tuple[str | None, ...]:
    fields, problem = _object(record) if record is not None else ({}, None)
    key = config.label_column or "label"
    values = [normalise(text) if text is not None else "", fields.get(key, "")]
    split, group = fields.get(config.split_column or "split", ""), fields.get("group", "")
    if nested := [value for value in (*values, split, group) if isinstance(value, list | dict)]:
        problem = f"{REFUSED}a .json has {json.dumps(nested[0])[:80]}: an image has one label, one split and one group"
        return None, None, None, problem
    labels = dict.fromkeys(value for value in values if value)
    if len(labels) > 1:
        problem = f"{REFUSED}.cls and .json have {' and '.join(map(quoted, labels))}: an image has one label"
        return None, None, None, problem
    label = next(iter(labels), None)
    if label:
        problem = None
    elif problem is None and key not in fields and (near := near_miss(key, list(fields), LABEL_SYNONYMS)):
        problem = f"the .json has no key {key!r} but {near!r}: did you mean source.label_column={near}?"
    if near := _near_split(fields, config):
        problem = (
            f"{NO_SPLIT}the .json has no key {config.split_column or 'split'!r} but {near!r}: did you mean "
            f"source.split_column={near}? Set source.splits=none if it has no split"
        )
    return label, split or None, group or None, problem


def _near_split(fields: dict[str, Any], config: SourceConfig | ReadOptions) -> str | None:
    key = config.split_column or "split"
    return None if key in fields else near_miss(key, list(fields), SPLIT_SYNONYMS)


def _object(text: str) -> tuple[dict[str, Any], str | None]:
    """Return the keys and values of a `.json`: scalars as text, lists and objects as they are; and what is wrong with it."""
    try:
        value = json.loads(text.lstrip("\ufeff"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be encoded
    except (ValueError, RecursionError) as error:
        return {}, f"the .json cannot be read: {error}"
    if not isinstance(value, dict):
        return {}, f"the .json has a {type(value).__name__}, not an object with the key 'label'"
    return {normalise(str(key)): _plain(entry) for key, entry in value.items()}, None


def _plain(value: Any) -> Any:
    if isinstance(value, list | dict):
        return value
    return "" if value is None else normalise(str(value))

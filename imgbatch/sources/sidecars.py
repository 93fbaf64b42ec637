"""Values: what `.cls` and `.json` members of a tar say of the image of their key.

A `.cls` holds the class. A `.json` holds an object, whose key `label` (or `source.label_column`) is the class; its keys `split`
and `group` are read like the columns of a table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from imgbatch.config.sections import SourceConfig
from imgbatch.config.worker import ReadOptions
from imgbatch.sources.spelling import near_miss, normalise, shown

ALSO_LABEL = ("class", "category", "target", "cls", "classname", "class_name", "label_name", "class_label")
"""Names that people give to a column of labels; a table or a `.json` with one of them and no `label` is asked about."""

ALSO_SPLIT = ("subset", "set", "is_test", "is_train", "is_val", "fold", "partition", "is_training_img")


@dataclass(frozen=True, slots=True)
class Said:
    """What the sidecars of n members say."""

    labels: pa.Array
    """Null where they say nothing."""
    splits: pa.Array
    groups: pa.Array
    problems: pa.Array
    """Why the sidecars give no label although they may hold one; null elsewhere. Those that begin with REFUSED are never
    passed over."""


REFUSED = "refused: "
NO_SPLIT = "split: "
"""What a problem begins with that matters only if columns and keys are asked for the split."""


def read(cls: Sequence[str | None], records: Sequence[str | None], config: SourceConfig | ReadOptions) -> Said:
    """Return the label, split and group of members, from the text of their `.cls` and `.json`.

    >>> said = read(["cat", None], [None, '{"class": "dog"}'], SourceConfig())
    >>> said.labels.to_pylist(), said.problems[1].as_py()
    (['cat', None], "the .json has no key 'label' but 'class': did you mean source.label_column=class?")
    """
    rows = [_read(text, record, config) for text, record in zip(cls, records, strict=True)]
    columns = list(zip(*rows, strict=True)) if rows else [()] * 4
    return Said(*(pa.array(column, pa.string()) for column in columns))


def _read(text: str | None, record: str | None, config: SourceConfig | ReadOptions) -> tuple[str | None, ...]:
    said, problem = _object(record) if record is not None else ({}, None)
    key = config.label_column or "label"
    values = [normalise(text) if text is not None else "", said.get(key, "")]
    split, group = said.get(config.split_column or "split", ""), said.get("group", "")
    if several := [value for value in (*values, split, group) if isinstance(value, list | dict)]:
        problem = (
            f"{REFUSED}a .json holds {json.dumps(several[0])[:80]}: an image has one label, one split and one group"
        )
        return None, None, None, problem
    named = dict.fromkeys(value for value in values if value)
    if len(named) > 1:
        problem = f"{REFUSED}.cls and .json say {' and '.join(map(shown, named))}: an image has one label"
        return None, None, None, problem
    label = next(iter(named), None)
    if label:
        problem = None
    elif problem is None and key not in said and (near := near_miss(key, list(said), ALSO_LABEL)):
        problem = f"the .json has no key {key!r} but {near!r}: did you mean source.label_column={near}?"
    if near := _near_split(said, config):
        problem = (
            f"{NO_SPLIT}the .json has no key {config.split_column or 'split'!r} but {near!r}: did you mean "
            f"source.split_column={near}? source.splits=none if it says no split"
        )
    return label, split or None, group or None, problem


def _near_split(said: dict[str, Any], config: SourceConfig | ReadOptions) -> str | None:
    wanted = config.split_column or "split"
    return None if wanted in said else near_miss(wanted, list(said), ALSO_SPLIT)


def _object(text: str) -> tuple[dict[str, Any], str | None]:
    """Return the keys and values of a `.json`: plain values as text, lists and objects as they are."""
    try:
        found = json.loads(text.lstrip("\ufeff"))
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        return {}, f"the .json cannot be read: {error}"
    if not isinstance(found, dict):
        return {}, f"the .json holds a {type(found).__name__}, not an object with the key 'label'"
    return {normalise(str(key)): _plain(value) for key, value in found.items()}, None


def _plain(value: Any) -> Any:
    if isinstance(value, list | dict):
        return value
    return "" if value is None else normalise(str(value))

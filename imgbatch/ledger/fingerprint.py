"""Values: fingerprints of runs, which decide whether the labels of two runs may be in one table.

A fingerprint contains everything that affects the labels: the model's digest, its preprocessing, and the options that change
answers. The footer of each part has the fingerprint of its run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from imgbatch.errors import OutputError

DEFAULTS: Mapping[str, Any] = {
    "top_k": 5,
    "answer.min_score": 0.5,
    "output.embeddings": False,
    "output.columns": [],
}
"""The value of a key that a fingerprint lacks; null for all other keys. This describes existing files, so a value is never
changed, even if the default of the option changes. A new option needs an entry only if null does not mean "as before"."""


def require_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str) -> None:
    """Refuse rows that were written with another fingerprint than ours.

    A key that is absent, null or has its value of `DEFAULTS` is the same in all three forms, so that an option that is
    added later does not invalidate outputs that were written before it.

    Raises:
        OutputError: with the keys that differ, and the remedy.
    """
    if different := differences(theirs, ours):
        shown = "; ".join(
            f"{key}: {their_value} there, {our_value} here" for key, (their_value, our_value) in different.items()
        )
        raise OutputError(
            f"{where} was written with another fingerprint ({shown}). Labels of two fingerprints do not belong in one "
            "table: give this run an --output of its own, e.g. with {model} in it"
        )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the keys in which two fingerprints differ, with both values as a message shows them.

    >>> differences({"top_k": 3}, {"answer.min_score": 0.5})
    {'top_k': ('3', 'default (5)')}
    """
    different = sorted(key for key in theirs.keys() | ours.keys() if _value(theirs, key) != _value(ours, key))
    return {key: (_short(theirs, key), _short(ours, key)) for key in different}


def short_digest(fingerprint: Mapping[str, Any]) -> str:
    """Return 12 hex digits that stand for a fingerprint, for people and for files of other tools.

    >>> short_digest({"top_k": 5, "weights": None}) == short_digest({})
    True
    """
    values = {key: value for key, value in fingerprint.items() if value is not None and value != DEFAULTS.get(key)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _value(fingerprint: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, the default if it is absent."""
    value = fingerprint.get(key)
    return DEFAULTS.get(key) if value is None else value


def _short(fingerprint: Mapping[str, Any], key: str) -> str:
    value = fingerprint.get(key)
    if value is None:
        return "default" if DEFAULTS.get(key) is None else f"default ({json.dumps(DEFAULTS[key])})"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

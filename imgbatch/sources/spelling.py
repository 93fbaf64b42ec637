"""Values: names that people write: their normal form, a comparison that ignores case and the like, and near misses.

Names of classes, labels, levels, splits and groups pass `normalised` wherever they are read, so that two Unicode forms of one
name, or a trailing space, never make two classes. Names that then still differ only in case, spaces, underscores or invisible
characters have the same `folded` form, and `require_distinct` refuses them.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.terminal.plurals import counted

_MAX_SHOWN = 5


def normalise(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), trimmed.

    >>> normalise(" Cafe\\u0301 ") == "Caf\\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name).strip()


def normalised(names: pa.Array) -> pa.Array:
    """Return names in NFC, trimmed; null stays null.

    >>> normalised(pa.array([" Gala", None, "Cafe\\u0301"])).to_pylist() == ["Gala", None, "Caf\\u00e9"]
    True
    """
    return pc.utf8_trim_whitespace(pc.utf8_normalize(names.cast(pa.string()), form="NFC"))


def folded(name: str) -> str:
    """Return a name without its differences in case, white space, underscores, invisible characters and Unicode forms.

    >>> folded("Granny_Smith\\u200b") == folded("granny  smith")
    True
    """
    text = unicodedata.normalize("NFKC", name)
    visible = "".join(char for char in text if unicodedata.category(char) not in ("Cf", "Cc") or char.isspace())
    return " ".join(visible.replace("_", " ").casefold().split())


def quoted(name: str) -> str:
    """Return a name in quotes, with invisible characters as escapes.

    >>> quoted("cup\\u200b"), quoted("Cafe\\u0301")
    ("'cup\\\\u200b'", "'Café'")
    """
    text = unicodedata.normalize("NFC", name)
    return "'" + "".join(repr(char)[1:-1] if unicodedata.category(char)[0] == "C" else char for char in text) + "'"


def similar_names(names: Iterable[str], counts: Mapping[str, int] | None = None) -> str:
    """Return a text with the names that have the same `folded` form, and their numbers of images; empty if there are none.

    >>> similar_names(["Gala", "gala", "Fuji"])
    "'Gala' and 'gala'"
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(folded(name), []).append(name)
    similar = [
        " and ".join(quoted(name) + (f" ({counted(counts[name], 'image')})" if counts else "") for name in group)
        for group in groups.values()
        if len(group) > 1
    ]
    more = f"; and {len(similar) - _MAX_SHOWN} more" if len(similar) > _MAX_SHOWN else ""
    return "; ".join(similar[:_MAX_SHOWN]) + more


def require_distinct(names: Iterable[str], what: str, counts: Mapping[str, int] | None = None) -> None:
    """Refuse names that have the same `folded` form.

    Args:
        names: normalised and distinct.
        what: a plural noun for the message, such as `labels`.
        counts: the number of images with each name, for the message.

    Raises:
        InputError: naming them.
    """
    if pairs := similar_names(names, counts):
        raise InputError(
            f"{what} that differ only in case, spaces or invisible characters: {pairs}: give each one spelling"
        )


def csv_problem(error: csv.Error) -> str:
    """Return the message for an error of Python's CSV parser."""
    if "field limit" in str(error):
        return f"a value is longer than {csv.field_size_limit():,} characters: is its quote closed?"
    return str(error)


def near_miss(wanted: str, names: Sequence[str], synonyms: Sequence[str] = ()) -> str | None:
    """Return the name that differs from `wanted` or a synonym only in case, spaces, `_`, `-` or a plural s; else None.

    Args:
        wanted: a name that is not in `names`.
        synonyms: other names for the same thing, such as `subset` for `split`.

    >>> near_miss("label", ["uri", " Labels"]), near_miss("split", ["uri", "is_test"], ["is_test"]), near_miss("uri", ["url"])
    (' Labels', 'is_test', None)
    """
    accepted = {_letters(name) for name in (wanted, *synonyms)}
    accepted |= {f"{name}s" for name in accepted}
    return next((name for name in names if _letters(name) in accepted), None)


def _letters(name: str) -> str:
    return folded(name).replace(" ", "").replace("-", "")

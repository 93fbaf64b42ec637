"""Values: names that people write: normalised when they are read, compared as a person would, and near misses.

Names of classes, labels, levels, splits and groups all pass `normalised` where they are read, so that two Unicode forms of
one name, or a trailing space, never make two classes. What differs after that only in case, spaces, underscores or invisible
characters has the same `folded` form, and `require_distinct` refuses it.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.terminal.plurals import counted

_SHOWN = 5


def normalise(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), without white space around it.

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
    """Return what is left of a name without case, white space, underscores, invisible characters and Unicode forms.

    >>> folded("Granny_Smith\\u200b") == folded("granny  smith")
    True
    """
    text = unicodedata.normalize("NFKC", name)
    visible = "".join(char for char in text if unicodedata.category(char) not in ("Cf", "Cc") or char.isspace())
    return " ".join(visible.replace("_", " ").casefold().split())


def shown(name: str) -> str:
    """Return a name in quotes, with the characters that nobody sees written as escapes.

    >>> shown("cup\\u200b"), shown("Cafe\\u0301")
    ("'cup\\\\u200b'", "'Café'")
    """
    text = unicodedata.normalize("NFC", name)
    return "'" + "".join(repr(char)[1:-1] if unicodedata.category(char)[0] == "C" else char for char in text) + "'"


def alike(names: Iterable[str], counts: Mapping[str, int] | None = None) -> str:
    """Return the names that a person would take for one, with how many images have each; an empty text if there are none.

    >>> alike(["Gala", "gala", "Fuji"])
    "'Gala' and 'gala'"
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(folded(name), []).append(name)
    found = [
        " and ".join(shown(name) + (f" ({counted(counts[name], 'image')})" if counts else "") for name in same)
        for same in groups.values()
        if len(same) > 1
    ]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def require_distinct(names: Iterable[str], what: str, counts: Mapping[str, int] | None = None) -> None:
    """Refuse names that a person would take for one.

    Args:
        names: normalised, each once.
        what: what they are, in the plural, such as `labels`.
        counts: how many images have each, which the message then says.

    Raises:
        InputError: naming pairs of them.
    """
    if pairs := alike(names, counts):
        raise InputError(
            f"{what} that differ only in case, spaces or invisible characters: {pairs}: give each one spelling"
        )


def csv_problem(error: csv.Error) -> str:
    """Return what to say of an error of Python's CSV parser."""
    if "field limit" in str(error):
        return f"a value is longer than {csv.field_size_limit():,} characters: is its quote closed?"
    return str(error)


def near_miss(wanted: str, names: Sequence[str], also: Sequence[str] = ()) -> str | None:
    """Return the name that was probably meant as `wanted`: another case, spaces, `_` or `-`, or a plural s.

    Args:
        wanted: a name that is not among `names`.
        also: other names for the same thing, such as `subset` for `split`.

    >>> near_miss("label", ["uri", " Labels"]), near_miss("split", ["uri", "is_test"], ["is_test"]), near_miss("uri", ["url"])
    (' Labels', 'is_test', None)
    """
    meant = {_bare(name) for name in (wanted, *also)}
    meant |= {f"{name}s" for name in meant}
    return next((name for name in names if _bare(name) in meant), None)


def _bare(name: str) -> str:
    return folded(name).replace(" ", "").replace("-", "")

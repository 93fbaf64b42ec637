"""Values: the words that name a split, and where a name of a folder, a table or an archive holds one.

A split word counts only as a whole token, so that `latest` or `contest` never name a test split. Tokens are what lies between
`-`, `_`, `.`, `=`, white space and digits.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.sources.spelling import folded, shown

Ints = npt.NDArray[np.int64]

TRAIN, VAL, TEST = range(3)
SPLIT_NAMES = ("train", "val", "test")
"""The name of each code."""

WORDS = {"train": TRAIN, "training": TRAIN}
WORDS |= dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), VAL)
WORDS |= dict.fromkeys(("test", "testing"), TEST)

_BESIDE_A_WORD = {"set", "split", "subset", "data", "dataset", "images", "image", "imgs", "img"}
_SEPARATORS = re.compile(r"[-_.=\s\d]+")
_FLAG = re.compile(r"is_?(?P<word>[a-z]+?)(_?(img|image|set))?")
_TRUE, _FALSE = {"1", "true", "yes", "t", "y", "1.0"}, {"0", "false", "no", "f", "n", "0.0"}


def _tokens(name: str) -> list[str]:
    return [token for token in _SEPARATORS.split(name.casefold()) if token]


def of_file(name: str) -> int | None:
    """Return the split that the name of a table or an archive holds; None: none, or several.

    >>> [of_file(n) for n in ("train-00000-of-00002.parquet", "training_0.tar", "test.csv", "latest.csv", "train_val.csv")]
    [0, 0, 2, None, None]
    """
    found = {WORDS[token] for token in _tokens(name) if token in WORDS}
    return found.pop() if len(found) == 1 else None


def of_folder(name: str) -> int | None:
    """Return the split that a folder is named after: nothing but a split word, digits and words such as `set`; else None.

    >>> [of_folder(name) for name in ("Train", "train2017", "split=test", "val_images", "test_tube", "images")]
    [0, 0, 2, 1, None, None]
    """
    tokens = _tokens(name)
    found = {WORDS[token] for token in tokens if token in WORDS}
    alone = all(token in WORDS or token in _BESIDE_A_WORD for token in tokens)
    return found.pop() if len(found) == 1 and alone else None


_ONE = r"[-_.=\s0-9]"
_EXTRA = rf"(?:{'|'.join(sorted(_BESIDE_A_WORD, key=len, reverse=True))})"
_WORD = rf"(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})"
_FOLDER = rf"(?i)(?:^|/)(?P<folder>(?:{_ONE}*{_EXTRA}{_ONE}+|{_ONE}+)*{_WORD}(?:{_ONE}+{_EXTRA})*{_ONE}*)/"


def split_folder_in(paths: pa.Array) -> pa.Array:
    """Return the first folder of each path that `of_folder` may take for a split folder, empty where there is none.

    >>> split_folder_in(pa.array(["a/b/train2017/x", "crash_test/Val", "latest", ""])).to_pylist()
    ['train2017', 'Val', '', '']
    """
    found = pc.struct_field(pc.extract_regex(pc.binary_join_element_wise(paths, "", "/"), _FOLDER), "folder")
    return pc.fill_null(found, "")


def codes(values: pa.Array, column: str = "split") -> Ints:
    """Return TRAIN, VAL or TEST for each value of a column; -1 where it is null or empty.

    Of a column such as `is_test` the values may also be 0 and 1, or true and false.

    Raises:
        InputError: a value names no split.

    >>> codes(pa.array(["Train", None, "valid "])).tolist(), codes(pa.array(["1", "0"]), "is_test").tolist()
    ([0, -1, 1], [2, 0])
    """
    encoded = pc.fill_null(values.cast(pa.string()), "").dictionary_encode()
    numbers = [_code(value, column) for value in encoded.dictionary.to_pylist()]
    found: Ints = np.array(numbers, np.int64)[encoded.indices.to_numpy()] if numbers else np.zeros(0, np.int64)
    return found


def canonical(values: pa.Array, column: str = "split") -> pa.Array:
    """Return the values of a column with every word for a split as train, val or test; others stay.

    >>> canonical(pa.array(["Training", None, "fold 3"])).to_pylist()
    ['train', None, 'fold 3']
    """
    encoded = values.cast(pa.string()).dictionary_encode()
    names = []
    for value in encoded.dictionary.to_pylist():
        try:
            code = _code(value, column)
        except InputError:
            code = -1
        names.append(value if code < 0 else SPLIT_NAMES[code])
    return pa.array(names, pa.string()).take(encoded.indices)


def _code(value: str, column: str) -> int:
    word = folded(value)
    if not word:
        return -1
    if word in WORDS:
        return WORDS[word]
    flag = _FLAG.fullmatch(folded(column).replace(" ", "_"))
    if flag is not None and flag["word"] in WORDS and word in _TRUE | _FALSE:
        meant = WORDS[flag["word"]]
        if word in _TRUE:
            return meant
        return TEST if meant == TRAIN else TRAIN
    raise InputError(
        f"the column {column!r} holds {shown(value)}, which names no split: write train, val or test, leave it empty, or say "
        "where the split is: source.split_column=NAME, or source.splits=folders, names or none"
    )

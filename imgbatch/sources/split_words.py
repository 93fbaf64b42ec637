"""Values: the words that name a split, and how they are recognised in the names of folders, tables and archives.

A split word counts only as a whole token, so that `latest` or `contest` never name a test split. Tokens are separated by
`-`, `_`, `.`, `=`, white space and digits.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import InputError
from imgbatch.sources.spelling import folded, quoted

Ints = npt.NDArray[np.int64]

TRAIN, VAL, TEST = range(3)
SPLIT_NAMES = ("train", "val", "test")
"""The name of each code."""

WORDS = {"train": TRAIN, "training": TRAIN}
WORDS |= dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), VAL)
WORDS |= dict.fromkeys(("test", "testing"), TEST)

_NEUTRAL_WORDS = {"set", "split", "subset", "data", "dataset", "images", "image", "imgs", "img"}
_SEPARATORS = re.compile(r"[-_.=\s\d]+")
_FLAG = re.compile(r"is_?(?P<word>[a-z]+?)(_?(img|image|set))?")
_TRUE, _FALSE = {"1", "true", "yes", "t", "y", "1.0"}, {"0", "false", "no", "f", "n", "0.0"}


def _tokens(name: str) -> list[str]:
    return [token for token in _SEPARATORS.split(name.casefold()) if token]


def split_of_file(name: str) -> int | None:
    """Return the split in the name of a table or an archive; None if there is none, or several.

    >>> [split_of_file(name) for name in ("train-00000-of-00002.parquet", "test.csv", "latest.csv", "train_val.csv")]
    [0, 2, None, None]
    """
    splits = {WORDS[token] for token in _tokens(name) if token in WORDS}
    return splits.pop() if len(splits) == 1 else None


def split_of_folder(name: str) -> int | None:
    """Return the split in the name of a folder, if it consists of a split word, digits and words such as `set`; else None.

    >>> [split_of_folder(name) for name in ("Train", "train2017", "split=test", "val_images", "test_tube", "images")]
    [0, 0, 2, 1, None, None]
    """
    tokens = _tokens(name)
    splits = {WORDS[token] for token in tokens if token in WORDS}
    nothing_else = all(token in WORDS or token in _NEUTRAL_WORDS for token in tokens)
    return splits.pop() if len(splits) == 1 and nothing_else else None


_ONE = r"[-_.=\s0-9]"
_EXTRA = rf"(?:{'|'.join(sorted(_NEUTRAL_WORDS, key=len, reverse=True))})"
_WORD = rf"(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})"
_FOLDER = rf"(?i)(?:^|/)(?P<folder>(?:{_ONE}*{_EXTRA}{_ONE}+|{_ONE}+)*{_WORD}(?:{_ONE}+{_EXTRA})*{_ONE}*)/"


def split_folder_in(paths: pa.Array) -> pa.Array:
    """Return the first folder of each path that `split_of_folder` may take for a split folder, empty if there is none.

    >>> split_folder_in(pa.array(["a/b/train2017/x", "crash_test/Val", "latest", ""])).to_pylist()
    ['train2017', 'Val', '', '']
    """
    folders = pc.struct_field(pc.extract_regex(pc.binary_join_element_wise(paths, "", "/"), _FOLDER), "folder")
    return pc.fill_null(folders, "")


def split_codes(values: pa.Array, column: str = "split") -> Ints:
    """Return TRAIN, VAL or TEST for each value of a column; -1 if it is null or empty.

    The values of a column such as `is_test` may also be 0 and 1, or true and false.

    Raises:
        InputError: a value names no split.

    >>> split_codes(pa.array(["Train", None, "valid "])).tolist(), split_codes(pa.array(["1", "0"]), "is_test").tolist()
    ([0, -1, 1], [2, 0])
    """
    encoded = pc.fill_null(values.cast(pa.string()), "").dictionary_encode()
    of_value = np.array([_code(value, column) for value in encoded.dictionary.to_pylist()], np.int64)
    codes: Ints = of_value[encoded.indices.to_numpy()] if len(of_value) else np.zeros(0, np.int64)
    return codes


def canonical_splits(values: pa.Array, column: str = "split") -> pa.Array:
    """Return the values of a column with each split word replaced by train, val or test; other values stay.

    >>> canonical_splits(pa.array(["Training", None, "fold 3"])).to_pylist()
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
        flagged = WORDS[flag["word"]]
        if word in _TRUE:
            return flagged
        return TEST if flagged == TRAIN else TRAIN
    raise InputError(
        f"the column {column!r} has the value {quoted(value)}, which names no split. Write train, val or test, leave it empty, "
        "or set where the split comes from: source.split_column=NAME, or source.splits=folders, names or none"
    )

"""The expressions of `export --where`."""

from __future__ import annotations

import pyarrow as pa
import pytest

from imgbatch.errors import UsageError
from imgbatch.labelling.row_filter import RowFilter

ROWS = pa.table(
    {
        "label": ["cat", "dog", "cup", None],
        "score": pa.array([0.4, 0.9, None, 0.1], pa.float32()),
        "passing": [True, False, None, False],
        "uri": ["s3://a/1.jpg", "s3://b/2.png", "s3://a/3.jpg", "s3://c/cat.jpg"],
    }
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("label == 'cat'", [0]),
        ("label != 'cat'", [1, 2]),
        ("'cat' == label", [0]),
        ("0.2 < score <= 0.9", [0, 1]),
        ("score > -1 and not passing", [1, 3]),
        ("passing", [0]),
        ("label in ('cat', 'cup') or score < 0.2", [0, 2, 3]),
        ("label not in ['cat']", [1, 2]),
        ("not label in ('cat',)", [1, 2]),
        ("label not in ['cat'] or label is None", [1, 2, 3]),
        ("score in (0.5, 0.25, 4) or passing == True", [0]),
        ("label is None", [3]),
        ("score is not None and label is not None", [0, 1]),
        ("'cat' in uri", [3]),
        ("'a/' not in uri", [1, 3]),
        ("uri.startswith('s3://a/') and uri.endswith('3.jpg')", [2]),
        ("not (label == 'cat' or label == 'dog')", [2]),
        (" label == 'cat' ", [0]),
    ],
)
def test_rows_that_meet_a_condition(text: str, expected: list[int]) -> None:
    condition = RowFilter(text)
    condition.require_columns(ROWS.column_names)
    numbered = ROWS.append_column("n", pa.array(range(len(ROWS))))
    assert condition.apply(numbered)["n"].to_pylist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label = 'cat'", "== for equality"),
        ("label == 'cat' AND score < 1", "in lower case"),
        ("", "in Python"),
        ("__import__('os').system('x')", "is not supported"),
        ("label.upper() == 'CAT'", "is not supported"),
        ("score + 1 > 2", "is not supported"),
        ("1 == 1", "is not supported"),
        ("label == None", "is None"),
        ("label is 'cat'", "==|SyntaxWarning"),
        ("label in ()", "is not supported"),
        ("label in ('cat', None)", "or column is None"),
        ("label in ('cat', 1)", "--where"),
        ("score < 99999999999999999999999", "too large"),
        ("score in (99999999999999999999999,)", "too large"),
        ("(" * 3000 + "label" + ")" * 3000, "--where"),
        ("label == '" + "x" * 20_000 + "'", "the maximum is 10,000"),
    ],
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_other_expressions_are_refused_and_never_evaluated(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RowFilter(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lable == 'cat'", "no column 'lable'.*did you mean 'label'"),
        ("label == cat", "no column 'cat' .a text needs quotes."),
        ("score == 'high'", "another type"),
        ("score in ('high',)", "another type"),
        ("label in (1, 2)", "another type"),
        ("label", "is no condition"),
    ],
)
def test_columns_and_types_are_checked(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        condition = RowFilter(text)
        condition.require_columns(ROWS.column_names)
        condition.apply(ROWS)

"""URI keys and their index, compared with Python's dict and set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgbatch.uri_index import UriIndex, first_of_each, hash_strings, uri_keys

_text = st.text(max_size=40)
_bounded = settings(max_examples=60, deadline=None, database=None)

# Few first and second halves, so that many keys share their first half.
_half = st.integers(0, 3).map(lambda n: n * 0x5555_5555_5555_5555)
_key = st.tuples(_half, st.integers(0, 4))


def keys(pairs: list[tuple[int, int]]) -> Any:
    return np.array(pairs, np.uint64).reshape(-1, 2)


def lookup(index: UriIndex, wanted: Any) -> dict[int, int]:
    """Return {row: value} of everything that a lookup yields. A row that is yielded twice is an error."""
    values: dict[int, int] = {}
    for match in index.lookup(wanted):
        for row, value in zip(match.rows.tolist(), match["value"].tolist(), strict=True):
            assert row not in values
            values[row] = value
    return values


@_bounded
@given(st.lists(st.lists(_key, max_size=30), max_size=12), st.lists(_key, max_size=30))
def test_an_index_is_a_dict_that_keeps_the_first_value(
    batches: list[list[tuple[int, int]]], wanted: list[tuple[int, int]]
) -> None:
    index, model, number = UriIndex(value=np.int64), {}, 0
    for batch in batches:
        values = np.arange(number, number + len(batch))
        number += len(batch)
        expected = []
        for pair, value in zip(batch, values.tolist(), strict=True):
            expected.append(pair not in model)
            model.setdefault(pair, value)
        assert index.add(keys(batch), value=values).tolist() == expected
        assert len(index) == len(model)
    assert index.contains(keys(wanted)).tolist() == [pair in model for pair in wanted]
    assert lookup(index, keys(wanted)) == {row: model[pair] for row, pair in enumerate(wanted) if pair in model}
    assert sorted(value for run in index.columns("value") for value in run.tolist()) == sorted(model.values())
    rows = [(tuple(key), value) for columns, held in index.rows()
            for key, value in zip(held.tolist(), columns["value"].tolist(), strict=True)]  # fmt: skip
    assert dict(rows) == model
    assert len(rows) == len(model)


@_bounded
@given(st.lists(_key, max_size=30))
def test_the_first_of_each_key_is_marked(pairs: list[tuple[int, int]]) -> None:
    assert first_of_each(keys(pairs)).tolist() == [pair not in pairs[:at] for at, pair in enumerate(pairs)]


def test_keys_that_share_their_first_half_are_distinguished() -> None:
    index = UriIndex(value=np.int64)
    pairs = [(7, low) for low in range(50)]
    assert index.add(keys(pairs[::2]), value=np.arange(0, 50, 2)).all()
    assert index.contains(keys(pairs)).tolist() == [low % 2 == 0 for low in range(50)]
    assert index.add(keys(pairs), value=np.arange(50)).tolist() == [low % 2 == 1 for low in range(50)]
    assert lookup(index, keys(pairs)) == {low: low for low in range(50)}


def test_values_written_through_a_lookup_survive_a_merge_of_runs() -> None:
    index = UriIndex(value=np.int64)
    index.add(keys([(1, 1), (2, 2)]), value=np.array([10, 20]))
    for match in index.lookup(keys([(1, 1), (2, 2)])):
        match.write("value", np.array([99]), where=match["value"] == 20)
    for column in index.columns("value"):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0
    for number in range(3, 40):
        index.add(keys([(number, 0)]), value=np.array([number]))
    assert lookup(index, keys([(1, 1), (2, 2)])) == {0: 10, 1: 99}


def test_merging_limits_the_number_of_runs_and_leaves_large_ones(monkeypatch: Any) -> None:
    monkeypatch.setattr("imgbatch.uri_index._MAX_ROWS_OF_A_RUN", 64)
    index, count = UriIndex(), 1000
    pairs = keys([(number * 0x9E3779B97F4A7C15 % (1 << 64), number) for number in range(count)])
    for start in range(0, count, 10):
        index.add(pairs[start : start + 10])
    sizes = [len(held) for _, held in index.rows()]
    assert sum(sizes) == count
    assert max(sizes) <= 64
    assert len(sizes) < 50
    assert index.contains(pairs).all()


def test_the_smallest_and_the_largest_key_are_found() -> None:
    index, most = UriIndex(), (1 << 64) - 1
    pairs = keys([(0, 0), (most, most), (0, most), (most, 0)])
    assert index.add(pairs).all()
    assert index.contains(pairs).all()
    assert not index.contains(keys([(1, 0), (most - 1, 0)])).any()


def test_an_empty_index_and_an_empty_batch() -> None:
    index, none = UriIndex(value=np.int64), keys([])
    assert len(index) == 0
    assert not index.contains(keys([(1, 2)])).any()
    assert len(index.add(none, value=np.zeros(0, np.int64))) == 0
    assert list(index.lookup(none)) == list(index.rows()) == list(index.columns("value")) == []


@_bounded
@given(st.lists(st.one_of(st.none(), _text), max_size=20))
def test_equal_strings_have_equal_keys_and_others_do_not(strings: list[str | None]) -> None:
    hashed = uri_keys(pa.array(strings, pa.string())).tolist()
    for left, one in zip(strings, hashed, strict=True):
        for right, other in zip(strings, hashed, strict=True):
            assert (left == right) == (one == other)
            assert left == right or (one[0] != other[0] and one[1] != other[1])


@_bounded
@given(st.lists(st.one_of(st.none(), _text), min_size=1, max_size=20), st.data())
def test_a_key_does_not_depend_on_the_array_that_holds_the_string(strings: list[str | None], data: Any) -> None:
    whole = pa.array(strings, pa.string())
    start = data.draw(st.integers(0, len(strings) - 1))
    alone = uri_keys(pa.array(strings[start:], pa.large_string()))
    assert uri_keys(whole.slice(start)).tolist() == alone.tolist() == uri_keys(whole)[start:].tolist()


def test_null_is_zero_and_the_empty_string_is_not() -> None:
    assert hash_strings(pa.array([None, "", None], pa.string())).astype(bool).tolist() == [False, True, False]
    assert hash_strings(pa.array([], pa.string())).tolist() == []
    assert hash_strings(pa.nulls(2, pa.string())).tolist() == [0, 0]


def test_strings_that_differ_by_one_byte_anywhere_differ_in_both_halves() -> None:
    for length in (1, 7, 8, 9, 15, 16, 17, 33):
        base = "a" * length
        variants = [base, f"{base}\0", base[:-1], *(f"{base[:at]}b{base[at + 1 :]}" for at in range(length))]
        hashed = uri_keys(pa.array(variants))
        assert len(set(hashed[:, 0].tolist())) == len(set(hashed[:, 1].tolist())) == len(variants)


def test_a_million_similar_uris_have_a_million_halves() -> None:
    numbers = pa.array(np.arange(1_000_000)).cast(pa.string())
    hashed = uri_keys(pc.binary_join_element_wise("s3://photos/2026/image-", numbers, ".jpg", ""))
    assert len(np.unique(hashed[:, 0])) == len(np.unique(hashed[:, 1])) == 1_000_000

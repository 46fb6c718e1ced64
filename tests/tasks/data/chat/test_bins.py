"""Rows in sequences: each once, whole, never more than fits, and few sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.chat.bins import Bins, pack_best_fit, pack_in_order

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=200)


def sequences(bins: Bins) -> list[list[int]]:
    return [bins.rows_of(number).tolist() for number in range(bins.num_bins)]


def plain_best_fit(lengths: list[int], order: list[int]) -> list[list[int]]:
    """Oracle: look at every sequence; of those with equally little left, the one that came to it last."""
    bins: list[list[int]] = []
    left: list[int] = []
    touched: list[int] = []
    for time, row in enumerate(order):
        fitting = [n for n in range(len(bins)) if left[n] >= lengths[row]]
        if fitting:
            chosen = min(fitting, key=lambda n: (left[n], -touched[n]))
        else:
            chosen = len(bins)
            bins.append([])
            left.append(CAPACITY)
            touched.append(0)
        bins[chosen].append(row)
        left[chosen] -= lengths[row]
        touched[chosen] = time
    return bins


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(lengths=LENGTHS, key=st.text(max_size=3))
def test_every_row_stands_once_in_a_sequence_that_holds_it(lengths: list[int], key: str) -> None:
    array = np.array(lengths, dtype=np.int64)
    for bins in (pack_in_order(array, CAPACITY), pack_best_fit(array, CAPACITY, key=key)):
        found = sequences(bins)
        assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
        assert all(rows and sum(lengths[row] for row in rows) <= CAPACITY for rows in found)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(lengths=LENGTHS)
def test_best_fit_is_the_plain_algorithm_over_decreasing_lengths(lengths: list[int]) -> None:
    bins = pack_best_fit(np.array(lengths, dtype=np.int64), CAPACITY, key="1")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    expected = plain_best_fit(lengths, order)
    # Rows of one length take turns, so that sequences are compared by the lengths in them.
    as_lengths = [[lengths[row] for row in rows] for rows in sequences(bins)]
    assert as_lengths == [[lengths[row] for row in rows] for rows in expected]


def test_in_order_keeps_the_order_and_ends_a_sequence_where_the_next_row_does_not_fit() -> None:
    assert sequences(pack_in_order(np.array([30, 10, 1, 40, 20, 21, 5]), CAPACITY)) == [[0, 1], [2], [3], [4], [5, 6]]


def test_key_draws_neighbours_and_nothing_else_does() -> None:
    lengths = np.array([10] * 40)
    one, same, other = (sequences(pack_best_fit(lengths, CAPACITY, key=key)) for key in ("1", "1", "2"))
    assert one == same != other
    assert len(one) == len(other) == 10


def test_best_fit_wastes_less_than_a_tenth_where_rows_fit_each_other() -> None:
    lengths = np.random.default_rng(1).integers(1, 20, 500)
    assert pack_best_fit(lengths, CAPACITY, key="1").num_bins <= 1.1 * lengths.sum() / CAPACITY

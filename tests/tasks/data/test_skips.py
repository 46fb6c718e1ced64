"""Skip ranges: which positions of the stream a run reads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.skips import SkipRange, join_skips, skip_to


def positions_of(count: int, *skips: tuple[int, int]) -> list[int]:
    ranges = [SkipRange(at=at, count=length) for at, length in skips]
    return skip_to(np.arange(count, dtype=np.int64), ranges).tolist()


def test_skip_to_without_ranges_is_the_identity() -> None:
    assert positions_of(5) == [0, 1, 2, 3, 4]


def test_skip_to_jumps_over_exactly_the_range() -> None:
    assert positions_of(6, (2, 3)) == [0, 1, 5, 6, 7, 8]


def test_skip_to_a_range_counts_positions_not_sequences() -> None:
    # The run stood at position 8 (its sixth sequence) when the second range was written down.
    assert positions_of(8, (2, 3), (8, 2)) == [0, 1, 5, 6, 7, 10, 11, 12]


def test_skip_to_ranges_that_touch_or_overlap_add_up() -> None:
    assert positions_of(4, (1, 2), (3, 2)) == [0, 5, 6, 7]
    assert positions_of(4, (1, 2), (2, 2)) == [0, 5, 6, 7]
    assert positions_of(3, (1, 2), (1, 3)) == [0, 6, 7]


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=6)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(skips=RANGES, data=st.randoms(use_true_random=False))
def test_skip_to_rises_and_order_of_writing_is_nothing(skips: list[tuple[int, int]], data) -> None:
    positions = positions_of(100, *skips)
    shuffled = list(skips)
    data.shuffle(shuffled)
    assert positions_of(100, *shuffled) == positions
    assert all(later > earlier for earlier, later in itertools.pairwise(positions))
    # Once past all ranges, every one of them has been jumped over.
    assert positions[-1] == 99 + sum(length for at, length in skips)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(skips=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=6))
def test_skip_to_is_walking_the_stream_and_jumping(skips: list[tuple[int, int]]) -> None:
    """Oracle: walk positions one by one; at a range's begin, jump, a range within a jump lengthens it."""
    waiting, position, expected = sorted(skips), 0, []
    while len(expected) < 80:
        while waiting and waiting[0][0] <= position:
            position += waiting.pop(0)[1]
        expected.append(position)
        position += 1
    assert positions_of(80, *skips) == expected


def test_skip_to_leaves_its_argument_alone() -> None:
    sequences = np.arange(5, dtype=np.int64)
    skip_to(sequences, [SkipRange(at=0, count=3)])
    assert sequences.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("at", "count"), [(-1, 1), (1, -1)])
def test_skip_range_negative_refused(at: int, count: int) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        SkipRange(at=at, count=count)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(skips=RANGES)
def test_join_skips_jumps_over_the_union_of_positions(skips: list[tuple[int, int]]) -> None:
    left_out = {position for at, length in skips for position in range(at, at + length)}
    joined = join_skips(SkipRange(at=at, count=length) for at, length in skips)
    kept = [position for position in range(300) if position not in left_out]
    assert skip_to(np.arange(100, dtype=np.int64), joined).tolist() == kept[:100]

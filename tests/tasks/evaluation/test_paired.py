"""Intervals of paired differences, against scipy's own paired tests and known quantiles."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tasks.evaluation.paired import Difference, mean_interval, over_seeds, paired_difference, paired_ratio, t_quantile

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (10**6, 1.95997)])
def test_quantiles_are_those_of_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


@given(VALUES, st.integers(0, 2**32))
def test_difference_is_that_of_a_paired_t_test(first: list[float], seed: int) -> None:
    second = [value + math.sin(seed + number) for number, value in enumerate(first)]
    found = paired_difference(first, second, "slices")
    oracle = stats.ttest_rel(first, second)
    low, high = oracle.confidence_interval(0.95)
    assert found is not None
    assert found.num == len(first)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


def test_single_pair_has_no_interval_and_decides_nothing() -> None:
    found = paired_difference([1.0], [3.0], "slices")
    assert found == Difference(mean=-2.0, low=None, high=None, num=1, over="slices")
    assert found.sign == 0


def test_pairs_that_are_not_finite_are_left_out() -> None:
    found = paired_difference([1.0, math.nan, 2.0, math.inf], [0.0, 0.0, 0.5, 0.0], "blocks")
    assert found is not None
    assert (found.mean, found.num) == (1.25, 2)
    assert paired_difference([math.nan], [1.0], "blocks") is None


def test_ratio_is_geometric_and_turns_round_with_its_arms() -> None:
    found, turned = paired_ratio([2.0, 8.0], [1.0, 1.0], "blocks"), paired_ratio([1.0, 1.0], [2.0, 8.0], "blocks")
    assert found is not None
    assert turned is not None
    assert found.is_ratio
    assert found.mean == pytest.approx(4.0)
    assert found.low == pytest.approx(1 / turned.high)  # type: ignore[operator]
    half = t_quantile(1) * math.log(2.0)  # logarithms log 2 and log 8: standard error log 2
    assert found.high == pytest.approx(4.0 * math.exp(half))


def test_ratio_leaves_out_what_has_no_logarithm() -> None:
    found = paired_ratio([0.0, 3.0, math.nan, 1.0], [1.0, 1.0, 1.0, math.nan], "blocks")
    assert found is not None
    assert (found.mean, found.num) == (pytest.approx(3.0), 1)


@pytest.mark.parametrize(("values", "sign"), [([-1.0, -1.1, -0.9], -1), ([1.0, 1.1, 0.9], 1), ([-1.0, 1.2, 0.1], 0)])
def test_sign_is_given_only_where_the_interval_is_clear_of_equality(values: list[float], sign: int) -> None:
    found = mean_interval(values, "seeds")
    assert found is not None
    assert found.sign == sign
    ratio = paired_ratio([math.exp(value) for value in values], [1.0] * len(values), "blocks")
    assert ratio is not None
    assert ratio.sign == sign


def test_seeds_count_as_one_pair_each_whatever_their_own_intervals() -> None:
    sure = Difference(mean=-1.0, low=-1.0, high=-1.0, num=100, over="slices")
    unsure = Difference(mean=-3.0, low=-99.0, high=99.0, num=2, over="slices")
    found = over_seeds([sure, unsure])
    assert found == mean_interval([-1.0, -3.0], "seeds")
    assert over_seeds([]) is None


def test_ratios_over_seeds_stay_ratios() -> None:
    found = over_seeds(
        [Difference(mean=m, low=None, high=None, num=1, over="blocks", is_ratio=True) for m in (2.0, 8.0)]
    )
    assert found is not None
    assert (found.mean, found.is_ratio, found.over) == (pytest.approx(4.0), True, "seeds")

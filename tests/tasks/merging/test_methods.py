"""Merge weights against the paper's vectors and against the recursion by brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from tasks.curves import DECAY_CURVES
from tasks.merging.methods import METHODS, MethodChoice, build_weights, check_weights

PRINTED = 0.5e-4
"""The vectors are known to four decimals."""
FLOAT64 = 1e-12
"""Products of at most 60 factors in float64, each within 2**-53: far below."""
HYPOTHESIS = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# Oldest to newest for N = 10: arXiv 2505.12082, Eq. 3 and 5, and Eq. 4 as the recursion started at M(1) = M_1.
PAPER = {
    ("sma", None): [0.1] * 10,
    ("wma", None): [0.0182, 0.0364, 0.0545, 0.0727, 0.0909, 0.1091, 0.1273, 0.1455, 0.1636, 0.1818],
    ("ema", 0.2): [0.1342, 0.0336, 0.0419, 0.0524, 0.0655, 0.0819, 0.1024, 0.1280, 0.1600, 0.2000],
    ("ema", 0.1): [0.3874, 0.0430, 0.0478, 0.0531, 0.0590, 0.0656, 0.0729, 0.0810, 0.0900, 0.1000],
}
# Mean age in units of V, and 1 / sum of squares.
SPREAD = {
    ("sma", None): (4.50, 10.0),
    ("wma", None): (3.00, 7.86),
    ("ema", 0.2): (3.46, 7.87),
    ("ema", 0.1): (5.51, 5.13),
}
RULES = list(PAPER)


@pytest.mark.parametrize(("method", "alpha"), RULES)
def test_weights_of_ten_are_the_papers(method: str, alpha: float | None) -> None:
    assert build_weights(method, 10, alpha) == pytest.approx(PAPER[method, alpha], abs=PRINTED)


@pytest.mark.parametrize(("method", "alpha"), RULES)
def test_weights_of_ten_have_the_papers_age_and_effective_number(method: str, alpha: float | None) -> None:
    weights = build_weights(method, 10, alpha)
    age = sum(w * (9 - i) for i, w in enumerate(weights))
    effective = 1 / sum(w * w for w in weights)
    assert (age, effective) == pytest.approx(SPREAD[method, alpha], abs=0.5e-2)  # printed to two decimals


@HYPOTHESIS
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    alpha=st.floats(0.0, 1.0, exclude_min=True),
)
def test_weights_ema_is_the_recursion_by_brute_force(values: list[float], alpha: float) -> None:
    merged = values[0]
    for value in values[1:]:
        merged = alpha * value + (1 - alpha) * merged
    weights = build_weights("ema", len(values), alpha)
    scale = max(map(abs, values))
    assert math.fsum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(merged, abs=FLOAT64 * scale)


def test_weights_wma_grow_by_equal_steps_from_oldest_to_newest() -> None:
    weights = build_weights("wma", 4)
    assert weights == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=FLOAT64)


def test_weights_ema_alpha_one_is_the_newest_alone() -> None:
    assert build_weights("ema", 4, 1.0) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("method", "alpha"), RULES)
def test_weights_of_one_input_are_one(method: str, alpha: float | None) -> None:
    assert build_weights(method, 1, alpha) == (1.0,)


@pytest.mark.parametrize("method", ["sma", "wma"])
def test_weights_alpha_is_of_no_account_to_other_methods(method: str) -> None:
    assert build_weights(method, 5, 0.7) == build_weights(method, 5)


@HYPOTHESIS
@given(
    method=st.sampled_from([method for method in METHODS if method not in ("wsm:list", "power-ema")]),
    count=st.integers(1, 60),
    alpha=st.floats(0.0, 1.0, exclude_min=True),
)
def test_weights_sum_to_one_and_none_is_negative(method: str, count: int, alpha: float) -> None:
    weights = build_weights(method, count, alpha)
    assert len(weights) == count
    assert all(weight >= 0 for weight in weights)
    assert math.fsum(weights) == pytest.approx(1.0, abs=FLOAT64)


@pytest.mark.parametrize("alpha", [None, 0.0, -0.1, 1.0001, 2.0, math.nan, math.inf])
def test_weights_ema_alpha_outside_its_range_refused(alpha: float | None) -> None:
    with pytest.raises(UserError, match=r"method ema needs alpha in \(0, 1\]"):
        build_weights("ema", 3, alpha)


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("method", METHODS)
def test_weights_empty_window_refused(method: str, count: int) -> None:
    with pytest.raises(UserError, match=f"at least one input, got {count}"):
        build_weights(method, count, 0.5)


@pytest.mark.parametrize("method", ["SMA", "mean", ""])
def test_weights_unknown_method_refused_with_the_known_ones(method: str) -> None:
    with pytest.raises(UserError, match=f"'{method}' is not known; known: sma, wma, ema"):
        build_weights(method, 3)


# Values of the published tool for the decay 1 - sqrt, at n = 4 and n = 10, to four places.
PUBLISHED_MINUS_SQRT = {
    4: (0.5000, 0.2071, 0.1589, 0.1340),
    10: (0.3162, 0.1310, 0.1005, 0.0847, 0.0747, 0.0675, 0.0621, 0.0578, 0.0543, 0.0513),
}


@pytest.mark.parametrize("count", PUBLISHED_MINUS_SQRT)
def test_weights_wsm_minus_sqrt_equal_the_published_values(count: int) -> None:
    assert build_weights("wsm:1-sqrt", count) == pytest.approx(PUBLISHED_MINUS_SQRT[count], abs=5e-5)


@pytest.mark.parametrize("method", ["wsm:linear", "wsm:cosine", "wsm:1-sqrt"])
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_weights_wsm_invert_to_the_decay_they_stand_for(method: str, count: int) -> None:
    weights = build_weights(method, count)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    # Theorem 3.1 read backwards: the update before snapshot i keeps the share of all later weights.
    shape = DECAY_CURVES[method.removeprefix("wsm:")]
    for i in range(1, count):
        assert sum(weights[i:]) == pytest.approx(shape(i / count), abs=1e-12)


def test_weights_wsm_linear_is_the_simple_average() -> None:
    assert build_weights("wsm:linear", 7) == pytest.approx(build_weights("sma", 7), abs=1e-15)


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [([0.5, 0.5], 3, "2 values for 3 inputs"), ([0.5, 0.6], 2, "sum to 1.1"), ([float("nan"), 1.0], 2, "finite")],
)
def test_explicit_weights_that_cannot_be_meant_are_refused(weights: list[float], count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_weights(weights, count)


def test_explicit_weights_keep_zero_and_negative_values_when_asked() -> None:
    assert check_weights([0.0, 1.0], 2) == (0.0, 1.0)
    assert check_weights([-1.0, 1.5], 2, allow_unnormalised=True) == (-1.0, 1.5)


# Decay lists and power-function averages


def test_decay_list_of_a_named_curve_gives_the_named_weights() -> None:
    decay = tuple(1 - i / 5 for i in range(5))
    choice = MethodChoice(method="wsm:list", decay=decay)
    assert choice.build([None] * 5) == pytest.approx(build_weights("wsm:linear", 5), abs=1e-15)


@pytest.mark.parametrize("decay", [(0.9, 0.5), (1.0, 0.5, 0.6), (1.0, -0.1), (1.0, 0.5)])
def test_decay_list_that_is_no_decay_of_the_inputs_is_refused(decay: tuple[float, ...]) -> None:
    count = 3 if decay == (1.0, 0.5) else len(decay)
    with pytest.raises(UserError, match="--decay"):
        MethodChoice(method="wsm:list", decay=decay).build([None] * count)


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_power_ema_has_the_width_it_was_asked_for(width: float) -> None:
    # Many snapshots from the start: then the sums are close to the integrals that define the width.
    count = 20_000
    weights = MethodChoice(method="power-ema", width=width).build(list(range(1, count + 1)))
    centres = [(i - 0.5) / count for i in range(1, count + 1)]
    mean = sum(w * t for w, t in zip(weights, centres, strict=True))
    spread = math.sqrt(sum(w * (t - mean) ** 2 for w, t in zip(weights, centres, strict=True)))
    assert spread == pytest.approx(width, rel=1e-3)
    assert math.fsum(weights) == pytest.approx(1.0, abs=FLOAT64)


def test_power_ema_of_the_widest_width_is_the_simple_average() -> None:
    weights = MethodChoice(method="power-ema", width=12**-0.5).build([100, 200, 300, 400])
    assert weights == pytest.approx((0.25,) * 4, abs=1e-9)


def test_power_ema_weighs_newer_snapshots_more_and_longer_stretches_more() -> None:
    weights = MethodChoice(method="power-ema", width=0.1).build([100, 110, 150, 160])
    assert weights[2] > weights[3] > weights[0]


@pytest.mark.parametrize(
    ("width", "positions", "expected"),
    [
        (0.0, [1, 2], "relative width"),
        (0.4, [1, 2], "relative width"),
        (0.1, [1, None], "adopt"),
        (0.1, [2, 1], "order"),
    ],
)
def test_power_ema_mistakes_name_the_cure(width: float, positions: list[int | None], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        MethodChoice(method="power-ema", width=width).build(positions)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "ema"}, "needs --alpha"),
        ({"method": "sma", "alpha": 0.1}, "--alpha goes with --method ema"),
        ({"method": "wsm:list"}, "needs --decay"),
        ({"method": "wma", "decay": (1.0,)}, "--decay goes with"),
        ({"method": "power-ema"}, "needs --width"),
        ({"method": "ema", "alpha": 0.2, "width": 0.1}, "--width goes with"),
        ({"method": "weights"}, "go together"),
        ({"method": "sma", "weights": (1.0,)}, "go together"),
        ({"method": "slerp"}, "'slerp' is not known; known: sma, wma"),
    ],
)
def test_method_and_parameters_that_do_not_fit_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        MethodChoice(**options).check()
    assert expected in str(caught.value)

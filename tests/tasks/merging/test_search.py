"""Weights chosen by held-out loss, on losses whose best weights are known."""

from __future__ import annotations

import math

import pytest

from tasks.merging.search import Loss, Weights, greedy, search, softmax

POINTS = (4.0, 1.0, -2.0, 9.0)


def loss_of(weights: Weights) -> Loss:
    """Squared distance of the mean of POINTS from zero; the hold-out text sees the same bowl a little higher."""
    centre = sum(weight * point for weight, point in zip(weights, POINTS, strict=True))
    return Loss(tuning=centre**2, hold_out=centre**2 + 0.5)


def test_greedy_keeps_an_input_only_if_the_loss_does_not_rise() -> None:
    found = greedy(4, loss_of)
    # 1 alone gives 1; with -2 it is -0.5: kept; with 4 besides it is 1: refused; 9 is refused.
    assert found.weights == (0.0, 0.5, 0.5, 0.0)
    assert [trial["kept"] for trial in found.trace["trials"]] == [True, False, False]
    assert found.trace["tuning_loss"] == pytest.approx(0.25)
    assert found.trace["hold_out_loss"] == pytest.approx(0.75)
    assert found.trace["sma_tuning_loss"] == pytest.approx(9.0)


def test_greedy_equal_loss_counts_as_not_worse() -> None:
    assert greedy(3, lambda _: Loss(tuning=1.0, hold_out=1.0)).weights == pytest.approx((1 / 3,) * 3)


def test_greedy_of_one_input_is_that_input() -> None:
    assert greedy(1, lambda _: Loss(tuning=1.0, hold_out=1.0)).weights == (1.0,)


def test_search_finds_the_bottom_of_a_bowl_on_the_simplex() -> None:
    found = search(4, loss_of, max_trials=80)
    assert math.fsum(found.weights) == pytest.approx(1.0, abs=1e-12)
    assert all(weight >= 0 for weight in found.weights)
    assert found.trace["tuning_loss"] < 0.01 < found.trace["sma_tuning_loss"]
    assert len(found.trace["trials"]) <= 80


def test_search_never_does_worse_than_the_simple_average() -> None:
    def narrow(weights: Weights) -> Loss:
        return Loss(tuning=max(abs(weight - 0.25) for weight in weights), hold_out=0.0)

    assert search(4, narrow, max_trials=30).weights == (0.25,) * 4


def test_search_chooses_by_the_tuning_text_alone() -> None:
    def misleading(weights: Weights) -> Loss:
        return Loss(tuning=loss_of(weights).tuning, hold_out=-weights[3])

    assert search(4, misleading, max_trials=60).weights[3] < 0.9


def test_softmax_of_large_numbers_is_finite() -> None:
    assert softmax([1000.0, 0.0]) == (1.0, 0.0)

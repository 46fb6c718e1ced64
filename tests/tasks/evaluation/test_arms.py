"""Comparison of two arms on made-up curves whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.evaluation.arms import (
    LEAST_STEPS,
    NUM_BLOCKS,
    Arm,
    compare_arms,
    compare_seeds,
    count_excursions,
    count_spikes,
    cut_blocks,
    figures_of,
)
from tasks.evaluation.held_out import Evaluation
from tasks.recovery.rule import Point, SpikeRule

RULE = SpikeRule(warmup_steps=0, start_loss=math.log(256))
STEPS = 400


def measured(*slices: float, **domains: float) -> Evaluation:
    loss = sum(slices) / len(slices)
    return Evaluation(
        digest="d", suite="s", loss=loss, slices=slices, domains=domains or {"all": loss}, bits_per_byte=loss / math.log(2), tokens=1
    )  # fmt: skip


def curve(seed: int = 0, *, offset: float = 0.0, norm: float = 1.0, noise: float = 0.05) -> list[Point]:
    """A falling loss with shared noise of its data, and gradient norms around a slow drift."""
    shared, own = np.random.default_rng(1000), np.random.default_rng(seed)
    loss = 2.0 + np.exp(-np.arange(STEPS) / 100) + 0.05 * shared.standard_normal(STEPS) + offset
    drift = norm * (1.5 - np.arange(STEPS) / STEPS)
    norms = drift * np.exp(noise * own.standard_normal(STEPS))
    return [Point(step=n + 1, loss=float(loss[n]), gradient_norm=float(norms[n])) for n in range(STEPS)]


def arm(points: list[Point], *, offset: float = 0.0, **fields: object) -> Arm:
    held_out = {
        tokens: measured(*(base + offset * (1 + 0.1 * n) for n, base in enumerate((1.9, 2.0, 2.2))))
        for tokens in (100, 200)
    }
    values = {
        "initial": measured(2.9 + 2 * offset, 3.0 + 2 * offset, 3.2 + 2 * offset),
        "held_out": held_out,
        "points": points,
    }
    return Arm(**{**values, **fields})  # type: ignore[arg-type]


def test_equal_arms_differ_by_nothing() -> None:
    found = compare_arms(1, arm(curve()), arm(curve()), RULE)
    assert {name: item.mean for name, item in found.differences.items() if not item.is_ratio} == dict.fromkeys(
        ("initial_loss", "final_loss", "held_out_loss", "training_loss", "num_spikes", "num_excursions"), 0.0
    )
    assert [found.differences[name].mean for name in ("gradient_norm", "gradient_variance")] == [1.0, 1.0]
    assert {item.sign for item in found.differences.values()} == {0}


def test_lower_arm_is_lower_in_every_loss_and_the_signs_turn_with_the_arms() -> None:
    low, high = arm(curve(offset=-0.01), offset=-0.01), arm(curve())
    found, turned = compare_arms(1, low, high, RULE), compare_arms(1, high, low, RULE)
    for name, expected in (
        ("initial_loss", -0.02),
        ("final_loss", -0.011),
        ("held_out_loss", -0.011),
        ("training_loss", -0.01),
    ):
        assert found.differences[name].mean == pytest.approx(expected)
        assert (found.differences[name].sign, turned.differences[name].sign) == (-1, 1)


def test_losses_on_the_same_batches_tell_what_their_noise_would_hide() -> None:
    # An offset of a fifth of the noise, which both arms share.
    found = compare_arms(1, arm(curve(offset=-0.01)), arm(curve()), RULE)
    assert found.differences["training_loss"].sign == -1
    assert np.std([p.loss for p in curve()[-20:]]) > 0.03


def test_gradient_norms_are_compared_by_level_and_by_noise_apart() -> None:
    steady = compare_arms(1, arm(curve(2, noise=0.05)), arm(curve(3, noise=0.2)), RULE).differences
    assert steady["gradient_norm"].mean == pytest.approx(1.0, abs=0.05)
    assert steady["gradient_variance"].mean == pytest.approx((0.05 / 0.2) ** 2, rel=0.5)
    assert steady["gradient_variance"].sign == -1
    smaller = compare_arms(1, arm(curve(2, norm=0.5)), arm(curve(2)), RULE).differences
    assert smaller["gradient_norm"].mean == pytest.approx(0.5)
    assert smaller["gradient_variance"].mean == pytest.approx(0.25)


def test_slow_drift_of_the_norm_is_no_variance() -> None:
    figures = figures_of(arm(curve(noise=0.0)), RULE)
    whole = np.var([p.gradient_norm for p in curve(noise=0.0)])
    assert figures.gradient_variance is not None
    assert figures.gradient_variance < whole / 100


def test_steps_that_one_arm_lacks_or_that_are_not_finite_are_compared_in_neither() -> None:
    broken = curve()
    broken[50] = Point(step=51, loss=math.nan, gradient_norm=1.0)
    found = compare_arms(1, arm(broken[:-100]), arm(curve()), RULE)
    assert found.differences["training_loss"].mean == 0.0
    assert found.init.num_excursions == found.control.num_excursions + 1


def test_curve_has_every_point_that_both_were_measured_at() -> None:
    first = arm(curve(), offset=-0.01)
    second = arm(curve(), held_out={200: measured(1.9, 2.0, 2.2), 300: measured(1.8, 1.9, 2.1)})
    found = compare_arms(1, first, second, RULE)
    assert list(found.curve) == [0, 200]
    assert found.differences["final_loss"] == found.curve[200]


def test_arms_without_measurements_are_compared_in_nothing_but_counts() -> None:
    nothing = Arm(initial=None, held_out={}, points=())
    found = compare_arms(1, nothing, nothing, RULE)
    assert set(found.differences) == {"num_spikes", "num_excursions"}
    assert found.curve == {}
    assert (found.init.initial_loss, found.init.training_loss, found.init.gradient_norm) == (None, None, None)


def test_domains_are_compared_at_the_end_where_there_are_several() -> None:
    one = arm(curve(), held_out={100: measured(1.0, 1.0, code=0.8, web=1.2)})
    two = arm(curve(), held_out={100: measured(1.0, 1.0, code=1.0, web=1.1)})
    found = compare_arms(1, one, two, RULE).differences
    assert found["final_loss/code"].mean == pytest.approx(-0.2)
    assert found["final_loss/web"].low is None
    assert not any("/" in name for name in compare_arms(1, arm(curve()), arm(curve()), RULE).differences)


def test_seeds_are_pairs_and_quantities_of_some_seeds_count_where_they_are() -> None:
    def pair(offset: float, **fields: object) -> object:
        return compare_arms(1, arm(curve(), offset=offset, **fields), arm(curve()), RULE)

    found = compare_seeds([pair(-0.01), pair(-0.02), pair(-0.03, initial=None)])  # type: ignore[list-item]
    assert found["final_loss"].mean == pytest.approx(-0.022)
    assert (found["final_loss"].num, found["final_loss"].over) == (3, "seeds")
    assert found["initial_loss"].num == 2


@pytest.mark.parametrize("count", [0, 1, LEAST_STEPS - 1, LEAST_STEPS, 3 * LEAST_STEPS, 10 * NUM_BLOCKS + 7])
def test_blocks_hold_every_step_once_and_none_is_too_short(count: int) -> None:
    points = curve()[:count]
    blocks = cut_blocks(points)
    assert [point for block in blocks for point in block] == points
    assert len(blocks) <= NUM_BLOCKS
    assert all(len(block) >= min(count, LEAST_STEPS) for block in blocks)


def test_divergences_are_counted_each_once_and_recovered_ones_too() -> None:
    points = curve()
    for start in (150, 300):
        points[start : start + 99] = [
            Point(step=p.step, loss=p.loss + 4, gradient_norm=9.0) for p in points[start : start + 99]
        ]
    assert count_spikes(points, RULE) == 2
    assert count_spikes(curve(), RULE) == 0
    assert figures_of(arm(curve(), num_recoveries=1), RULE).num_spikes == 1


def test_lone_steps_that_stand_out_are_excursions_and_no_spikes() -> None:
    points = curve()
    points[200] = Point(step=201, loss=9.0, gradient_norm=points[200].gradient_norm)
    points[300] = Point(step=301, loss=points[300].loss, gradient_norm=50.0)
    assert count_excursions(points, RULE) == count_excursions(curve(), RULE) + 2
    assert count_spikes(points, RULE) == 0


def test_gradient_norms_of_warm_up_are_no_excursions() -> None:
    points = curve()
    points[100] = Point(step=101, loss=points[100].loss, gradient_norm=50.0)
    assert count_excursions(points, RULE) == count_excursions(curve(), RULE) + 1
    late = SpikeRule(warmup_steps=200, start_loss=math.log(256))
    assert count_excursions(points, late) == count_excursions(curve(), late)

"""The learning rate as a function of tokens: warmup, stable, decay."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from configs.schema import Config
from configs.training import ScheduleConfig, TrainingConfig
from tasks.curves import DECAY_CURVES
from tasks.training.schedule import learning_rate_at, phase_at, step_learning_rate

PEAK = 4e-3
TOTAL, WARMUP, DECAY = 1000, 100, 400
SHAPES = ["cosine", "linear", "1-sqrt"]
RELATIVE = 1e-12
"""A handful of float64 operations, each within 2**-53 of its value."""


def schedule(**changes: Any) -> ScheduleConfig:
    return ScheduleConfig(
        **{
            "peak_learning_rate": PEAK,
            "warmup_tokens": WARMUP,
            "decay_tokens": DECAY,
            "decay_shape": "linear",
            **changes,
        }
    )


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.0), (25, 0.25), (50, 0.5), (99, 0.99), (100, 1.0)])
def test_learning_rate_warmup_is_linear_from_zero(tokens: int, share: float) -> None:
    assert learning_rate_at(schedule(), tokens, TOTAL) == pytest.approx(PEAK * share, rel=RELATIVE)


@pytest.mark.parametrize("tokens", [100, 101, 350, 599, 600])
def test_learning_rate_stable_phase_is_exactly_the_peak(tokens: int) -> None:
    assert learning_rate_at(schedule(), tokens, TOTAL) == PEAK


@pytest.mark.parametrize(
    ("shape", "quarter", "half", "three_quarters"),
    [
        ("linear", 0.75, 0.5, 0.25),
        ("cosine", 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5))),
        ("1-sqrt", 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)),
    ],
)
def test_learning_rate_decay_follows_its_curve(shape: str, quarter: float, half: float, three_quarters: float) -> None:
    config = schedule(decay_shape=shape)
    for tokens, share in ((700, quarter), (800, half), (900, three_quarters)):
        assert learning_rate_at(config, tokens, TOTAL) == pytest.approx(PEAK * share, rel=RELATIVE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_learning_rate_decay_ends_at_its_floor_and_stays(shape: str, floor: float) -> None:
    config = schedule(decay_shape=shape, final_learning_rate_fraction=floor)
    for tokens in (TOTAL, TOTAL + 1, 10 * TOTAL):
        # The end of a cosine is 1 + cos(pi), which rounds to within 2**-53 of zero.
        assert learning_rate_at(config, tokens, TOTAL) == pytest.approx(PEAK * floor, rel=RELATIVE, abs=PEAK * 1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_learning_rate_decay_starts_without_a_jump_and_never_rises(shape: str) -> None:
    config = schedule(decay_shape=shape, final_learning_rate_fraction=0.1)
    rates = [learning_rate_at(config, tokens, TOTAL) for tokens in range(600, 1001)]
    assert rates[0] == PEAK
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert learning_rate_at(config, 600 + 1e-9, TOTAL) == pytest.approx(PEAK, rel=1e-5)  # sqrt(1e-9 / 400) is 1.6e-6


def test_learning_rate_without_decay_stays_at_the_peak() -> None:
    config = schedule(decay_tokens=0)
    assert {learning_rate_at(config, tokens, TOTAL) for tokens in (100, 999, 1000, 5000)} == {PEAK}


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate_at(schedule(warmup_tokens=0), 0, TOTAL) == PEAK


@pytest.mark.parametrize("shape", SHAPES)
def test_decay_curve_goes_from_one_to_zero(shape: str) -> None:
    assert DECAY_CURVES[shape](0.0) == 1.0
    assert DECAY_CURVES[shape](1.0) == pytest.approx(0.0, abs=1e-15)


# Of a run

CONFIG = Config(
    name="x",
    training=TrainingConfig(total_tokens=2048 * 100, batch_tokens=2048),
    schedule=ScheduleConfig(
        peak_learning_rate=PEAK, warmup_tokens=2048 * 10, decay_tokens=2048 * 20, decay_shape="linear"
    ),
)


def test_step_learning_rate_is_taken_in_the_middle_of_the_step() -> None:
    rates = [step_learning_rate(CONFIG, step) for step in range(1, 101)]
    assert rates[:3] == pytest.approx([PEAK * 0.05, PEAK * 0.15, PEAK * 0.25], rel=RELATIVE)
    assert set(rates[10:80]) == {PEAK}
    assert rates[80] == pytest.approx(PEAK * (1 - 0.5 / 20), rel=RELATIVE)
    assert rates[99] == pytest.approx(PEAK * 0.5 / 20, rel=RELATIVE)


def test_step_learning_rate_every_step_moves_weights() -> None:
    assert all(step_learning_rate(CONFIG, step) > 0 for step in range(1, 101))


@pytest.mark.parametrize(
    ("step", "phase"), [(0, "warmup"), (9, "warmup"), (10, "stable"), (80, "stable"), (81, "decay"), (100, "decay")]
)
def test_phase_at_follows_the_schedule(step: int, phase: str) -> None:
    assert phase_at(CONFIG, step * 2048) == phase


def test_phase_at_without_decay_is_stable_to_the_end() -> None:
    config = Config(name="x")
    assert phase_at(config, config.training.total_tokens) == "stable"
